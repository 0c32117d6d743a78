"""What rank 0 tells the world about a run: metrics.jsonl, TensorBoard, status.json, progress."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.checkpoint import Position
from shared.device import memory_in_use
from shared.files import cut_json_lines
from shared.progress import Progress
from shared.status import Status, finite

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


@dataclass(frozen=True)
class Plan:
    """What a run is going to do."""

    total_steps: int
    samples_per_step: int = 0  # over all processes, for the throughput
    lines: bool = True  # progress lines in logs; False where the recipe writes its own
    data: Mapping[str, Any] = field(default_factory=dict)  # counts of what is trained on


class Reporter:
    """The sinks of one run, from `start` on; what was recorded after it is cut away.

    board: TensorBoard's directory.
    """

    def __init__(self, run_dir: Path, board: Path, status: Status, plan: Plan,
                 start: Position) -> None:  # fmt: skip
        self._plan, self._status = plan, status
        self._metrics = Metrics(run_dir / "metrics.jsonl", board, start)
        self._progress = Progress(
            plan.total_steps, start.step, plan.samples_per_step, lines=plan.lines
        )
        status.fields |= {"total_steps": plan.total_steps, "data": dict(plan.data), "reason": None}
        self.write_status(start)

    def record(self, position: Position, split: str, numbers: dict[str, float]) -> None:
        """Write `numbers` of a step everywhere; NaN is written as null."""
        speed = {"steps_per_s": round(self._progress.speed(position.step), 4)}
        if self._plan.samples_per_step:
            speed["samples_per_s"] = round(speed["steps_per_s"] * self._plan.samples_per_step, 2)
        extra = speed if split == "train" else {}
        self._metrics.log(position.step, position.epoch, split, finite(numbers | extra))
        if split == "train":
            self._progress.show(position.step, position.epoch, numbers)
        self._status.fields["best" if split == "best" else "last"] |= finite(numbers)
        self.tick(position)

    def tick(self, position: Position) -> None:
        """Write the status again if it is old."""
        if self._status.is_due:
            self.write_status(position)

    def write_status(self, position: Position, **changes: Any) -> None:
        """Write the status now, with `changes` to its fields."""
        eta = self._progress.eta_s(position.step)
        place = {**asdict(position), "eta_s": eta, "memory_bytes": memory_in_use(), "doing": None}
        self._status.write(**place, **changes)

    def close(self) -> None:
        """Flush and close."""
        self._metrics.close()
        self._progress.close()
