"""Additive angular margins: what turns cosines into the logits of ArcFace's kind of softmax.

B batch, C classes. Callers keep autocast off and float32 or float64: bfloat16 holds three digits of
a cosine, which at a scale of 64 moves a logit by a quarter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.errors import UserError


def add_margin(cosines: Tensor, margins: Tensor | float, *, easy: bool = False) -> Tensor:
    """cos(θ + m) for `cosines` = cos θ of any shape, continued where it would rise again.

    margins: radians, 0 ≤ m < π/2, one for all or one each. Beyond θ = π - m, where the cosine would
    reward a larger angle, the value is cos θ - m·sin m and so falls up to π. `easy` moves only
    embeddings within a right angle of their centre (cos θ > 0) and leaves the others as they are.
    cos(θ + m) = cos θ·cos m - sin θ·sin m needs no arccos; sin θ has a floor of the square root of
    the machine epsilon, below which its gradient is 0, so value and gradient stay finite where an
    embedding meets its centre or its opposite.
    Source: Deng et al. 2019, ArcFace, eq. 3 and the authors' implementation (arXiv:1801.07698).
    """
    margins = torch.as_tensor(margins, dtype=cosines.dtype, device=cosines.device)
    floor = torch.finfo(cosines.dtype).eps
    sines = ((1.0 - cosines) * (1.0 + cosines)).clamp_min(floor).sqrt()
    moved = cosines * margins.cos() - sines * margins.sin()
    if easy:
        return torch.where(cosines > 0, moved, cosines)
    return torch.where(cosines > -margins.cos(), moved, cosines - margins * margins.sin())


def margin_logits_(
    cosines: Tensor, columns: Tensor, margins: Tensor, scale: float, *, easy: bool = False
) -> Tensor:
    """`cosines` (B, C) with the margin at each row's own column, times `scale`; changed in place.

    columns: (B,), -1 for a row whose class has no column here. margins: (B,), each row's.
    Only B of the B·C values see the margin's formula, and the backward pass keeps no more.
    """
    return _MarginLogits.apply(cosines, columns, margins, scale, easy)  # type: ignore[return-value]


class _MarginLogits(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, cosines: Tensor, columns: Tensor, margins: Tensor, scale: float, easy: bool
    ) -> Tensor:
        index, here = columns.clamp_min(0)[:, None], columns[:, None] >= 0
        with torch.enable_grad():
            own = cosines.detach().gather(1, index).requires_grad_()
            moved = add_margin(own, margins[:, None], easy=easy).where(here, own)
            (slope,) = torch.autograd.grad(moved.sum(), own)
        ctx.mark_dirty(cosines)
        ctx.save_for_backward(index, slope)
        ctx.scale = scale
        return cosines.scatter_(1, index, moved.detach()).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        index, slope = ctx.saved_tensors
        to_cosines = gradient * ctx.scale
        own = to_cosines.gather(1, index) * slope
        return to_cosines.scatter_(1, index, own), None, None, None, None


def adaptive_margins(
    counts: Tensor, low: float = 0.05, high: float = 0.5, power: float = -0.25
) -> Tensor:
    """A margin for every class, the wider the fewer its samples; (C,) float32, radians.

    counts: (C,) samples of each class, all positive. The powers n^p are laid linearly over `low` to
    `high`; when all classes are equally frequent each gets `high`.
    Raises UserError for a class without samples.
    Source: Ha et al. 2020, Google Landmark Recognition, section 2.3 (arXiv:2010.05350).
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if bool((counts <= 0).any()):
        raise UserError(
            f"class {int((counts <= 0).nonzero()[0, 0])} has no samples, so no adaptive margin: "
            "leave the class out, or give one margin for all"
        )
    weights = counts.pow(power)
    least, most = weights.min(), weights.max()
    if least == most:
        return torch.full((len(counts),), high)
    return (low + (high - low) * (weights - least) / (most - least)).float()


def check_margins(scale: float, margins: Tensor) -> None:
    """Raise ValueError unless `scale` > 0 and every margin lies in 0 ≤ m < π/2."""
    if not scale > 0 or not bool(((margins >= 0) & (margins < math.pi / 2)).all()):
        raise ValueError(
            f"the scale must be above 0 and margins 0 <= m < pi/2, got scale {scale}, margins "
            f"{margins.min():.4g} to {margins.max():.4g}"
        )
