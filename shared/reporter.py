"""What rank 0 tells the world about a run: metrics.jsonl, TensorBoard, status.json, progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.checkpoint import Position
from shared.device import memory_in_use
from shared.metrics import Metrics
from shared.progress import Progress
from shared.status import Status, finite


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
