"""Class centres sharded over one, two and three processes are those of one process.

The file is also the program of each of three processes: `python test_partial_fc_ddp.py RANK
DIRECTORY`. The first two work as a pair, then the first alone, then all three; rank 0 writes what
was found.
"""

import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from arcface.inshop_retrieval.partial_fc import CentreRows, PartialFC
from shared import distributed
from shared.distributed import World
from tests.harness import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

CLASSES, WIDTH, BATCH = 10, 6, 12  # 10 over 3 ranks: shards of 4, 3 and 3
STEPS, PART = 9, 3  # an uninterrupted run, and what each of 2, 1 and 3 ranks does of it
Report = dict[str, Any]


@pytest.fixture(scope="module")
def uninterrupted() -> Report:
    return train(World(), None, 0, STEPS)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Report]:
    """What ranks found, by how many they were; training goes from 2 ranks to 1 and to 3."""
    directory = tmp_path_factory.mktemp("ranks")
    run_ranks(__file__, 3, directory)
    return {size: torch.load(directory / f"{size}.pt", weights_only=True) for size in (1, 2, 3)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_loss_and_gradients_are_those_of_one_process(reports, size):
    errors = reports[size]["errors"]
    assert errors.keys() == {
        f"{case}, {what}"
        for case in ("plain", "sub-centres", "labels of one rank alone")
        for what in ("loss", "embeddings", "backbone", "centres", "norm")
    }
    assert max(errors.values()) < 1e-10, errors


def test_a_run_continues_with_another_number_of_ranks(reports, uninterrupted):
    losses = [loss for size in (2, 1, 3) for loss in reports[size]["losses"]]
    assert losses == pytest.approx(uninterrupted["losses"], rel=1e-6)
    assert losses[-1] < losses[0] - 0.1
    assert reports[3]["rows"].keys() == {"centres", "exp_avg", "exp_avg_sq"}  # of all classes
    for name, expected in uninterrupted["rows"].items():
        torch.testing.assert_close(reports[3]["rows"][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_below_rate_1_the_softmax_is_over_the_drawn_classes_of_all_ranks(reports, size):
    seen = reports[size]["sampling"]
    assert seen["loss"] == pytest.approx(seen["expected"], rel=1e-12)
    assert seen["labels"] <= seen["drawn"]
    assert len(seen["drawn"]) < CLASSES
    assert seen["changed"] == seen["drawn"]


# ---------------------------------------------------------------- what each process does


def normal(*shape: int, seed: int = 0) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=numbers, dtype=torch.float64)


def make_backbone(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).to(dtype)


def own_share(values: Tensor, world: World) -> Tensor:
    share = len(values) // world.size
    return values[world.rank * share : (world.rank + 1) * share]


def one_process(images: Tensor, labels: Tensor, centres: PartialFC) -> dict[str, Tensor]:
    """Loss and gradients of everything in one process, the formula written out."""
    backbone, weight = make_backbone(torch.float64), centres.weight.detach().requires_grad_()
    embeddings = backbone(images)
    embeddings.retain_grad()
    cosines = functional.normalize(embeddings) @ functional.normalize(weight).T
    cosines = cosines.unflatten(1, (CLASSES, -1)).max(2).values
    chosen = functional.one_hot(labels, CLASSES).bool()
    loss = functional.cross_entropy(
        64 * torch.where(chosen, (cosines.acos() + 0.5).cos(), cosines),
        labels,
    )
    loss.backward()
    gradients = [embeddings.grad, flat_gradient(backbone), weight.grad]
    norm = torch.cat([g.flatten() for g in gradients[1:] if g is not None]).norm()
    names = ("loss", "embeddings", "backbone", "centres", "norm")
    return dict(zip(names, [loss.detach(), *gradients, norm], strict=True))  # type: ignore[arg-type]


def flat_gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def sharded(images: Tensor, labels: Tensor, centres: PartialFC, world: World) -> dict[str, Tensor]:
    """The same, this rank's part of it put in order; the gradient of embeddings times ranks."""
    model = distributed.wrap(make_backbone(torch.float64), world)
    embeddings = model(own_share(images, world))
    embeddings.retain_grad()
    loss = centres(embeddings, own_share(labels, world))
    loss.backward()
    backbone, gradient = flat_gradient(model), centres.weight.grad
    norm = (backbone.square().sum() + distributed.norm(gradient, world).square()).sqrt()
    return {
        "loss": loss.detach(),
        "embeddings": distributed.gather_with_grad(embeddings.grad, world) / world.size,
        "backbone": backbone,
        "centres": torch.cat(distributed.gather_objects(gradient, world)),  # type: ignore[arg-type]
        "norm": norm,
    }


def errors_of(case: str, labels: Tensor, world: World, **options: Any) -> dict[str, float]:
    images = normal(len(labels), 5, seed=1)
    options = {"init_std": 1.0, **options}
    whole = PartialFC(CLASSES, WIDTH, World(), **options).double()
    expected = one_process(images, labels, whole)
    centres = PartialFC(CLASSES, WIDTH, world, **options).double()
    found = sharded(images, labels, centres, world)
    return {
        f"{case}, {what}": float((found[what] - expected[what]).abs().max() / value.abs().max())
        for what, value in expected.items()
    }


def sampling(world: World) -> Report:
    """One step below rate 1: who was drawn, who changed, and the loss over the drawn, by hand."""
    labels = torch.tensor([0, 9, 9, 4, 0, 4])
    images = normal(6, WIDTH, seed=2)
    options = {"init_std": 1.0, "sample_rate": 0.5, "scale": 8.0}
    centres = PartialFC(CLASSES, WIDTH, world, **options).double()
    optimizer = torch.optim.AdamW(centres.parameters(), lr=0.1)
    rows = CentreRows(centres, optimizer)
    before = collected(rows, world)
    rows.sample(own_share(labels, world), 0)
    own = [centres.classes[number] for number in centres.drawn.tolist()]
    drawn = sorted(chain.from_iterable(distributed.gather_objects(own, world)))
    loss = centres(own_share(images, world), own_share(labels, world))
    loss.backward()
    optimizer.step()
    after = collected(rows, world)
    if not world.is_main:
        return {}
    whole = functional.normalize(before["centres"][drawn])
    cosines = functional.normalize(images) @ whole.T
    targets = torch.searchsorted(torch.tensor(drawn), labels)
    chosen = functional.one_hot(targets, len(drawn)).bool()
    logits = 8 * torch.where(chosen, (cosines.acos() + 0.5).cos(), cosines)
    changed = (before["centres"] != after["centres"]).any(1).nonzero().flatten().tolist()
    return {
        "loss": loss.item(),
        "expected": functional.cross_entropy(logits, targets).item(),
        "labels": set(labels.tolist()),
        "drawn": set(drawn),
        "changed": set(changed),
    }


def collected(rows: CentreRows, world: World) -> dict[str, Tensor]:
    """Centres and moments of all classes; {} on the other ranks."""
    rows.collect()
    if not world.is_main:
        return {}
    state = rows.state_dict()
    found = {"centres": state["centres"], **state["moments"]}
    return {name: value.clone() for name, value in found.items()}


def train(world: World, state: Report | None, begin: int, end: int) -> Report:
    """Steps `begin` to `end` of the one run, after `state`; losses, rows and the state to save."""
    backbone = make_backbone(torch.float32)
    model = distributed.wrap(backbone, world)
    centres = PartialFC(CLASSES, WIDTH, world, scale=8.0, init_std=1.0, sub_centres=2)
    own = torch.optim.AdamW(centres.parameters(), lr=0.05)
    optimizer, rows = torch.optim.SGD(backbone.parameters(), lr=0.1), CentreRows(centres, own)
    if state:
        backbone.load_state_dict(state["backbone"])
        rows.load_state_dict(state["rows"])
    losses = []
    for step in range(begin, end):
        images = normal(BATCH, 5, seed=step % 2).float()
        labels = own_share(torch.arange(BATCH) % CLASSES, world)
        rows.sample(labels, step)
        loss = centres(model(own_share(images, world)), labels)
        loss.backward()
        for each in (optimizer, own):
            each.step()
            each.zero_grad()
        losses.append(loss.item())
    held = collected(rows, world)
    saved = {"backbone": backbone.state_dict()}
    if world.is_main:
        saved["rows"] = rows.state_dict()
    return {"losses": losses, "rows": held, "state": saved, "end": end}


def examine(world: World) -> Report:
    labels = torch.arange(BATCH) % CLASSES
    lopsided = torch.full((BATCH,), CLASSES - 1)
    errors = errors_of("plain", labels, world)
    errors |= errors_of("sub-centres", labels, world, sub_centres=3)
    errors |= errors_of("labels of one rank alone", lopsided, world)
    return {"errors": errors}


def as_one_of(size: int, rank: int, directory: Path, before: int | None) -> None:
    """Work as one of `size` ranks, from where `before` ranks left the training."""
    world = World(rank=rank, local_rank=rank, size=size)
    if size > 1:
        store = f"file://{directory}/store-{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    report = examine(world) | {"sampling": sampling(world)}
    left = torch.load(directory / f"{before}.pt", weights_only=True) if before else {}
    begin = left.get("end", 0)
    report |= train(world, left.get("state"), begin, begin + PART)
    if world.is_main:
        torch.save(report, directory / f"{size}.pt")
    distributed.cleanup(world)


def main(rank: int, directory: Path) -> None:
    if rank < 2:
        as_one_of(2, rank, directory, None)
    if rank == 0:
        as_one_of(1, rank, directory, 2)
    as_one_of(3, rank, directory, 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # torch's threads may end the usual way out with "terminate called"
