"""Numbers for people and programs: metrics.jsonl always, TensorBoard where it can be written."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import distributed
from shared.checkpoint import Position
from shared.distributed import World
from shared.files import cut_json_lines

log = logging.getLogger(__name__)


class Metrics:
    """Writes one JSON line and one TensorBoard scalar a tag and step.

    On a resume at `start` both are cut back to it, so that nothing stands there twice. In the
    middle of an epoch that is all but the training rows of its last step: validation comes again.
    """

    def __init__(self, path: Path, tensorboard: Path | None, start: Position) -> None:
        cut_json_lines(path, lambda row: _is_before(row, start))
        self._lines = path.open("a", encoding="utf-8", buffering=1)  # each line reaches the system
        self._board: Any = _open_board(tensorboard, start.step) if tensorboard else None
        self._is_losing = False

    def log(self, step: int, epoch: int, split: str, values: dict[str, float | None]) -> None:
        """Record `values` ({tag: number, None for NaN}) at an optimizer step."""
        row = {
            "step": step,
            "epoch": epoch,
            "split": split,
            "time": round(time.time(), 3),
            **values,
        }
        self._draw(values, step)
        try:
            self._lines.write(json.dumps(row) + "\n")
        except OSError as error:
            if not self._is_losing:
                log.warning("metrics from step %d on are not written: %s", step, error)
            self._is_losing = True
            return
        if self._is_losing:
            log.info("metrics are written again, from step %d on", step)
        self._is_losing = False

    def _draw(self, values: dict[str, float | None], step: int) -> None:
        try:
            for tag, value in values.items() if self._board else ():
                self._board.add_scalar(tag, float("nan") if value is None else value, step)
        except OSError as error:  # its writing thread has ended for good
            log.warning("no TensorBoard from step %d on (%s); see metrics.jsonl", step, error)
            self._board = None

    def close(self) -> None:
        """Flush and close both."""
        for sink in (self._lines, self._board):
            try:
                if sink:
                    sink.close()
            except OSError as error:
                log.warning("metrics could not be closed: %s", error)


class Mean:
    """A running weighted mean over all ranks, of sums that stay on the device until they are read.

    Fits into checkpoints: before a save every rank takes an equal share of the sums.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.reset()

    def reset(self) -> None:
        """Forget what was added."""
        # weighted values, weights
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._world.device)

    def add(self, value: Tensor, weight: int = 1) -> None:
        """Add a scalar tensor that stands for `weight` samples."""
        self._sums[0] += value.detach().double() * weight
        self._sums[1] += weight

    def value(self) -> float:
        """The mean over all ranks; NaN of nothing. A collective."""
        sums = distributed.total(self._sums, self._world)
        return float(sums[0] / sums[1])

    def collect(self) -> None:
        """Take an equal share of all ranks' sums: rank 0's state is saved for all. A collective."""
        self._sums = distributed.mean(self._sums, self._world)

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"sums": self._sums.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._sums = state["sums"].to(self._world.device)


def _is_before(row: dict[str, Any], start: Position) -> bool:
    step = row.get("step", 0)
    return step < start.step or (
        step == start.step and (row.get("split") == "train" or start.batch == 0)
    )


def _open_board(directory: Path, start_step: int) -> Any:
    """A SummaryWriter, or None with a warning: a run does not fail for its charts."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(directory), purge_step=start_step + 1 if start_step else None)
    except (ImportError, OSError) as error:
        log.warning("no TensorBoard in %s (%s); metrics.jsonl has every number", directory, error)
        return None
