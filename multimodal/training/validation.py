"""What held-out samples say: the loss of each source, and how often pairs find each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multimodal.datasets import Batch, Source, Task
from multimodal.pairs.batches import held_out, in_order, labels_of, on_device, with_hidden_parts
from multimodal.training.losses import Learner, LossOptions, loss_of
from shared import distributed
from shared.amp import Amp
from shared.distributed import World

if TYPE_CHECKING:
    from shared.run import Run

MOST_PAIRS = 1000  # of a source, for the recall at 1: the whole of COCO's 5,000 takes minutes
_ALONE = World()  # a validation batch is whole on one process


def losses(
    learner: Learner,
    work: Sequence[tuple[Source, Task]],
    rows: int,
    options: LossOptions,
    world: World,
    amp: Amp,
    run: Run | None = None,
) -> dict[str, float]:
    """The mean validation loss of each source by name, of those that have held-out samples.

    rows: of a validation batch; contrastive losses can be compared for equal ones alone. run: may
    be stopped meanwhile.
    """
    found: dict[str, float] = {}
    learner.eval()
    for source, task in work:
        if source.validation is None:
            continue
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch in _watched(run, source, held_out(source, rows, world, 0), rows):
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
    run: Run | None = None,
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
        batches = in_order(source, range(pairs), rows, world.device, 0)
        features = [
            _features(learner, batch, task, world, amp)
            for batch in _watched(run, source, batches, rows)
        ]
        one, other = (torch.cat(parts) for parts in zip(*features, strict=True))
        found[source.name] = {
            "R@1": _found_first(one, other),
            "chance": 1 / pairs,
            "pairs": float(pairs),
        }
    learner.train()
    return found


def _watched(
    run: Run | None, source: Source, batches: Iterable[Batch], rows: int
) -> Iterable[Batch]:
    assert source.validation is not None
    total = -(-len(source.validation) // rows)
    return run.watched(batches, f"validation of {source.name}: batch", total) if run else batches


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
