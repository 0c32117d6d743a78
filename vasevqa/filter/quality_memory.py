"""How much memory model.py takes, reckoned before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from shared import estimate
from shared.estimate import MemoryPlan
from vasevqa.filter.quality_net import ImageQualityNet

if TYPE_CHECKING:
    from vasevqa.filter.model import Config

_DOCUMENTED_GB = 8  # what the recipe's document asks for


def plan(cfg: Config, processes: int) -> str:
    """The plan in words, with the document's figure beside it and what would help."""
    own = reckon(cfg, processes)
    others = {
        f"--batch_size {cfg.batch_size // 2}": reckon(
            replace(cfg, batch_size=max(1, cfg.batch_size // 2)), processes
        ),
        "--amp bf16": reckon(replace(cfg, run=replace(cfg.run, amp="bf16")), processes),
    }
    text = own.text(estimate.device_memory(), own.advised(others))
    return f"{text}\nthe document's figure: at least {_DOCUMENTED_GB} GB"


def reckon(cfg: Config, processes: int) -> MemoryPlan:
    """What one process's device holds during a step."""
    net = estimate.on_meta(lambda: ImageQualityNet(arch=cfg.arch))
    batch = max(1, cfg.batch_size // processes)
    found = MemoryPlan(f"{cfg.arch}, {batch} pictures of {cfg.image_size} pixels a process")
    found.add("weights", estimate.parameter_bytes(net), f"{estimate.count(net):,} parameters")
    trained: Sequence[torch.Tensor] = list(net.parameters())
    found.add("gradients", estimate.gradient_bytes(trained), "one float32 a parameter")
    found.add("Adam", estimate.adamw_bytes(trained), "two float32 moments of each parameter")
    kept = _activations(cfg, net, (batch, 3, cfg.image_size, cfg.image_size))
    found.add("activations", kept, "what the backward pass needs of the forward pass")
    found.add("CUDA", estimate.CUDA_CONTEXT, "context, kernels, libraries")
    return found


def _activations(cfg: Config, net: ImageQualityNet, shape: tuple[int, ...]) -> int:
    if cfg.run.amp == "off":
        images = torch.empty(shape, device="meta")
        return estimate.saved_bytes(net, lambda: net(images))
    dtype = torch.float16 if cfg.run.amp == "fp16" else torch.bfloat16
    build = lambda: ImageQualityNet(arch=cfg.arch)  # noqa: E731
    return estimate.saved_bytes_in_half(build, lambda made: made(torch.empty(shape)), dtype)
