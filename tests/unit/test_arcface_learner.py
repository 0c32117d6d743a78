"""One process and two have one loss and one gradient, whatever the head.

The file is also the program of each process: `python test_arcface_learner.py RANK STORE REPORT`.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from arcface.config_options import with_options
from arcface.config_reader import RECIPE, read_config
from arcface.encoders import Encoder, build_encoder
from arcface.learner import Learner, RankBuffers, class_margins
from arcface.recipe import AdaptiveMargins, Recipe
from arcface.recipe_reader import KNOWN, read_recipe
from shared.distributed import World
from shared.errors import UserError
from shared.precision import Amp

ROOT = Path(__file__).resolve().parents[2]
WORLD, BATCH, CLASSES, CLIP_NORM = 2, 6, 5, 1.0
HEADS = {
    "inside DDP": (),
    "sharded, with sub-centres": ("model.head.shard=True", "model.head.num_subcenters=2"),
}


def make_recipe(*options: str) -> Recipe:
    configuration = read_config(RECIPE / "config/arcface/resnet50-arcface_8xb32_inshop.py")
    small = (
        "model.image_encoder.0.depth=18", "model.image_encoder.0.init_cfg=None",
        "model.image_encoder.0.norm_eval=True", "model.head.in_channels=512",
        f"model.head.num_classes={CLASSES}", f"train_dataloader.batch_size={BATCH}",
    )  # fmt: skip
    configuration, _ = with_options(configuration, (*small, *options), known=KNOWN)
    return read_recipe(configuration, Path("/"))[0]


def make_encoder(recipe: Recipe) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(recipe.encoder, "random", Path("/"))


def make_learner(recipe: Recipe, world: World) -> Learner:
    learner = Learner(recipe, make_encoder(recipe), torch.tensor(0.5), world, seed=7)
    learner.train()
    return learner


def make_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(WORLD * BATCH, 3, 16, 16), torch.arange(WORLD * BATCH) % CLASSES


# --- in one process -------------------------------------------------------------------------------


def test_margins_are_given_or_follow_the_counts_of_the_classes():
    recipe = make_recipe("model.head.margins=[0.1,0.2,0.3,0.4,0.5]")
    labels = torch.tensor([0] * 16 + [1] + [2] * 81 + [3] * 16 + [4])
    assert class_margins(recipe, labels).tolist() == [0.1, 0.2, 0.3, 0.4, 0.5]
    adaptive = replace(recipe, head=replace(recipe.head, adaptive=AdaptiveMargins(0.05, 0.5, -0.5)))
    # powers 1/4, 1, 1/9, 1/4, 1: from the least, 1/9 → 0.05, to the most, 1 → 0.5
    middle = 0.05 + 0.45 * (1 / 4 - 1 / 9) / (1 - 1 / 9)
    expected = [middle, 0.5, 0.05, middle, 0.5]
    assert class_margins(adaptive, labels).tolist() == pytest.approx(expected)
    with pytest.raises(UserError, match="class 4 has no samples"):
        class_margins(adaptive, labels[:-1])


def test_an_encoder_of_another_width_is_refused():
    recipe = make_recipe("model.head.in_channels=2048")
    with pytest.raises(UserError, match="in_channels is 2048, the encoder gives 512"):
        make_learner(recipe, World())


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_a_step_whose_gradients_are_not_finite_moves_nothing(options):
    learner = make_learner(make_recipe(*options), World())
    before = [p.detach().clone() for m in (learner.encoder, learner.head) for p in m.parameters()]
    images, labels = make_batch()
    amp = Amp("off", torch.device("cpu"))
    amp.backward(learner.loss(images * float("inf"), labels, 0))
    learner.step(amp)
    after = [p for module in (learner.encoder, learner.head) for p in module.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)


def clipped_step(*options: str) -> tuple[Tensor, Tensor]:
    """Gradients of encoder and head, and how far plain SGD of rate 1 moved both, as vectors."""
    plain = (
        "optim_wrapper.optimizer.lr=1.0", "optim_wrapper.optimizer.momentum=0.0",
        "optim_wrapper.optimizer.nesterov=False", "optim_wrapper.optimizer.weight_decay=0.0",
        f"optim_wrapper.clip_grad.max_norm={CLIP_NORM}", "auto_scale_lr.enable=False",
    )  # fmt: skip
    learner = make_learner(make_recipe(*plain, *options), World())
    parameters = [*learner.encoder.double().parameters(), *learner.head.double().parameters()]
    images, labels = make_batch()
    amp = Amp("off", torch.device("cpu"))
    amp.backward(learner.loss(images.double(), labels, 0))
    gradients, before = flat(p.grad for p in parameters), flat(parameters)
    learner.step(amp)
    return gradients, before - flat(parameters)


SEPARATE = {**HEADS, "sampled": ("model.head.sample_rate=0.6",)}


@pytest.mark.parametrize("options", SEPARATE.values(), ids=SEPARATE)
def test_the_clipped_norm_is_that_of_encoder_and_head_together(options):
    gradients, moved = clipped_step(*options)
    norm = float(gradients.square().sum().sqrt())
    assert norm > 2 * CLIP_NORM
    assert float(moved.norm()) == pytest.approx(CLIP_NORM, rel=1e-5)  # torch adds 1e-6 to the norm
    assert error(moved, gradients * (CLIP_NORM / (norm + 1e-6))) < 1e-10


def test_an_encoder_without_batch_norm_has_no_statistics_to_keep():
    buffers = RankBuffers(torch.nn.Linear(2, 2), World())
    buffers.average()
    buffers.collect()
    assert buffers.state_dict()["rows"].shape == (1, 0)
    buffers.load_state_dict(buffers.state_dict())


def test_rank_buffers_of_another_number_of_ranks_are_averaged():
    encoder = make_encoder(make_recipe())
    buffers = RankBuffers(encoder, World())
    rows = buffers.state_dict()["rows"]
    buffers.load_state_dict({"rows": torch.cat([rows + 1, rows + 3])})
    buffers.collect()
    assert torch.allclose(buffers.state_dict()["rows"], rows + 2)
    assert torch.equal(encoder.backbone.bn1.running_var, torch.full((64,), 3.0))


# --- in two ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, dict[str, float]]:
    """Relative errors by head, from two processes over gloo."""
    directory = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    paths = [str(directory / "store"), str(directory / "report.json")]
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), *paths], env=environment)
        for rank in range(WORLD)
    ]
    try:
        assert [process.wait(timeout=110) for process in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
    return json.loads((directory / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_two_processes_give_loss_gradients_and_step_of_one(report, head):
    errors = report[head]
    after = {"encoder after a step", "head after a step"}
    assert errors.keys() == {"loss", "encoder", "head"} | after
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.slow
def test_batch_norm_statistics_are_averaged_and_every_ranks_own_come_back(report):
    assert report["buffers"] == {"mean": 0.0, "restored": 0.0, "differed": 1.0}


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def own_rows(learner: Learner, whole: Tensor) -> Tensor:
    """The rows of all centres that this rank holds."""
    classes, per_class = learner.head.classes, learner.head.sub_centres
    return whole[classes.start * per_class : classes.stop * per_class]


def one_head(recipe: Recipe, batch_size: int) -> Recipe:
    """The same without shards: an implementation of its own, inside DDP's."""
    head, train = replace(recipe.head, shard=False), replace(recipe.train, batch_size=batch_size)
    return replace(recipe, head=head, train=train)


