"""The three stages: which epochs and sources each has, what of the model it trains, how fast."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multimodal.batches import steps_of
from multimodal.learner import Learner, Task
from multimodal.pair_sources import Source, Sources
from multimodal.schedule import STAGES, Span, learning_rate, spans
from shared import distributed
from shared.distributed import World
from shared.errors import UserError

if TYPE_CHECKING:
    from multimodal.run_training import Config

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


def plan(cfg: Config, sources: Sources, world: World) -> list[Stage]:
    """The stages that have epochs and data. Sources without one whole batch are left out.

    Raises UserError when none is left.
    """
    enough = [source for source in sources.found if steps_of(source, cfg.step_rows, world)]
    for source in sources.found:
        if source not in enough:
            why = (
                f"{len(source.training)} samples are too few for one step: {world.size} "
                f"process(es) x batch {cfg.batch_size} x accumulation "
                f"{cfg.gradient_accumulation_steps}"
            )
            log.warning("%s is left out: %s", source.name, why)
            sources.notes.append({"data_set": source.name, "left_out": why})
    if not enough:
        raise UserError(
            f"no data set has {cfg.step_rows * world.size} samples, which one step takes: lower "
            "--batch-size, --gradient-accumulation-steps or --nproc"
        )
    by_stage = [
        tuple(source for source in enough if source.task(stage)) for stage in range(len(STAGES))
    ]
    found = []
    for span in spans(cfg.epochs, cfg.shares, [bool(one) for one in by_stage]):
        own = by_stage[span.stage]
        found.append(Stage(span, own, sum(steps_of(s, cfg.step_rows, world) for s in own)))
    for stage, own in enumerate(by_stage):
        if not own:
            log.warning("stage %s is left out: no data set is for it", STAGES[stage])
    return found


def enter(stage: Stage, learner: Learner, world: World) -> nn.Module:
    """Freeze what the stage leaves as it is; the learner, under DDP for several processes."""
    frozen = _FROZEN[stage.span.stage]
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
        parameter.grad = None
    gc.collect()  # the DDP of the stage before, whose hooks would see this one's gradients
    # a batch brings two of three modalities: the third tower has no part in it
    return distributed.wrap(learner, world, find_unused_parameters=True)


def optimizer_for(learner: Learner, cfg: Config) -> torch.optim.AdamW:
    """AdamW for all stages: towers apart from the rest, gains and biases without weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        key = (name.startswith(_TOWERS), parameter.ndim >= 2)
        groups.setdefault(key, []).append(parameter)
    given: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": cfg.weight_decay if decays else 0.0,
            "is_tower": is_tower,
        }
        for (is_tower, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(given, lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6)


def set_rate(
    optimizer: torch.optim.Optimizer, cfg: Config, stage: Stage, epoch: int, batch: int
) -> float:
    """Set the learning rate of a batch of an epoch; the rate without the towers' factor."""
    step = (epoch - stage.span.first) * stage.steps + batch
    rate = learning_rate(cfg.lr, step, stage.total_steps, cfg.warmup)
    for group in optimizer.param_groups:
        slowed = group["is_tower"] and stage.span.stage == FINE_TUNING
        group["lr"] = rate * cfg.tower_lr if slowed else rate
    return rate


def left(stages: Sequence[Stage], epoch: int) -> list[Stage]:
    """The stages that are not over at `epoch`."""
    return [stage for stage in stages if stage.span.end > epoch]
