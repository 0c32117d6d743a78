"""Unit rows and a softmax cross entropy over columns that lie on several ranks, sparing memory.

torch.distributed.nn.functional has differentiable collectives, but they are deprecated; here the
gradient is written down, and no collective runs in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.distributed import World


def unit_rows(rows: Tensor) -> Tensor:
    """Each row of `rows` (R, D) at length 1, of which alone the backward pass keeps a copy."""
    return _UnitRows.apply(rows)  # type: ignore[return-value]


def softmax_loss(logits: Tensor, columns: Tensor, counts: Tensor, world: World) -> Tensor:
    """Mean cross entropy of logits whose columns lie on several ranks; the same on every rank.

    logits: (N, own columns). columns: (N,) the target's own column, -1 where another rank has it.
    counts: (N,) whether the row enters the mean; the same on every rank.
    Two all_reduces of N and 2 · N numbers. Each rank's logits get their gradient of the one loss.
    """
    return _SoftmaxLoss.apply(logits, columns, counts, world)  # type: ignore[return-value]


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


class _SoftmaxLoss(torch.autograd.Function):
    """See softmax_loss. The loss comes from sums, not from the target's share, which may be 0."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, columns: Tensor, counts: Tensor, world: World
    ) -> Tensor:
        index, here = columns.clamp_min(0)[:, None], columns >= 0
        highest = _reduced(logits.amax(1), dist.ReduceOp.MAX, world)[:, None]
        shares = logits - highest
        target = shares.gather(1, index)[:, 0].where(here, 0.0)
        shares.exp_()
        sums = _reduced(torch.stack([shares.sum(1), target]), dist.ReduceOp.SUM, world)
        shares /= sums[0, :, None]
        weights = counts.to(logits.dtype) / counts.sum().clamp_min(1)
        ctx.save_for_backward(shares, index, here, weights)
        return ((sums[0].log() - sums[1]) * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        shares, index, here, weights = ctx.saved_tensors
        weights = (weights * gradient)[:, None]
        to_logits = shares * weights
        return to_logits.scatter_add_(1, index, -weights * here[:, None]), None, None, None


def _reduced(values: Tensor, operation: Any, world: World) -> Tensor:
    if world.size > 1:
        dist.all_reduce(values, op=operation)
    return values
