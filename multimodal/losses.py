"""Losses over pairs and over labels.

Pairs: rows i of `one` and `other` belong together, every other row of the global batch is a
negative. The features have unit norm; `scale` is the inverse temperature, the model's own and
learnable. Legend: b rows of this process, W processes, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from shared.distributed import World, gather_with_grad


def info_nce(
    one: Tensor, other: Tensor, scale: Tensor, world: World, *, local: bool = False
) -> Tensor:
    """The mean cross-entropy of finding each row's partner among W·b, both ways; a scalar.

    one, other: (b, D). With `local` each process scores its own rows against all (b × W·b scores
    in place of W·b × W·b); averaged over the processes, value and gradients are the same.
    ln(W·b) is the value at chance. Source: Radford et al. 2021 (arXiv:2103.00020), figure 3.
    """
    all_one, all_other = gather_with_grad(one, world), gather_with_grad(other, world)
    if local:
        forth, back = scale * one @ all_other.T, scale * other @ all_one.T
        truth = world.rank * len(one) + torch.arange(len(one), device=one.device)
    else:
        forth = scale * all_one @ all_other.T
        back = forth.T
        truth = torch.arange(len(all_one), device=one.device)
    return (functional.cross_entropy(forth, truth) + functional.cross_entropy(back, truth)) / 2


def sigmoid(one: Tensor, other: Tensor, scale: Tensor, bias: Tensor, world: World) -> Tensor:
    """Every pair of the global batch judged alone: partners or not; summed, over W·b; a scalar.

    Each process judges its own rows of `one` with all of `other`; the mean over the processes is
    the loss of the whole batch. Source: Zhai et al. 2023 (arXiv:2303.15343), algorithm 1.
    """
    scores = scale * one @ gather_with_grad(other, world).T + bias
    partners = torch.full_like(scores, -1.0)
    partners[:, world.rank * len(one) : (world.rank + 1) * len(one)].fill_diagonal_(1.0)
    return -functional.logsigmoid(partners * scores).sum() / len(one)


def multi_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the classes and averaged over rows; a scalar.

    logits: (b, C). labels: (b, C), 1 where a class is there. A mean over 80 classes, most of which
    are absent, would leave gradients so small that Adam's epsilon stifles them.
    """
    exact = logits.float() if logits.dtype.itemsize < 4 else logits
    each = functional.binary_cross_entropy_with_logits(
        exact, labels.to(exact.dtype), reduction="none"
    )
    return each.sum(dim=1).mean()
