"""What a training step and its sums need: precision, clipping, bad steps, means, early stopping."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from shared import distributed
from shared.distributed import World
from shared.errors import UserError

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradients that are not finite."""


class Amp:
    """Autocast and loss scaling for `mode` off, bf16, fp16 or auto, and the step that goes with it.

    auto: bf16 where the device computes in it, else fp16 on CUDA, else off. fp16 needs CUDA.
    Its state (the loss scale and the count of bad steps) belongs into checkpoints.
    """

    def __init__(self, mode: str, device: torch.device, *, max_bad_steps: int = 10) -> None:
        self.mode = _resolve(mode, device)
        self._device_type = device.type
        self._max_bad_steps = max_bad_steps
        self._bad_steps = 0
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.mode == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for the forward pass."""
        dtype = torch.bfloat16 if self.mode == "bf16" else torch.float16
        return torch.autocast(self._device_type, dtype=dtype, enabled=self.mode != "off")

    def full_precision(self) -> AbstractContextManager[Any]:
        """The context for what stays float32 inside `autocast`; `.float()` alone does not help."""
        return torch.autocast(self._device_type, enabled=False)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this loss, a scalar (a micro-batch of an accumulated step)."""
        self._scaler.scale(loss).backward()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        *,
        clip_norm: float = float("inf"),
        sharded: tuple[torch.optim.Optimizer, World] | None = None,
    ) -> float:
        """Clip, step, clear the gradients; the gradients' norm before clipping.

        sharded: the optimizer of parameters that differ from rank to rank (class centres), and the
        ranks. It takes the same step, and the norm is that of all gradients of all ranks.
        A step whose gradients are not finite is not applied; `max_bad_steps` of them in a row raise
        NonFiniteError. Under DDP the gradients, hence the decision, are the same on every rank.
        """
        optimizers = [optimizer] if sharded is None else [optimizer, sharded[0]]
        for each in optimizers:
            self._scaler.unscale_(each)
        norm = self._clip(parameters, clip_norm, sharded)
        finite = norm == norm and norm != float("inf")
        for each in optimizers:
            # in fp16 the scaler itself leaves out a bad step, and lowers its scale; of sharded
            # gradients each rank's scaler sees its own alone, so there the common norm decides
            if finite or (self.mode == "fp16" and each is optimizer):
                self._scaler.step(each)
        self._scaler.update()
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        self._count(finite)
        return norm

    @staticmethod
    def _clip(
        parameters: Iterable[nn.Parameter],
        clip_norm: float,
        sharded: tuple[torch.optim.Optimizer, World] | None,
    ) -> float:
        """Shorten the gradients to `clip_norm`; their norm before."""
        clipped = [parameter for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in clipped if p.grad is not None])
        if sharded is not None:
            own = [p for group in sharded[0].param_groups for p in group["params"]]
            for parameter in own:  # the same number on every rank
                norm = torch.hypot(norm, distributed.norm(parameter.grad, sharded[1]).to(norm))
            clipped += [parameter for parameter in own if parameter.grad is not None]
        nn.utils.clip_grads_with_norm_(clipped, clip_norm, norm)
        return float(norm)

    def _count(self, finite: bool) -> None:
        self._bad_steps = 0 if finite else self._bad_steps + 1
        if self._bad_steps == 1 and self.mode != "fp16":  # fp16 finds its scale by such steps
            log.warning("gradients are not finite: this step is not applied")
        if self._bad_steps >= self._max_bad_steps:
            raise NonFiniteError(
                f"loss or gradients were not finite for {self._bad_steps} steps in a row; the last "
                "checkpoint is from before. Lower --lr, look at the data, or use --amp off"
            )

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state and the count of bad steps."""
        return {"scaler": self._scaler.state_dict(), "bad_steps": self._bad_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._scaler.load_state_dict(state["scaler"])
        self._bad_steps = state["bad_steps"]


def _resolve(mode: str, device: torch.device) -> str:
    if mode == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        return "off"
    if mode == "fp16" and device.type != "cuda":
        raise UserError("--amp fp16 needs a GPU; allowed on the CPU: off, bf16")
    return mode


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
