"""Which samples each rank sees in which order, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from shared.distributed import World
from shared.errors import UserError
from shared.seed import derive


def steps_per_epoch(
    num_samples: int, batch_size: int, world_size: int, *, with_rest: bool = False
) -> int:
    """Steps of one epoch: whole batches on every rank, and with_rest one more for what is left.

    batch_size: samples a process. Raises UserError when there are none: an epoch without a step
    would "succeed" in silence.
    """
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} samples a process: at least 1 is needed")
    steps = num_samples // (batch_size * world_size)
    if with_rest and num_samples:
        return -(-num_samples // (batch_size * world_size))
    if steps == 0:
        raise UserError(
            f"{num_samples} samples are too few for one step: {world_size} process(es) × batch "
            f"size {batch_size} a process need {batch_size * world_size}; make the batch "
            "smaller, or lower --nproc"
        )
    return steps


class TrainBatches(Sampler[list[int]]):
    """Lists of sample indices: a new order every epoch, as many whole batches on every rank.

    Step k of the epoch takes the samples [k·W·B, (k+1)·W·B) of the order, rank r the r-th B of
    them, so that the global batch is the same for any world size of the same W·B. `offset` steps
    are passed over: the continuation of an epoch that was interrupted. with_rest: the samples that
    make no whole batch are a last step, spread over the ranks; a rank may get none of them.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        world: World,
        *,
        seed: int,
        epoch: int,
        offset: int = 0,
        with_rest: bool = False,
    ) -> None:
        self._steps = steps_per_epoch(num_samples, batch_size, world.size, with_rest=with_rest)
        self._num_samples, self._batch_size, self._world = num_samples, batch_size, world
        self._offset = offset
        self._generator_seed = derive(seed, epoch)

    def __len__(self) -> int:
        return max(0, self._steps - self._offset)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._generator_seed)
        order = torch.randperm(self._num_samples, generator=generator)
        rank, size = self._world.rank, self._world.size
        global_batch = self._batch_size * size
        for step in range(self._offset, self._steps):
            everyone = order[step * global_batch : (step + 1) * global_batch]
            first, end = (len(everyone) * number // size for number in (rank, rank + 1))
            yield everyone[first:end].tolist()


def eval_indices(num_samples: int, world: World) -> range:
    """This rank's share, without padding: every sample on exactly one rank, in order."""
    return range(world.rank, num_samples, world.size)
