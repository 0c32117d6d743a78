"""Additive angular margins: what turns cosines into logits of ArcFace's softmax, and its loss.

B batch, C classes. Callers keep autocast off and float32 or float64: bfloat16 holds three digits of
a cosine, which at a scale of 64 moves a logit by a quarter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.distributed import World
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


def unit_rows(rows: Tensor) -> Tensor:
    """Each row of `rows` (R, D) at length 1, of which alone the backward pass keeps a copy."""
    return _UnitRows.apply(rows)  # type: ignore[return-value]


class _UnitRows(torch.autograd.Function):
    """functional.normalize, whose own backward pass would need three more tensors of that size."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # type: ignore[override]
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)
        units = rows / lengths
        ctx.save_for_backward(units, lengths)
        return units

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        units, lengths = ctx.saved_tensors
        along = torch.linalg.vecdot(units, gradient)[:, None]
        return torch.addcmul(gradient, units, along, value=-1).div_(lengths)


def softmax_loss(logits: Tensor, columns: Tensor, world: World) -> Tensor:
    """Mean cross entropy of logits (N, own columns) whose columns are on several ranks.

    columns: (N,) the target's own column, -1 where another rank has it. The same on every rank: two
    all_reduces of N and 2 · N numbers, none in the backward pass, where each rank's logits get
    their gradient of the one loss.
    """
    return _SoftmaxLoss.apply(logits, columns, world)  # type: ignore[return-value]


class _SoftmaxLoss(torch.autograd.Function):
    """See softmax_loss. The loss comes from sums, not from the target's share, which may be 0."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, world: World) -> Tensor:  # type: ignore[override]
        index, here = columns.clamp_min(0)[:, None], columns >= 0
        highest = _reduced(logits.amax(1), dist.ReduceOp.MAX, world)[:, None]
        shares = logits - highest
        target = shares.gather(1, index)[:, 0].where(here, 0.0)
        shares.exp_()
        sums = _reduced(torch.stack([shares.sum(1), target]), dist.ReduceOp.SUM, world)
        shares /= sums[0, :, None]
        ctx.save_for_backward(shares, index, here)
        return (sums[0].log() - sums[1]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        shares, index, here = ctx.saved_tensors
        weight = gradient / len(shares)
        return (shares * weight).scatter_add_(1, index, -weight * here[:, None]), None, None


def _reduced(values: Tensor, operation: Any, world: World) -> Tensor:
    if world.size > 1:
        dist.all_reduce(values, op=operation)
    return values


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
