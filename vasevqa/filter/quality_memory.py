"""--estimate: the memory of one step of model.py's training, its tensors without values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from shared import memory
from shared.distributed import World
from vasevqa.filter.quality_net import ImageQualityNet
from vasevqa.filter.quality_training import Learner

if TYPE_CHECKING:
    from vasevqa.filter.model import Config

_DOCUMENTED_GB = 8  # what the recipe's document asks for


def text(cfg: Config, processes: int) -> str:
    """The table for one of `processes`, the document's figure beside it, and what would help."""
    half = max(1, cfg.batch_size // 2)
    others = {f"--batch_size {half}": plan(replace(cfg, batch_size=half), processes)}
    if cfg.run.amp == "off":
        others["--amp bf16"] = plan(_with_amp(cfg, "bf16"), processes)
    said = memory.report(plan(cfg, processes), others)
    return f"{said}\nthe document's figure: at least {_DOCUMENTED_GB} GB"


def plan(cfg: Config, processes: int) -> memory.Plan:
    """What one of `processes` holds at the peak of a step."""
    batch = max(1, cfg.batch_size // processes)
    with memory.counted() as live:
        net = ImageQualityNet(arch=cfg.arch)
        half = _with_amp(cfg, memory.mode_of(cfg.run.amp))
        learner = Learner(half, net, torch.ones(2), World())
        images = torch.empty(batch, 3, cfg.image_size, cfg.image_size)
        labels = torch.zeros(batch, dtype=torch.long)
        live.begin(net, learner.optimizer)
        learner.step(images, labels)
    title = f"{cfg.arch}, {batch} pictures of {cfg.image_size} pixels a process, amp {cfg.run.amp}"
    return live.plan(
        title, "pictures, and all that is kept of them", wrapped=net, processes=processes
    )


def _with_amp(cfg: Config, amp: str) -> Config:
    return replace(cfg, run=replace(cfg.run, amp=amp))
