"""Log lines in the form that users of mm toolboxes grep for.

Epoch(train) [2][6/6]  lr: 7.7103e-03  eta: 0:00:00  time: 1.9216  data_time: 0.0089  loss: 41.4873
Epoch(val) [2][1/1]    retrieval/Recall@1: 93.1000  retrieval/mAP@10: 69.3000  data_time: 0.0100  time: 0.5000
"""  # noqa: E501, the lines as they are

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import Tensor

from shared import distributed
from shared.checkpoint import Position
from shared.distributed import World
from shared.metrics import Mean

log = logging.getLogger(__name__)


def train_line(
    epoch: int, step: int, steps: int, *, lr: float, eta: float, seconds: float, waited: float,
    loss: float, memory: int | None = None,
) -> str:  # fmt: skip
    """A line of training. epoch and step from 1; times in seconds; memory: MiB of the device."""
    width = len(str(steps))
    parts = [
        f"lr: {lr:.4e}",
        f"eta: {timedelta(seconds=int(eta))}",
        f"time: {seconds:.4f}",
        f"data_time: {waited:.4f}",
        *([f"memory: {memory}"] if memory is not None else []),
        f"loss: {loss:.4f}",
    ]
    return f"Epoch(train) [{epoch}][{step:{width}d}/{steps}]  {'  '.join(parts)}"


def val_line(
    epoch: int, batches: int, metrics: Mapping[str, float], *, waited: float, seconds: float
) -> str:
    """A line of validation. metrics: Recall@1 … in [0, 1], shown in percent."""
    parts = [f"{tag}: {value:.4f}" for tag, value in in_percent(metrics).items()]
    parts += [f"data_time: {waited:.4f}", f"time: {seconds:.4f}"]
    return f"Epoch(val) [{epoch}][{batches}/{batches}]    {'  '.join(parts)}"


def in_percent(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics under their tags, retrieval/Recall@1 and so on, in percent."""
    return {f"retrieval/{name}": 100 * value for name, value in metrics.items()}


class TrainLines:
    """Writes a line every `interval` steps of an epoch and at its end; every rank calls it.

    Loss and times are means since the last line, the loss that of all ranks too.
    """

    def __init__(self, interval: int, steps_per_epoch: int, epochs: int, world: World) -> None:
        self._interval, self._steps, self._epochs = interval, steps_per_epoch, epochs
        self._world, self._loss = world, Mean(world.device)
        self._total_time, self._total_steps = 0.0, 0
        self.restart()

    def restart(self) -> None:
        """Time from here: what came before was no training."""
        self._loss.reset()
        self._began = self._mark = time.monotonic()
        self._waited, self._count = 0.0, 0

    def batch_arrived(self) -> None:
        """The next batch is here: what passed since the step before was waiting for it."""
        self._waited += time.monotonic() - self._mark

    def step_done(self, position: Position, loss: Tensor, lr: float) -> None:
        """Count the step that `position` has just advanced over."""
        self._loss.add(loss)
        self._count += 1
        self._mark = time.monotonic()
        if position.batch % self._interval == 0 or position.batch == self._steps:
            self._write(position, lr)
            self.restart()

    def _write(self, position: Position, lr: float) -> None:
        loss = self._loss.of(distributed.total(self._loss.sums, self._world))
        seconds = time.monotonic() - self._began
        self._total_time += seconds
        self._total_steps += self._count
        left = self._epochs * self._steps - position.step
        line = train_line(
            position.epoch + 1, position.batch, self._steps, lr=lr,
            eta=left * self._total_time / self._total_steps,
            seconds=seconds / self._count, waited=self._waited / self._count,
            loss=loss, memory=_memory(self._world.device),
        )  # fmt: skip
        log.info(line)


def _memory(device: torch.device) -> int | None:
    """MiB that tensors took at most on a GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) // 2**20
