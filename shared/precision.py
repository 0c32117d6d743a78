"""Mixed precision, gradient clipping and the guard against non-finite steps, in one call."""

from __future__ import annotations

import logging
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
