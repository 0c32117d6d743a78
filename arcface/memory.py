"""How much memory a training takes, reckoned from its configuration before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from arcface import config_options, config_reader
from arcface.encoders import Encoder, build_encoder
from arcface.pipeline import build_pipeline
from arcface.recipe import Recipe
from arcface.recipe_reader import KNOWN, read_recipe
from shared import class_centres, estimate
from shared.estimate import MemoryPlan

_LEVELS = {"bf16": torch.bfloat16, "fp16": torch.float16, "auto": torch.bfloat16}
_MOMENTS = {"SGD": 1, "AdamW": 2}


def recipe_of(config: str, options: tuple[str, ...], cwd: Path) -> Recipe:
    """What the configuration file asks for, under the options; its data need not be there.

    Raises UserError for anything not understood.
    """
    configuration = config_reader.read_config(config_reader.find_config(config, cwd))
    configuration, _ = config_options.with_options(configuration, options, known=KNOWN)
    return read_recipe(configuration, cwd)[0]


def text(recipe: Recipe, amp: str, processes: int, cwd: Path, *, failed: bool = False) -> str:
    """The plan for one of `processes`, whether it fits on the GPUs here, and what saves most.

    failed: the memory did not suffice, whatever the figures say: the advice stands there anyway.
    """
    plan, devices = reckon(recipe, amp, processes, cwd), estimate.device_memory()
    advice = plan.advised(_alternatives(recipe, amp, processes, cwd))
    if failed:
        return plan.text(devices) + "\nwhat helps most: " + "; ".join(advice)
    return plan.text(devices, advice)


def reckon(recipe: Recipe, amp: str, processes: int, cwd: Path) -> MemoryPlan:
    """What takes memory in each of `processes`."""
    batch = recipe.train.batch_size
    height, width = _size(recipe)

    def build() -> Encoder:
        return build_encoder(recipe.encoder, "random", cwd).train()

    def forward(encoder: Encoder) -> Any:
        device = next(encoder.parameters()).device
        return encoder(torch.empty((batch, 3, height, width), device=device))

    encoder, moments = estimate.on_meta(build), _moments(recipe)
    if level := _LEVELS.get(amp):
        kept = estimate.saved_bytes_in_half(build, forward, level)
    else:
        kept = estimate.saved_bytes(encoder, lambda: forward(encoder))
    gradients = estimate.gradient_bytes(encoder.parameters())
    number = f"{estimate.count(encoder) / 1e6:.1f} M parameters"
    plan = MemoryPlan(f"arcface: {batch} pictures a process of {height} x {width}, amp {amp}")
    plan.add("encoder", estimate.parameter_bytes(encoder), f"{number} in float32")
    plan.add("its gradients", gradients, "as large as its parameters")
    plan.add(f"its {recipe.optimizer.kind}", moments * gradients, f"{moments} moment(s) of each")
    _add_head(plan, recipe, processes, moments)
    plan.add("for the backward pass", kept, "activations of the encoder")
    plan.add("pictures", 4 * batch * 3 * height * width, "one batch in float32")
    if torch.cuda.is_available():
        plan.add("CUDA", estimate.CUDA_CONTEXT, "context, kernels, workspaces")
    return plan


def _size(recipe: Recipe) -> tuple[int, int]:
    """Height and width of the pictures that the encoder gets."""
    name = f"{recipe.train.name}.dataset.pipeline"
    pipeline = build_pipeline(recipe.train.dataset.get("pipeline"), name)
    return pipeline.height, pipeline.width


def _moments(recipe: Recipe) -> int:
    kind = recipe.optimizer.kind
    return 0 if kind == "SGD" and not recipe.optimizer.options.get("momentum") else _MOMENTS[kind]


def _add_head(plan: MemoryPlan, recipe: Recipe, processes: int, moments: int) -> None:
    head = recipe.head
    parts = class_centres.bytes_per_rank(
        head.num_classes,
        head.in_channels,
        processes if head.is_separate else 1,
        recipe.train.batch_size,
        sub_centres=head.sub_centres,
        sample_rate=head.sample_rate,
        moments=moments,
    )
    shared_out = f", shared out over {processes}" if head.is_separate else ""
    plan.add("head", sum(parts.values()), f"centres of {head.num_classes:,} items{shared_out}")


def _alternatives(recipe: Recipe, amp: str, processes: int, cwd: Path) -> dict[str, MemoryPlan]:
    """The plan under each setting that may save memory, as it would be typed."""
    half = max(1, recipe.train.batch_size // 2)
    smaller = replace(recipe, train=replace(recipe.train, batch_size=half))
    sharded = replace(recipe, head=replace(recipe.head, shard=True))
    sampled = replace(recipe, head=replace(recipe.head, shard=True, sample_rate=0.1))
    changes: dict[str, Callable[[], MemoryPlan]] = {
        f"--cfg-options train_dataloader.batch_size={half}": lambda: reckon(
            smaller, amp, processes, cwd
        ),
        "--amp bf16": lambda: reckon(recipe, "bf16", processes, cwd),
        "--cfg-options model.head.shard=True": lambda: reckon(sharded, amp, processes, cwd),
        "--cfg-options model.head.sample_rate=0.1": lambda: reckon(sampled, amp, processes, cwd),
    }
    return {setting: change() for setting, change in changes.items()}
