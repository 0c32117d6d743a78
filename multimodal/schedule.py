"""When what happens: epochs of the stages, the order of the sources' batches, learning rates.

Everything here follows from numbers that a resumed run has again, so nothing of it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.seed import derive

STAGES = ("unimodal", "alignment", "fine-tuning")


@dataclass(frozen=True)
class Span:
    """The epochs of one stage, numbered through all stages from 0: first, …, end - 1."""

    stage: int  # from 0, of STAGES
    first: int
    end: int

    @property
    def name(self) -> str:
        """The stage's name."""
        return STAGES[self.stage]


def spans(epochs: int, shares: Sequence[float], has_work: Sequence[bool]) -> list[Span]:
    """The stages that have epochs, one after another; `epochs` in all.

    shares: how much of the epochs each stage gets, in any unit. A stage without work gets none,
    and the others share its epochs.
    """
    weights = [share if work else 0.0 for share, work in zip(shares, has_work, strict=True)]
    found, first = [], 0
    for stage, count in enumerate(apportion(epochs, weights)):
        if count:
            found.append(Span(stage, first, first + count))
            first += count
    return found


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` as whole numbers in proportion to `weights`, by largest remainders.

    Raises ValueError when no weight is above 0.
    """
    whole = sum(weights)
    if whole <= 0:
        raise ValueError("no weight is above 0")
    exact = [total * weight / whole for weight in weights]
    counts = [math.floor(value) for value in exact]
    by_rest = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_rest[: total - sum(counts)]:
        counts[index] += 1
    return counts


def steps_of_sources(steps: Sequence[int], balance: float) -> list[int]:
    """How many batches of an epoch come from each source; their sum is that of `steps`.

    steps: whole batches that each source holds. balance: 1 takes each source once, 0 all sources
    equally often; between them small sources come more often than once. None is left out.
    """
    counts = apportion(sum(steps), [count**balance for count in steps])
    for source, count in enumerate(counts):
        if count == 0:
            counts[counts.index(max(counts))] -= 1
            counts[source] = 1
    return counts


def order_of(counts: Sequence[int], *numbers: int) -> list[int]:
    """Which source each batch of an epoch comes from: a shuffle seeded by `numbers`.

    All processes draw the same, so every step has one modality on all of them.
    """
    cards = [source for source, count in enumerate(counts) for _ in range(count)]
    generator = torch.Generator().manual_seed(derive(*numbers))
    return [cards[i] for i in torch.randperm(len(cards), generator=generator).tolist()]


def learning_rate(peak: float, step: int, total: int, warmup: float) -> float:
    """The rate of `step` (from 0) of a stage of `total`: a straight rise, then half a cosine.

    warmup: the share of the steps that rise.
    """
    rising = max(1, round(warmup * total))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
