"""Stopping when a reduced value no longer falls; the same decision on every rank."""

from __future__ import annotations

import logging
import math
from typing import Any

log = logging.getLogger(__name__)


def has_stalled(best_epoch: int, epoch: int, patience: int | None) -> bool:
    """Whether the last `patience` of `epoch` epochs brought nothing better than `best_epoch`.

    Epochs count from 1, 0 is none; without a patience nothing stalls. For recipes that keep the
    best epoch among their results, which makes the decision the same on every rank and after a
    resume.
    """
    stalled = patience is not None and epoch - best_epoch >= patience
    if stalled:
        log.info("nothing better for %d epoch(s), after epoch %d: training ends", patience, epoch)
    return stalled


class EarlyStopping:
    """Counts updates without a new lowest value.

    Give it values that are already the same on every rank (`distributed.mean`), and all ranks stop
    in the same epoch. NaN and infinity are no improvement.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.reset()

    def reset(self) -> None:
        """Forget best value and count: the monitored loss is another from here on."""
        self.best = math.inf
        self.bad = 0

    def update(self, value: float) -> bool:
        """Whether `value` is the lowest so far."""
        finite = math.isfinite(value)
        if not finite:
            log.warning("the monitored value is %s: counted as no improvement", value)
        if finite and value < self.best:
            self.best, self.bad = value, 0
            return True
        self.bad += 1
        return False

    @property
    def should_stop(self) -> bool:
        """Whether `patience` updates in a row brought nothing."""
        return self.bad >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Best value and count."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.best, self.bad = state["best"], state["bad"]
