"""What an epoch leaves: log lines as mm's users know them, figures, epoch_N.pth, best_….pth.

Epoch(train) [2][6/6]  lr: 7.7103e-03  eta: 0:00:00  time: 1.9216  data_time: 0.0089  loss: 41.4873
Epoch(val) [2][1/1]    retrieval/Recall@1: 93.1000  retrieval/mAP@10: 69.3000  data_time: 0.0100
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import checkpoint
from shared.amp import Mean
from shared.checkpoint import Position
from shared.distributed import World

log = logging.getLogger(__name__)

Weights = Callable[[], dict[str, Tensor]]
_NUMBER = re.compile(r"epoch_(\d+)\.pth$")


def in_percent(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics under their tags, retrieval/Recall@1 and so on, in percent."""
    return {f"retrieval/{name}": 100 * value for name, value in metrics.items()}


def val_line(
    epoch: int, batches: int, metrics: Mapping[str, float], *, waited: float, seconds: float
) -> str:
    """A line of validation. metrics: Recall@1 … in [0, 1], shown in percent."""
    parts = [f"{tag}: {value:.4f}" for tag, value in in_percent(metrics).items()]
    parts += [f"data_time: {waited:.4f}", f"time: {seconds:.4f}"]
    return f"Epoch(val) [{epoch}][{batches}/{batches}]    {'  '.join(parts)}"


class TrainLines:
    """Writes a line every `interval` steps of an epoch and at its end; every rank calls it.

    Loss and times are means since the last line, the loss that of all ranks too.
    """

    def __init__(self, interval: int, steps_per_epoch: int, epochs: int, world: World) -> None:
        self._interval, self._steps, self._epochs = interval, steps_per_epoch, epochs
        self._world, self._loss = world, Mean(world)
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
        """Count the step that was just done, of which `position` does not know yet."""
        self._loss.add(loss)
        self._count += 1
        self._mark = time.monotonic()
        batch = position.batch + 1
        if batch % self._interval == 0 or batch == self._steps:
            self._write(position, lr)
            self.restart()

    def _write(self, position: Position, lr: float) -> None:
        loss = self._loss.value()
        seconds = time.monotonic() - self._began
        self._total_time += seconds
        self._total_steps += self._count
        left = self._epochs * self._steps - position.step - 1
        eta = timedelta(seconds=int(left * self._total_time / self._total_steps))
        width = len(str(self._steps))
        line = (
            f"Epoch(train) [{position.epoch + 1}][{position.batch + 1:{width}d}/{self._steps}]  "
            f"lr: {lr:.4e}  eta: {eta}  time: {seconds / self._count:.4f}  "
            f"data_time: {self._waited / self._count:.4f}  "
        )
        if self._world.device.type == "cuda":
            line += f"memory: {torch.cuda.max_memory_allocated(self._world.device) // 2**20}  "
        log.info("%sloss: %.4f", line, loss)


class Record:
    """The figures of a run that outlive a stop: before training, the best, the latest."""

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.best_epoch = 0

    def update(self, metrics: dict[str, float], epoch: int, name: str | None) -> bool:
        """Note the figures of `epoch` (from 1); whether `name` is the highest so far."""
        self.last = metrics
        if name is None or metrics[name] <= self.best.get(name, -1.0):
            return False
        self.best, self.best_epoch = metrics, epoch
        return True

    def forget_best(self) -> None:
        """Let the next figures be the best."""
        self.best, self.best_epoch = {}, 0

    def result(self, beside: dict[str, float]) -> dict[str, Any] | None:
        """Recall@1 before and after, in percent, for the run's result; beside: chance and n."""
        if not self.last:
            return None
        before = self.before.get("Recall@1")
        return {
            "name": "Recall@1",
            "before": None if before is None else 100 * before,
            "after": 100 * self.last["Recall@1"],
            "higher_is_better": True,
            "unit": "%",
            **beside,
        }

    def state_dict(self) -> dict[str, Any]:
        """The figures."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        vars(self).update(state)


class EpochFiles:
    """epoch_N.pth and best_retrieval_<metric>_epoch_N.pth in a run directory; rank 0 alone.

    keep: how many epoch_N.pth stay, all of them for 0 and less. best: the metric.
    """

    def __init__(self, run_dir: Path, keep: int, best: str | None) -> None:
        self._dir, self._keep, self._best = run_dir, keep, best

    def settle(self, position: Position, record: Record, weights: Weights) -> bool:
        """Put the files in accord with the checkpoint that the run begins from.

        What a later epoch of an abandoned continuation left gets the suffix .old. A kill between a
        checkpoint and the best file of its epoch is made good. Returns whether the best file is
        lost, so that every rank can forget it.
        """
        missing = bool(record.best_epoch) and not self._best_path(record).exists()
        if missing and record.best_epoch == position.epoch and position.batch == 0:
            self.write_best(record, weights)
            missing = False
        for path in self._dir.glob("*epoch_*.pth"):
            is_best, epoch = path.name.startswith("best_"), _epoch_of(path)
            if epoch > position.epoch or (is_best and epoch != record.best_epoch):
                path.replace(path.with_name(f"{path.name}.old"))
        if missing:
            log.warning("%s is gone: the next best starts anew", self._best_path(record))
        return missing

    def write_epoch(self, position: Position, state: dict[str, Any]) -> None:
        """Write the checkpoint of the epoch before `position`, from which a run can continue."""
        path = self._dir / f"epoch_{position.epoch}.pth"
        with checkpoint.beside(path):
            checkpoint.save(path, state, keep=1)
            epochs = [file for file in self.all() if not file.name.startswith("best_")]
            for file in epochs[: -self._keep] if self._keep > 0 else ():
                file.unlink()

    def write_best(self, record: Record, weights: Weights) -> None:
        """Write the weights of the best epoch alone; they take the place of the best before."""
        path = self._best_path(record)
        meta = {"epoch": record.best_epoch, "metrics": record.best}
        with checkpoint.beside(path):
            checkpoint.save(path, {"state_dict": weights(), "meta": meta}, keep=1)
            for older in self._dir.glob("best_retrieval_*_epoch_*.pth"):
                if older != path:
                    older.unlink()
            log.info("best %s so far: %s", self._best, path.name)

    def all(self) -> list[Path]:
        """The files that are there, oldest epoch first."""
        return sorted(self._dir.glob("*epoch_*.pth"), key=lambda path: (_epoch_of(path), path))

    def _best_path(self, record: Record) -> Path:
        return self._dir / f"best_retrieval_{self._best}_epoch_{record.best_epoch}.pth"


def _epoch_of(path: Path) -> int:
    found = _NUMBER.search(path.name)
    return int(found[1]) if found else 0
