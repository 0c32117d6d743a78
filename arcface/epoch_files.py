"""The files of finished epochs: epoch_N.pth to continue from, best_….pth with weights alone."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcface.recipe import Checkpoints
from shared.checkpoint import Position
from shared.files import write_atomic

log = logging.getLogger(__name__)

Weights = Callable[[], dict[str, Tensor]]
_NUMBER = re.compile(r"epoch_(\d+)\.pth$")


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

    def state_dict(self) -> dict[str, Any]:
        """The figures."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        vars(self).update(state)


class EpochFiles:
    """epoch_N.pth and best_retrieval_<metric>_epoch_N.pth in a run directory; rank 0 alone."""

    def __init__(self, run_dir: Path, last: str, rules: Checkpoints, epochs: int) -> None:
        self._dir, self._last, self._rules, self._epochs = run_dir, last, rules, epochs

    def settle(self, position: Position, record: Record, weights: Weights) -> bool:
        """Put the files in accord with the checkpoint that the run begins from.

        What a later epoch of an abandoned continuation left gets the suffix .old. A kill between a
        checkpoint and the best file of its epoch is made good. Returns whether the best file is
        lost, so that every rank can forget it.
        """
        missing = bool(record.best_epoch) and not self._best_path(record).exists()
        if missing and record.best_epoch == position.epoch and position.batch == 0:
            self._write_best(record, weights)
            missing = False
        for path in self._dir.glob("*epoch_*.pth"):
            is_best, epoch = path.name.startswith("best_"), _epoch_of(path)
            if epoch > position.epoch or (is_best and epoch != record.best_epoch):
                path.replace(path.with_name(f"{path.name}.old"))
        if missing:
            log.warning("%s is gone: the next best starts anew", self._best_path(record))
        return missing

    def epoch_done(self, epoch: int, record: Record, weights: Weights) -> None:
        """Write what `epoch` (from 1) leaves, after its checkpoint is on the disk."""
        interval = self._rules.interval
        try:
            if interval and (epoch % interval == 0 or epoch == self._epochs):
                _duplicate(self._dir / self._last, self._dir / f"epoch_{epoch}.pth")
                self._prune()
            if record.best_epoch == epoch:
                self._write_best(record, weights)
        except OSError as error:  # the checkpoint itself is whole
            log.warning("the files of epoch %d were not written: %s", epoch, error)

    def all(self) -> list[Path]:
        """The files that are there, oldest epoch first."""
        return sorted(self._dir.glob("*epoch_*.pth"), key=lambda path: (_epoch_of(path), path))

    def _best_path(self, record: Record) -> Path:
        return self._dir / f"best_retrieval_{self._rules.best}_epoch_{record.best_epoch}.pth"

    def _write_best(self, record: Record, weights: Weights) -> None:
        path = self._best_path(record)
        meta = {"epoch": record.best_epoch, "metrics": record.best}
        state = {"state_dict": weights(), "meta": meta}
        write_atomic(path, lambda stream: torch.save(state, stream))
        for older in self._dir.glob("best_retrieval_*_epoch_*.pth"):
            if older != path:
                older.unlink()
        log.info("best %s so far: %s", self._rules.best, path.name)

    def _prune(self) -> None:
        epochs = [path for path in self.all() if not path.name.startswith("best_")]
        for path in epochs[: -self._rules.keep] if self._rules.keep else ():
            path.unlink()


def _epoch_of(path: Path) -> int:
    found = _NUMBER.search(path.name)
    return int(found[1]) if found else 0


def _duplicate(source: Path, target: Path) -> None:
    """Give the file a second name; it is replaced whole, never changed, so both stay."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
