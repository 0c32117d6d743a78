"""What stage 1 counts over an epoch, and its best validation; both belong into checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lavic.src.captions import Step
from shared import distributed
from shared.distributed import World


class Tally:
    """Sums over the samples of an epoch that this process has seen."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Begin an epoch."""
        self._nll = torch.zeros((), dtype=torch.float64, device=self._device)
        self._labels = self.seen = self.left_out = 0.0

    def add(self, nll: Tensor, step: Step) -> None:
        """Count a step whose labels' losses sum up to `nll` here, a scalar; the device goes on."""
        self._nll += nll
        self._labels += step.num_labels
        self.left_out += len(step.left_out)
        self.seen += len(step.left_out) + sum(len(batch.tokens) for batch in step.batches)

    def share(self, world: World) -> None:
        """Let every process hold an equal share: rank 0's is saved for all."""
        self._set(distributed.mean(self._all(), world))

    def conclude(self, world: World) -> tuple[float, int, int]:
        """(mean loss of a token, samples seen, samples left out) over all processes; resets."""
        nll, labels, seen, left_out = distributed.total(self._all(), world).tolist()
        self.reset()
        return nll / labels if labels else math.nan, round(seen), round(left_out)

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"sums": self._all().cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._set(state["sums"].to(self._device))

    def _all(self) -> Tensor:
        counts = [self._labels, self.seen, self.left_out]
        rest = torch.tensor(counts, dtype=torch.float64, device=self._device)
        return torch.cat([self._nll[None], rest])

    def _set(self, sums: Tensor) -> None:
        self._nll = sums[0].clone()
        self._labels, self.seen, self.left_out = sums[1:].tolist()


class Best:
    """The lowest validation loss so far, its epoch from 1, and the loss before the training."""

    def __init__(self) -> None:
        self.loss, self.epoch = math.inf, 0
        self.before: float | None = None

    def update(self, loss: float, epoch: int) -> bool:
        """Whether `loss` is lower than all before it; NaN never is."""
        improved = loss < self.loss
        if improved:
            self.loss, self.epoch = loss, epoch
        return improved

    @property
    def result(self) -> dict[str, Any] | None:
        """For status.json; None where nothing was measured before the training."""
        if self.before is None or not self.epoch:
            return None
        found = {"name": "val_loss", "before": self.before, "after": self.loss}
        return found | {"higher_is_better": False}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"loss": self.loss, "epoch": self.epoch, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.loss, self.epoch, self.before = state["loss"], state["epoch"], state["before"]
