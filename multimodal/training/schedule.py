"""The three stages: epochs, sources, what of the model each trains, orders of batches, rates.

Everything here follows from numbers that a resumed run has again, so nothing of it is stored.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from multimodal.datasets import Source, Sources, Task
from multimodal.training.losses import Learner
from shared import distributed
from shared.distributed import World
from shared.errors import UserError
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


# --- the stages of a run --------------------------------------------------------------------------

log = logging.getLogger(__name__)

UNIMODAL, ALIGNMENT, FINE_TUNING = range(3)
_TOWERS = ("model.image.", "model.text.", "model.audio.")
# What a stage leaves as it is. The words of texts come from pretrained weights, not from stage 1.
_FROZEN = {
    UNIMODAL: ("model.text.", "model.logit_"),
    ALIGNMENT: ("model.fusion.", "model.classifier.", "keyword_head.", "mel_head."),
    FINE_TUNING: (),
}


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its epochs, what it learns from, batches an epoch."""

    span: Span
    sources: tuple[Source, ...]
    steps: int

    @property
    def work(self) -> list[tuple[Source, Task]]:
        """The sources with what they are for."""
        tasks = [(source, source.task(self.span.stage)) for source in self.sources]
        return [(source, task) for source, task in tasks if task]

    @property
    def total_steps(self) -> int:
        """Of all its epochs."""
        return self.steps * (self.span.end - self.span.first)


def plan(
    sources: Sources,
    epochs: int,
    shares: Sequence[float],
    batch_size: int,
    accumulation: int,
    world: World,
) -> list[Stage]:
    """The stages that have epochs and data. Sources without one whole batch are left out.

    Raises UserError when none is left.
    """
    rows = batch_size * accumulation * world.size
    enough = [source for source in sources.found if source.steps(rows)]
    for source in sources.found:
        if source not in enough:
            why = (
                f"{len(source.training)} samples are too few for one step: {world.size} "
                f"process(es) x batch {batch_size} x accumulation {accumulation}"
            )
            log.warning("%s is left out: %s", source.name, why)
            sources.notes.append({"data_set": source.name, "left_out": why})
    if not enough:
        raise UserError(
            f"no data set has {rows} samples, which one step takes: lower --batch-size, "
            "--gradient-accumulation-steps or --nproc"
        )
    by_stage = [
        tuple(source for source in enough if source.task(stage)) for stage in range(len(STAGES))
    ]
    for stage, own in enumerate(by_stage):
        if not own:
            log.warning("stage %s is left out: no data set is for it", STAGES[stage])
    found = spans(epochs, shares, [bool(one) for one in by_stage])
    return [
        Stage(span, own, sum(source.steps(rows) for source in own))
        for span in found
        for own in (by_stage[span.stage],)
    ]


def enter(stage: Stage, learner: Learner, world: World) -> nn.Module:
    """Freeze what the stage leaves as it is; the learner, under DDP for several processes."""
    frozen = _FROZEN[stage.span.stage]
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
        parameter.grad = None
    gc.collect()  # the DDP of the stage before, whose hooks would see this one's gradients
    # a batch brings two of three modalities: the third tower has no part in it
    return distributed.wrap(learner, world, find_unused_parameters=True)


def optimizer_for(learner: Learner, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW for all stages: towers apart from the rest, gains and biases without weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        key = (name.startswith(_TOWERS), parameter.ndim >= 2)
        groups.setdefault(key, []).append(parameter)
    given: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "is_tower": is_tower,
        }
        for (is_tower, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(given, lr=lr, betas=(0.9, 0.98), eps=1e-6)


def set_rate(
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    epoch: int,
    batch: int,
    *,
    peak: float,
    warmup: float,
    towers: float,
) -> float:
    """Set the learning rate of a batch of an epoch; the rate without the towers' factor.

    towers: their factor in the last stage.
    """
    step = (epoch - stage.span.first) * stage.steps + batch
    rate = learning_rate(peak, step, stage.total_steps, warmup)
    for group in optimizer.param_groups:
        slowed = group["is_tower"] and stage.span.stage == FINE_TUNING
        group["lr"] = rate * towers if slowed else rate
    return rate