def compare(options: tuple[str, ...], world: World) -> dict[str, float]:
    recipe = make_recipe(*options, f"optim_wrapper.clip_grad.max_norm={CLIP_NORM}")
    images, labels = make_batch()
    mine = slice(world.rank * BATCH, (world.rank + 1) * BATCH)
    alone = make_learner(one_head(recipe, WORLD * BATCH), World())
    together = make_learner(recipe, world)
    losses, amps = [], []
    for learner, part in ((alone, slice(None)), (together, mine)):
        loss = learner.loss(images[part], labels[part], 0)
        amps.append(Amp("off", torch.device("cpu")))
        amps[-1].backward(loss)
        losses.append(loss.detach())
    if together.rows is None:
        distributed.all_reduce(losses[1])
        losses[1] /= WORLD
    gradients = [flat(p.grad for p in one.encoder.parameters()) for one in (alone, together)]
    assert (
        flat([gradients[0], alone.head.weight.grad]).norm() > 2 * CLIP_NORM
    )  # there is much to clip
    found = {
        "loss": error(losses[1], losses[0]),
        "encoder": error(gradients[1], gradients[0]),
        "head": error(together.head.weight.grad, own_rows(together, alone.head.weight.grad)),
    }
    for learner, amp in zip((alone, together), amps, strict=True):
        learner.step(amp)
    weights = [flat(one.encoder.parameters()) for one in (alone, together)]
    found["encoder after a step"] = error(weights[1], weights[0])
    centres = own_rows(together, alone.head.weight)
    found["head after a step"] = error(together.head.weight, centres)
    return found


def compare_buffers(world: World) -> dict[str, float]:
    encoder = make_encoder(make_recipe())
    encoder.backbone.bn1.running_mean.fill_(world.rank)
    buffers = RankBuffers(encoder, world)
    buffers.collect()
    state = buffers.state_dict()
    buffers.average()
    mean = float((encoder.backbone.bn1.running_mean - 0.5).abs().max())
    buffers.load_state_dict(state)
    restored = float((encoder.backbone.bn1.running_mean - world.rank).abs().max())
    return {
        "mean": mean,
        "restored": restored,
        "differed": float(len(state["rows"].unique(dim=0)) == 2),
    }


def work(rank: int, store: str, report: str) -> None:
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD
    )
    world = World(rank, rank, WORLD)
    found = {name: compare(options, world) for name, options in HEADS.items()}
    found["buffers"] = compare_buffers(world)
    everyone = [None] * WORLD
    distributed.all_gather_object(everyone, found)
    if rank == 0:
        worst = {
            name: {key: max(one[name][key] for one in everyone) for key in errors}
            for name, errors in found.items()
        }
        Path(report).write_text(json.dumps(worst))
    distributed.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    os._exit(0)  # torch's threads may end the usual way out with "terminate called"
