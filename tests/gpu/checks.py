"""What is asked of a recipe's step in half precision, on any device."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from shared.amp import Amp
from tests.gpu.cases import MAKERS, Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FINDING = 8  # first steps in which fp16 may look for its scale
_SCALE = 64.0  # of one step in fp16, at which nothing overflows
# Times the dtype's spacing at 1: of a loss, and of the length of all gradients together, whose
# roundings add up over the layers. A wrong sum or scale is off by far more.
LOSS, GRADIENTS = 8, 64


def gradients(case: Case, amp: Amp) -> tuple[float, Tensor]:
    """The loss of a step, and all its gradients as one float32 vector."""
    state = amp.state_dict()
    if state["scaler"]:
        amp.load_state_dict(state | {"scaler": state["scaler"] | {"scale": _SCALE}})
    with amp.autocast():
        loss = case.loss()
    amp.backward(loss)
    scale = _SCALE if state["scaler"] else 1.0
    found = [p.grad.float().flatten() / scale for p in case.trained if p.grad is not None]
    case.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), torch.cat(found)


def departures(name: str, mode: str, device: torch.device, folder: Path) -> tuple[float, float]:
    """How far loss and gradients in `mode` are from float32, relative, in spacings of the dtype."""
    torch.manual_seed(0)
    case = MAKERS[name](device, folder, tiny=True)
    loss, exact = gradients(case, Amp("off", device))
    half_loss, half = gradients(case, Amp(mode, device))
    spacing = torch.finfo(DTYPES[mode]).eps
    apart = abs(half_loss - loss) / abs(loss)
    turned = float((half - exact).norm() / exact.norm())
    return apart / spacing, turned / spacing


def skipped(name: str, mode: str, device: torch.device, folder: Path, steps: int) -> list[int]:
    """The steps, from 0, that were not applied because their gradients were not finite."""
    torch.manual_seed(0)
    case = MAKERS[name](device, folder, tiny=True)
    case = replace(case, clip_norm=1.0)
    amp, found = Amp(mode, device), []
    for number in range(steps):
        loss = case.step(amp)
        if amp.state_dict()["bad_steps"] or not math.isfinite(float(loss)):
            found.append(number)
    return found
