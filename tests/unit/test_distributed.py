"""Collectives between two processes over gloo, against one process and hand calculations.

The file is also the program of each process: `python test_distributed.py RANK REPORT PORT`; rank 0
writes what both saw.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared import distributed
from shared.amp import Mean
from shared.distributed import World

WORLD, ROWS = 2, 3
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]  # the group: one pair for all


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw, by rank."""
    from tests.harness import free_port, run_ranks

    path = tmp_path_factory.mktemp("ranks") / "report.json"
    run_ranks(__file__, WORLD, path, free_port())
    return json.loads(path.read_text())


def test_every_rank_gets_what_the_collectives_say(report: list[dict[str, Any]]) -> None:
    """Rank r sums [r + 1, 10 · r], and tells 15 · r."""
    for rank, seen in enumerate(report):
        assert seen["place"] == [rank, rank, 2, "cpu", rank == 0]
        assert seen["total"] == seen["total of integers"] == [3, 10]
        assert seen["mean"] == [1.5, 5.0]
        assert seen["argument"] == [rank + 1, 10 * rank]  # of the sum, as it was
        assert seen["largest"] == 15
        assert seen["any"] == [True, False]
        assert seen["told"] == [False, True]  # without a collective
        assert seen["broadcast"] == {"from": 0, "path": "/x/0"}
        assert seen["gathered"] == [{"rank": 0}, {"rank": 1}]
        # 2, and not 2.5, the mean of the means; a share is half of the sums
        assert seen["means"] == [2.0, 2.0, 9.0, 4.5]
        assert seen["rows"] == [[0.0, 1.0]] * ROWS + [[100.0, 101.0]] * ROWS
        assert seen["transposed"] == [[0.0, 2.0], [1.0, 3.0], [10.0, 12.0], [11.0, 13.0]]


def test_gathered_gradients_are_those_of_one_process(report: list[dict[str, Any]]) -> None:
    alone = nn.Linear(5, 4, bias=False).double()
    alone.load_state_dict({"weight": initial_weight()})
    relation_loss(alone(inputs())).backward()
    expected = alone.weight.grad
    assert expected is not None
    for seen in report:
        error = (torch.tensor(seen["gradient"], dtype=torch.float64) - expected).abs().max()
        assert float(error / expected.abs().max()) < 1e-12


def test_gathering_leaves_the_gradients_of_others_alone(report: list[dict[str, Any]]) -> None:
    """d/dz of Σ(gathered + z)² is 2 (gathered + z), and nothing is summed over ranks in it."""
    for seen in report:
        assert seen["neighbour"] == [[2.0, 4.0]] * ROWS + [[202.0, 204.0]] * ROWS


def test_wrapping_averages_gradients_and_unwrapping_gives_the_model_back(report):
    for seen in report:
        assert seen["unwrapped is the model"]
        assert seen["averaged gradient"] == 1.5  # of 1 and 2


def test_one_process_opens_no_group_and_everything_is_its_own() -> None:
    world = distributed.setup("cpu", environ={})
    values, model = torch.tensor([1.0, 2.0]), nn.Linear(1, 1)
    assert world == World(0, 0, 1, torch.device("cpu"))
    assert not dist.is_initialized()
    assert distributed.total(values, world).tolist() == [1.0, 2.0]
    assert distributed.mean(values, world).tolist() == [1.0, 2.0]
    assert distributed.largest(7, world) == 7
    assert distributed.broadcast_object("x", world) == "x"
    assert distributed.gather_objects("x", world) == ["x"]
    assert distributed.gather_with_grad(values, world) is values
    assert distributed.wrap(model, world) is distributed.unwrap(model) is model
    distributed.barrier(world)
    distributed.cleanup(world)


# the program of each process


def initial_weight() -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def inputs() -> Tensor:
    """The global batch: (world · rows, 5)."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(WORLD * ROWS, 5, generator=generator, dtype=torch.float64)


def relation_loss(features: Tensor) -> Tensor:
    """A loss that needs the whole batch: every sample's distance to every other."""
    return torch.pdist(features).log().square().mean() + features.std(dim=0).sum()


def told(world: World) -> list[bool]:
    """What tell_all says before rank 1 alone has told, and after."""
    before = distributed.tell_all(False, world)
    distributed.barrier(world)
    if world.rank == 1:
        distributed.tell_all(True, world)
    distributed.barrier(world)
    return [before, distributed.tell_all(False, world)]


def means(world: World) -> list[float]:
    """The mean of six ones and three fours, before and after each rank has taken its share."""
    mean = Mean(world)
    mean.add(torch.tensor((1.0, 4.0)[world.rank]), weight=(6, 3)[world.rank])
    before = mean.value()
    mean.collect()
    return [before, mean.value(), *mean.state_dict()["sums"].tolist()]


def reductions(world: World) -> dict[str, Any]:
    values = torch.tensor([world.rank + 1.0, 10.0 * world.rank], requires_grad=True)
    return {
        "place": [world.rank, world.local_rank, world.size, str(world.device), world.is_main],
        "total": distributed.total(values, world).tolist(),
        "total of integers": distributed.total(values.long(), world).tolist(),
        "mean": distributed.mean(values, world).tolist(),
        "argument": values.tolist(),
        "means": means(world),
        "told": told(world),
        "largest": distributed.largest(15 * world.rank, world),
        "any": [distributed.any_rank(flag, world) for flag in (world.rank == 1, False)],
        "broadcast": distributed.broadcast_object(
            {"from": world.rank, "path": f"/x/{world.rank}"}, world
        ),
        "gathered": distributed.gather_objects({"rank": world.rank}, world),
    }


def gathering(world: World) -> dict[str, Any]:
    own = torch.tensor([[0.0, 1.0]] * ROWS) + 100 * world.rank
    rows = distributed.gather_with_grad(own, world)
    square = torch.arange(4.0).view(2, 2) + 10 * world.rank
    leaf = torch.ones(WORLD * ROWS, 2, requires_grad=True)
    beside = leaf * 1.0  # made before: its backward comes after that of the gathering
    (distributed.gather_with_grad(own.requires_grad_(), world) + beside).square().sum().backward()
    assert leaf.grad is not None
    return {
        "rows": rows.tolist(),
        "transposed": distributed.gather_with_grad(square.T, world).tolist(),
        "neighbour": leaf.grad.tolist(),
    }


def gradients(world: World) -> dict[str, Any]:
    model = nn.Linear(5, 4, bias=False).double()
    model.load_state_dict({"weight": initial_weight()})
    wrapped = distributed.wrap(model, world)
    own = inputs()[world.rank * ROWS : (world.rank + 1) * ROWS]
    relation_loss(distributed.gather_with_grad(wrapped(own), world)).backward()
    assert model.weight.grad is not None
    scalar = nn.Linear(1, 1, bias=False)
    averaging = distributed.wrap(scalar, world)
    averaging(torch.tensor([[world.rank + 1.0]])).sum().backward()
    assert scalar.weight.grad is not None
    return {
        "gradient": model.weight.grad.tolist(),
        "unwrapped is the model": distributed.unwrap(wrapped) is model,
        "averaged gradient": scalar.weight.grad.item(),
    }


def main(rank: str, path: str, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    world = distributed.setup("auto", timeout=60.0)
    seen = reductions(world) | gathering(world) | gradients(world)
    everyone = distributed.gather_objects(seen, world)
    if world.is_main:
        Path(path).write_text(json.dumps(everyone))
    distributed.cleanup(world)


if __name__ == "__main__":
    main(*sys.argv[1:])
