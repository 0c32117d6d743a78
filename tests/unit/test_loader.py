"""Loaders: the order of samples, their random numbers, their shares, their workers."""

import random
import time
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared import seed
from shared.distributed import World
from shared.errors import UserError, hint_for
from shared.loader import TrainBatches, eval_indices, make_eval_loader, make_loader, steps_per_epoch


class Draws(Dataset[Tensor]):
    """Each sample is its index and a number from each of the three generators."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> Tensor:
        drawn = [float(torch.rand(())), float(np.random.random()), random.random()]
        return torch.tensor([float(index), *drawn], dtype=torch.float64)


class Hangs(Draws):
    """The fifth sample comes too late."""

    def __getitem__(self, index: int) -> Tensor:
        if index == 5:
            time.sleep(2.5)  # a worker ends after it
        return super().__getitem__(index)


class DrawsByBatch(Draws):
    """Fetches a whole batch in one call, with one random number for all of it."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        self.calls.append(list(indices))
        drawn = float(torch.rand(()))
        return [torch.tensor([float(index), drawn]) for index in indices]


def fetch(data: Dataset[Any], workers: int, epoch: int = 1, offset: int = 0) -> list[Tensor]:
    loader = make_loader(data, 3, World(), seed=5, workers=workers, epoch=epoch, offset=offset)
    return list(loader)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def states() -> list[Any]:
    own = seed.get_state()
    return [own["torch"].tolist(), own["numpy"], own["python"]]


@pytest.mark.parametrize(("workers", "offset"), [(2, 0), (0, 2), (2, 2)])
def test_neither_workers_nor_an_offset_change_samples_or_random_numbers(workers, offset) -> None:
    assert same(fetch(Draws(), workers, offset=offset), fetch(Draws(), workers=0)[offset:])


def test_every_sample_of_every_epoch_has_random_numbers_of_its_own() -> None:
    rows = torch.cat(fetch(Draws(), 0, epoch=0) + fetch(Draws(), 0, epoch=1))
    assert len(torch.unique(rows[:, 1:])) == rows[:, 1:].numel() == 2 * 12 * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_fetching_leaves_the_generators_of_training_alone(workers: int) -> None:
    seed.seed_all(11)
    before = states()
    loader = make_loader(Draws(), 3, World(), seed=5, workers=workers)
    for _ in loader:
        assert states() == before
    assert states() == before


def test_fetching_leaves_the_generators_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.manual_seed seeds every GPU too, and dropout would repeat itself with 0 workers."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    fetch(Draws(), workers=0)
    assert seeded == []


def test_a_dataset_that_fetches_by_batch_gets_each_batch_in_one_call() -> None:
    data = DrawsByBatch()
    rows = fetch(data, workers=0)
    assert [len(call) for call in data.calls] == [3, 3, 3, 3]
    assert [batch[:, 0].long().tolist() for batch in rows] == data.calls
    assert same(fetch(DrawsByBatch(), workers=2), rows)
    assert same(fetch(DrawsByBatch(), workers=0, offset=1), rows[1:])


def test_two_ranks_draw_for_each_sample_what_one_draws() -> None:
    def numbers(world: World, batch_size: int) -> dict[float, list[float]]:
        loader = make_loader(Draws(), batch_size, world, seed=5, workers=0)
        return {float(row[0]): row[1:].tolist() for batch in loader for row in batch}

    both = numbers(World(0, 0, 2), 2) | numbers(World(1, 1, 2), 2)
    assert both == numbers(World(), 4)


def test_a_worker_that_gives_no_batch_ends_the_run_after_the_timeout() -> None:
    world = World(timeout=1.0)
    with pytest.raises(RuntimeError, match="timed out") as failed:
        list(make_loader(Hangs(), 3, world, seed=5, workers=1))
    assert "no batch within --timeout" in (hint_for(str(failed.value), ["--timeout"]) or "")
    assert make_eval_loader(Hangs(), 3, world, workers=1).timeout == 1.0


# --- the order ------------------------------------------------------------------------------------


def batches(
    rank: int, size: int, batch_size: int, *, num: int = 23, **place: int
) -> list[list[int]]:
    where = {"seed": 3, "epoch": 1, **place}
    return list(TrainBatches(num, batch_size, World(rank, rank, size), **where))


def test_two_ranks_together_see_the_global_batches_of_one() -> None:
    alone = batches(0, 1, 8)
    first, second = batches(0, 2, 4), batches(1, 2, 4)
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


@pytest.mark.parametrize(("size", "num"), [(1, 5), (2, 1), (2, 12), (3, 23)])
def test_with_the_rest_an_epoch_holds_every_sample_once_in_as_many_steps_on_every_rank(size, num):
    ranks = [
        list(TrainBatches(num, 2, World(r, r, size), seed=3, epoch=1, with_rest=True))
        for r in range(size)
    ]
    steps = steps_per_epoch(num, 2, size, with_rest=True)
    assert [len(batches) for batches in ranks] == [steps] * size
    assert sorted(chain.from_iterable(chain.from_iterable(ranks))) == list(range(num))
    last = [len(batches[-1]) for batches in ranks]
    assert max(last) - min(last) <= 1 and all(len(b) == 2 for each in ranks for b in each[:-1])


def test_an_offset_continues_the_same_order_and_the_length_is_what_is_left() -> None:
    whole = batches(1, 2, 2)
    for offset in range(len(whole) + 1):
        assert batches(1, 2, 2, offset=offset) == whole[offset:]
    left = [TrainBatches(23, 2, World(size=2), seed=0, epoch=0, offset=n) for n in (0, 3, 5, 9)]
    assert [len(batches) for batches in left] == [5, 2, 0, 0]


def test_the_order_is_another_one_for_another_epoch_or_seed() -> None:
    orders = [batches(0, 1, 8), batches(0, 1, 8, epoch=2), batches(0, 1, 8, seed=4)]
    assert batches(0, 1, 8) == orders[0]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_too_few_samples_for_a_step_are_refused_with_the_number_needed() -> None:
    with pytest.raises(UserError, match=r"7 samples are too few.*2 process.*4 .*need 8"):
        steps_per_epoch(7, batch_size=4, world_size=2)
    assert steps_per_epoch(8, batch_size=4, world_size=2) == 1
    with pytest.raises(UserError, match="0 samples are too few"):
        steps_per_epoch(0, batch_size=4, world_size=2, with_rest=True)


@pytest.mark.parametrize(("size", "num_samples"), [(1, 2), (2, 0), (2, 11), (3, 1), (3, 10)])
def test_evaluation_shares_are_a_partition(num_samples: int, size: int) -> None:
    shares = [eval_indices(num_samples, World(rank, rank, size)) for rank in range(size)]
    assert sorted(chain.from_iterable(shares)) == list(range(num_samples))
