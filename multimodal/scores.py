"""Figures of an evaluation: retrieval both ways with several captions, and multi-label mAP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared import retrieval
from shared.distributed import World
from shared.retrieval import Positives

RECALL_AT = (1, 5, 10)
MAP_AT = (10,)


@dataclass(frozen=True)
class Direction:
    """One way of a retrieval. metrics: R@1, R@5, R@10, mAP@10 in [0, 1], and R@1 by chance."""

    name: str
    metrics: dict[str, float]
    queries: int
    gallery: int


def both_ways(
    names: tuple[str, str], items: Tensor, captions: Tensor, owners: Sequence[int]
) -> list[Direction]:
    """Items find their captions, and captions their item.

    items: (N, D), captions: (M, D), rows of unit norm. owners: (M,) the item of each caption.
    R@k counts a query as found when at least one of what belongs to it is among its k nearest, as
    clip_benchmark does. mAP@k divides by all that belong to it.
    """
    item, caption = names
    of_items = [list[int]() for _ in range(len(items))]
    for place, owner in enumerate(owners):
        of_items[owner].append(place)
    there = _search(items, captions, Positives.listed(of_items, len(captions)))
    back = _search(captions, items, Positives.listed([[o] for o in owners], len(items)))
    share = len(captions) / len(items) / len(captions)
    return [
        Direction(f"{item} to {caption}", there | {"chance": share}, len(items), len(captions)),
        Direction(f"{caption} to {item}", back | {"chance": 1 / len(items)}, len(captions),
                  len(items)),
    ]  # fmt: skip


def same_group(
    names: tuple[str, str], rows: Tensor, others: Tensor, groups: Sequence[str]
) -> list[Direction]:
    """Rows find others of their group and back: (N, D) each, row i of both belongs to groups[i]."""
    positives = Positives.same_id(groups, groups)
    chance = float(positives.counts().double().mean()) / len(rows)
    return [
        Direction(f"{one} to {other}", _search(a, b, positives) | {"chance": chance},
                  len(a), len(b))
        for (one, a), (other, b) in (
            ((names[0], rows), (names[1], others)),
            ((names[1], others), (names[0], rows)),
        )
    ]  # fmt: skip


def _search(queries: Tensor, gallery: Tensor, positives: Positives) -> dict[str, float]:
    found = retrieval.evaluate(
        queries, gallery, positives, World(), recall_at=RECALL_AT, map_at=MAP_AT
    ).metrics
    wanted = {f"Recall@{k}": f"R@{k}" for k in RECALL_AT} | {f"mAP@{k}": f"mAP@{k}" for k in MAP_AT}
    return {short: found[name] for name, short in wanted.items()}


def mean_average_precision(scores: Tensor, labels: Tensor) -> tuple[float, int]:
    """Mean over the labels that occur of the average precision, and how many labels these are.

    scores: (N, C), higher is surer. labels: (N, C), 1 where the item has the label. Average
    precision is the precision at each threshold times the gain in recall there, summed; items of
    equal score share a threshold.
    """
    occurring = labels.bool().any(0)
    columns = occurring.nonzero().flatten().tolist()
    values = [_average_precision(scores[:, c], labels[:, c].bool()) for c in columns]
    return (sum(values) / len(values) if values else 0.0), len(values)


def _average_precision(scores: Tensor, positive: Tensor) -> float:
    order = scores.argsort(descending=True)
    ordered, hits = scores[order], positive[order].double().cumsum(0)
    last = torch.ones_like(positive)  # of the items of equal score
    last[:-1] = ordered[:-1] != ordered[1:]
    hits, ranks = hits[last], last.nonzero().flatten().double() + 1
    gains = hits.diff(prepend=hits.new_zeros(1)) / hits[-1]
    return float((gains * hits / ranks).sum())
