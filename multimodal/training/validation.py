"""What held-out samples say: the loss of each source, and how often pairs find each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multimodal.datasets import Batch, Source, Task
from multimodal.pairs.batches import held_out, in_order, labels_of, on_device, with_hidden_parts
from multimodal.training.losses import Learner, LossOptions, loss_of
from shared import distributed, retrieval
from shared.distributed import World
from shared.precision import Amp
from shared.retrieval import Positives

MOST_PAIRS = 1000  # of a source, for the recall at 1: the whole of COCO's 5,000 takes minutes
_ALONE = World()  # a validation batch is whole on one process


def losses(
    learner: Learner,
    work: Sequence[tuple[Source, Task]],
    rows: int,
    options: LossOptions,
    world: World,
    amp: Amp,
    workers: int = 0,
) -> dict[str, float]:
    """The mean validation loss of each source by name, of those that have held-out samples.

    rows: of a validation batch; contrastive losses can be compared for equal ones alone.
    """
    found: dict[str, float] = {}
    learner.eval()
    for source, task in work:
        if source.validation is None:
            continue
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch in held_out(source, rows, world, workers):
            labels = labels_of(batch, world.device)
            if task.target == "spectrogram":
                batch = with_hidden_parts(batch, 0, _ALONE, torch.Generator().manual_seed(0))
            outputs = _outputs(learner, batch, task, world, amp)
            loss, _ = loss_of(task, outputs, labels, options, _ALONE)
            count = len(next(iter(batch.values())))
            sums += torch.stack([loss.double() * count, torch.full_like(loss, count).double()])
        total, count = distributed.total(sums, world).tolist()
        if count:
            found[source.name] = total / count
    learner.train()
    return found


def recall_at_1(
    learner: Learner,
    sources: Iterable[Source],
    rows: int,
    world: World,
    amp: Amp,
    workers: int = 0,
) -> dict[str, dict[str, float]]:
    """How often the nearest of all held-out partners is the own one, both ways, by source.

    Of at most 1,000 pairs each: {"R@1": mean of both ways, "chance": 1 / pairs, "pairs": pairs}.
    """
    found: dict[str, dict[str, float]] = {}
    learner.eval()
    for source in sources:
        task = source.task(1)
        if source.validation is None or task is None:
            continue
        pairs = min(len(source.validation), MOST_PAIRS)
        features = [
            _features(learner, batch, task, world, amp)
            for batch in in_order(source, range(pairs), rows, world.device, workers)
        ]
        one, other = (torch.cat(parts) for parts in zip(*features, strict=True))
        found[source.name] = {
            "R@1": _found_first(one, other),
            "chance": 1 / pairs,
            "pairs": float(pairs),
        }
    learner.train()
    return found


@torch.no_grad()
def _outputs(
    learner: Learner, batch: Batch, task: Task, world: World, amp: Amp
) -> dict[str, Tensor]:
    with amp.autocast():
        return learner(on_device(batch, world.device), task)


def _features(
    learner: Learner, batch: Batch, task: Task, world: World, amp: Amp
) -> tuple[Tensor, Tensor]:
    batch.pop("labels", None)
    outputs = _outputs(learner, batch, task, world, amp)
    one, other = (outputs[f"{name}_features"] for name in task.modalities)
    return one, other


def _found_first(one: Tensor, other: Tensor) -> float:
    """The share of rows whose own partner is the nearest, the mean of both ways."""
    scores = one @ other.T
    truth = torch.arange(len(one), device=one.device)
    hits = [(scores.argmax(dim=way) == truth).double().mean() for way in (0, 1)]
    return float(sum(hits) / 2)


# --- figures of an evaluation ---------------------------------------------------------------------

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
