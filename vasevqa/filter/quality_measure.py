"""A classifier measured: over all ranks, every picture once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shared import distributed
from shared.distributed import World

_NUM = 2  # classes


@dataclass(frozen=True)
class Measured:
    """confusion[true][predicted]: numbers of pictures. loss: the mean, NaN when not asked for."""

    confusion: list[list[int]]
    loss: float = math.nan

    @property
    def count(self) -> int:
        """Pictures measured on."""
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """The share of pictures whose class is right."""
        right = sum(self.confusion[label][label] for label in range(_NUM))
        return right / self.count if self.count else 0.0

    @property
    def majority(self) -> float:
        """The accuracy of naming the most frequent class for every picture."""
        return max(map(sum, self.confusion)) / self.count if self.count else 0.0

    def report(self) -> list[dict[str, float]]:
        """precision, recall, f1 and support of each class; 0 where nothing is counted."""
        rows = []
        for label in range(_NUM):
            right = self.confusion[label][label]
            support = sum(self.confusion[label])
            called = sum(row[label] for row in self.confusion)
            precision = right / called if called else 0.0
            recall = right / support if support else 0.0
            both = precision + recall
            f1 = 2 * precision * recall / both if both else 0.0
            rows.append({"precision": precision, "recall": recall, "f1": f1, "support": support})
        return rows


@torch.no_grad()
def measure(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
    class_weights: Tensor | None = None,
) -> Measured:
    """`net` on all ranks' batches, which may differ in number: only sums are exchanged.

    batches: images (B, 3, S, S) and labels (B,). class_weights: (classes,), what a picture of each
    label counts in the loss, which without them is not taken.
    """
    net.eval()
    cells = torch.zeros(_NUM * _NUM, dtype=torch.float64, device=world.device)
    losses = torch.zeros(2, dtype=torch.float64, device=world.device)  # weighted sum, weights
    for images, labels in batches:
        labels = labels.to(world.device)
        logits = net(images.to(world.device, non_blocking=True)).float()
        cells += torch.bincount(labels * _NUM + logits.argmax(1), minlength=_NUM * _NUM)
        if class_weights is not None:
            losses[0] += cross_entropy(logits, labels, class_weights, reduction="sum")
            losses[1] += class_weights[labels].sum()
    *counts, loss, weight = distributed.total(torch.cat([cells, losses]), world).tolist()
    table = [[int(counts[row * _NUM + column]) for column in range(_NUM)] for row in range(_NUM)]
    return Measured(table, loss / weight if weight else math.nan)
