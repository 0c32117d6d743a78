"""What a run remembers of itself for its report, through every resume."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import torch

from multimodal.schedule import Span


class History:
    """Rows of the report's table of stages, and the recalls before training. Plain values alone."""

    def __init__(self) -> None:
        self.before: dict[str, dict[str, float]] = {}
        self._stages: dict[str, dict[str, Any]] = {}
        self._since = time.monotonic()

    @property
    def stages(self) -> list[dict[str, Any]]:
        """One row a stage."""
        return list(self._stages.values())

    def add_epoch(
        self, span: Span, steps: int, rows: int, train_loss: float, val_loss: float, chance: float
    ) -> None:
        """Add an epoch of `steps` steps of `rows` samples each, the seconds since the last one."""
        seconds = time.monotonic() - self._since
        self._since = time.monotonic()
        row = self._stages.setdefault(
            span.name, {"stage": span.name, "epochs": 0, "steps": 0, "seconds": 0.0}
        )
        row["epochs"] += 1
        row["steps"] += steps
        row["seconds"] = round(row["seconds"] + seconds, 2)
        row["samples_per_s"] = round(rows * row["steps"] / max(row["seconds"], 1e-9), 2)
        row["peak_memory_gb"] = round(_peak_memory() / 1e9, 3)
        row["train_loss"], row["val_loss"] = _finite(train_loss), _finite(val_loss)
        row["contrast_at_chance"] = _finite(chance)
        best = row.get("best_val_loss")
        if row["val_loss"] is not None and (best is None or row["val_loss"] < best):
            row |= {"best_val_loss": row["val_loss"], "best_epoch": span.first + row["epochs"]}

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"before": self.before, "stages": self._stages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; the time in between does not count."""
        self.before, self._stages = state["before"], state["stages"]
        self._since = time.monotonic()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
