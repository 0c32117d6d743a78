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
FIRST_SCALE = 65_536.0  # GradScaler's
LOSS = 8  # times the dtype's spacing at 1


def most_turned(name: str, mode: str) -> float:
    """The largest relative difference of the gradients from float32's that rounding explains.

    Some spacings of the dtype, for roundings add up over the layers. Where ReLUs and a max-pool
    decide which way a gradient goes (arcface), some follow the other way: that share goes with the
    square root. A wrong sum or scale is off by 1 or more.
    """
    spacing = torch.finfo(DTYPES[mode]).eps
    return 6 * math.sqrt(spacing) if name == "arcface" else 16 * spacing


def gradients(case: Case, amp: Amp) -> tuple[float, Tensor]:
    """The loss of a step, and all its gradients as one float32 vector.

    In fp16 with the largest loss scale at which they are finite, as the scaler finds it.
    """
    state = amp.state_dict()
    scale = FIRST_SCALE if state["scaler"] else 1.0
    while True:
        if state["scaler"]:
            amp.load_state_dict(state | {"scaler": state["scaler"] | {"scale": scale}})
        with amp.autocast():
            loss = case.loss()
        amp.backward(loss)
        grads = [p.grad.float().flatten() for p in case.trained if p.grad is not None]
        case.optimizer.zero_grad(set_to_none=True)
        found = torch.cat(grads) / scale
        if not state["scaler"] or bool(found.isfinite().all()) or scale < 1:
            return float(loss.detach()), found
        scale /= 2


def departures(name: str, mode: str, device: torch.device, folder: Path) -> tuple[float, float]:
    """How far loss and gradients in `mode` are from float32's, relative.

    The loss in spacings of the dtype, the gradients as a share of `most_turned`.
    """
    torch.manual_seed(0)
    case = MAKERS[name](device, folder, tiny=True)
    loss, exact = gradients(case, Amp("off", device))
    half_loss, half = gradients(case, Amp(mode, device))
    spacing = torch.finfo(DTYPES[mode]).eps
    apart = abs(half_loss - loss) / abs(loss)
    turned = float((half - exact).norm() / exact.norm())
    return apart / spacing, turned / most_turned(name, mode)


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
