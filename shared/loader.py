"""The only place that builds a DataLoader: exact under resume, safe under signals.

Exact: the order comes from (seed, epoch), the loader's own generator is seeded anew each epoch, and
each sample's random numbers come from (seed, epoch, index), so neither the number of workers nor
the batch at which a run was interrupted changes anything.
Safe: workers live in a process group of their own, since torchrun signals whole groups and a worker
that dies of SIGTERM takes the emergency checkpoint with it; and they die with their process.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from shared.distributed import World
from shared.errors import UserError
from shared.processes import die_with_parent
from shared.seed import derive, seed_cpu


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


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    world: World,
    *,
    seed: int,
    workers: int,
    epoch: int = 0,
    offset: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    with_rest: bool = False,
) -> DataLoader[Any]:
    """Batches of one training epoch for this rank, from batch `offset` on.

    batch_size: samples a process. with_rest: what makes no whole batch is a last one, of which a
    rank may get nothing ([] goes to `collate`); else it is dropped. The dataset needs `__getitem__`
    and `__len__`; if it also has `__getitems__(indices)`, a batch is fetched in one call.
    Raises UserError when the dataset has not one such batch for every process.
    """
    if workers < 0:
        raise UserError(f"--workers {workers}: allowed are 0 (load in the process itself) and more")
    batches = TrainBatches(
        _length(dataset), batch_size, world, seed=seed, epoch=epoch, offset=offset,
        with_rest=with_rest,
    )  # fmt: skip
    return DataLoader(
        _Seeded(dataset, seed, epoch),
        batch_sampler=batches,
        num_workers=workers,
        timeout=world.timeout if workers else 0,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator().manual_seed(derive(seed, epoch, world.rank)),
        worker_init_fn=settle_worker if workers else None,
        persistent_workers=False,
    )


def make_eval_loader(
    dataset: Dataset[Any],
    batch_size: int,
    world: World,
    *,
    workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    least: int = 1,
) -> DataLoader[Any]:
    """This rank's share of the samples in order: every sample once over all ranks, none repeated.

    least: a last batch of fewer samples joins the one before, for losses over pairs.
    The ranks may get different numbers of batches, so no collective belongs in the loop over them;
    add up (sum, count) afterwards.
    """
    share = eval_indices(_length(dataset), world)
    batches = [list(share[at : at + batch_size]) for at in range(0, len(share), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < least:
        batches[-2:] = [batches[-2] + batches[-1]]
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        timeout=world.timeout if workers else 0,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # or the iterator draws from the global state
        worker_init_fn=settle_worker if workers else None,
    )


class _Seeded(Dataset[Any]):
    """`dataset` with the random numbers of each sample tied to (seed, epoch, index)."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int) -> None:
        self._dataset, self._seed, self._epoch = dataset, seed, epoch
        self._fetch_batch: Callable[[list[int]], list[Any]] | None = getattr(
            dataset, "__getitems__", None
        )

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The samples of a batch; the training process's own generators are put back after it."""
        in_worker = torch.utils.data.get_worker_info() is not None
        before = None if in_worker else _states()
        try:
            return self._fetch(indices)
        finally:
            if before is not None:
                _restore(before)

    def _fetch(self, indices: list[int]) -> list[Any]:
        if self._fetch_batch is not None:
            seed_cpu(derive(self._seed, self._epoch, indices[0]))
            return self._fetch_batch(indices)
        samples = []
        for index in indices:
            seed_cpu(derive(self._seed, self._epoch, index))
            samples.append(self._dataset[index])
        return samples


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def settle_worker(_worker: int) -> None:
    """Leave the process group that torchrun and Ctrl-C signal; die when the parent does."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    # elsewhere than on Linux torch's own watchdog ends the worker within seconds
    die_with_parent(parent.pid if parent else None, signal.SIGKILL)


def _length(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]
