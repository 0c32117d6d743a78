from itertools import chain

import pytest

from shared.distributed import World
from shared.errors import UserError
from shared.loader import TrainBatches, eval_indices, steps_per_epoch


def batches(
    rank: int, size: int, batch_size: int, *, num: int = 23, **place: int
) -> list[list[int]]:
    where = {"seed": 3, "epoch": 1, **place}
    return list(TrainBatches(num, batch_size, World(rank, rank, size), **where))


def test_two_ranks_together_see_the_global_batches_of_one() -> None:
    alone = batches(0, 1, 8)
    first, second = batches(0, 2, 4), batches(1, 2, 4)
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


def test_an_epoch_holds_every_sample_at_most_once_in_whole_batches() -> None:
    seen = list(chain.from_iterable(batches(0, 2, 4) + batches(1, 2, 4)))
    assert len(seen) == len(set(seen)) == 16  # 23 samples: two whole global batches of 8
    assert set(seen) <= set(range(23))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num", [1, 5, 12, 23])
def test_with_the_rest_an_epoch_holds_every_sample_once_in_as_many_steps_on_every_rank(
    size: int, num: int
) -> None:
    ranks = [
        list(TrainBatches(num, 2, World(r, r, size), seed=3, epoch=1, with_rest=True))
        for r in range(size)
    ]
    steps = steps_per_epoch(num, 2, size, with_rest=True)
    assert [len(batches) for batches in ranks] == [steps] * size
    assert sorted(chain.from_iterable(chain.from_iterable(ranks))) == list(range(num))
    last = [len(batches[-1]) for batches in ranks]
    assert max(last) - min(last) <= 1 and all(len(b) == 2 for each in ranks for b in each[:-1])


def test_an_offset_continues_the_same_order() -> None:
    whole = batches(1, 2, 2)
    for offset in range(len(whole) + 1):
        assert batches(1, 2, 2, offset=offset) == whole[offset:]


def test_the_length_counts_what_is_left() -> None:
    def length(offset: int) -> int:
        return len(TrainBatches(23, 2, World(0, 0, 2), seed=0, epoch=0, offset=offset))

    assert [length(offset) for offset in (0, 3, 5, 9)] == [5, 2, 0, 0]


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


@pytest.mark.parametrize("num_samples", [0, 1, 2, 10, 11])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_shares_are_a_partition(num_samples: int, size: int) -> None:
    shares = [eval_indices(num_samples, World(rank, rank, size)) for rank in range(size)]
    assert sorted(chain.from_iterable(shares)) == list(range(num_samples))
