"""A classifier measured: over all ranks, every picture once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    criterion: nn.Module | None = None,
) -> Measured:
    """`net` on all ranks' batches, which may differ in number: only sums are exchanged."""
    net.eval()
    sums = torch.zeros(_NUM * _NUM + 1, dtype=torch.float64, device=world.device)
    for images, labels in batches:
        labels = labels.to(world.device)
        logits = net(images.to(world.device, non_blocking=True)).float()
        pairs = labels * _NUM + logits.argmax(1)
        sums[:-1] += torch.bincount(pairs, minlength=_NUM * _NUM)
        if criterion is not None:
            sums[-1] += criterion(logits, labels).double() * len(labels)
    *cells, loss = distributed.total(sums, world).tolist()
    counts = [[int(cells[row * _NUM + column]) for column in range(_NUM)] for row in range(_NUM)]
    seen = sum(map(sum, counts))
    return Measured(counts, loss / seen if criterion is not None and seen else math.nan)
