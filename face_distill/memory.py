"""How much memory a distillation takes, reckoned from its settings before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from face_distill.distill.model import FaceStudent, adapter_layers
from shared import class_centres, estimate
from shared.estimate import MemoryPlan
from shared.files import read_json

if TYPE_CHECKING:
    from face_distill.train_distill import Config

_IMAGES = 12_000  # of teacher_features_12k: no more identities than images
_LEVELS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def text(cfg: Config, processes: int, *, failed: bool = False) -> str:
    """The plan for one of `processes`, whether it fits on the GPUs here, and what saves most.

    failed: the memory did not suffice, whatever the figures say: the advice stands there anyway.
    """
    plan, devices = reckon(cfg, processes), estimate.device_memory()
    advice = plan.advised(_alternatives(cfg, processes))
    if failed:
        return plan.text(devices) + "\nwhat helps most: " + "; ".join(advice)
    return plan.text(devices, advice)


def reckon(cfg: Config, processes: int) -> MemoryPlan:
    """What takes memory in each of `processes`."""
    batch = max(1, cfg.batch_size // processes)
    student = estimate.on_meta(_builder(cfg))
    size, width = student.image_size, student.embedding_dim
    trained = [p for p in student.parameters() if p.requires_grad]
    plan = MemoryPlan(
        f"face_distill: {batch} images a process of {size} x {size}, {cfg.adapter_layers}, "
        f"amp {cfg.run.amp}"
    )
    frozen = estimate.count(student) - estimate.count(trained)
    plan.add(
        "weights", estimate.parameter_bytes(student), f"{frozen / 1e6:.1f} M frozen in float32"
    )
    plan.add(
        "adapters' training",
        estimate.gradient_bytes(trained) * (2 if processes > 1 else 1)
        + estimate.adamw_bytes(trained),
        f"{estimate.count(trained) / 1e6:.2f} M parameters: gradients and AdamW's moments",
    )
    _add_head(plan, cfg, batch, width)
    plan.add("for the backward pass", *_kept(cfg, batch))
    plan.add("images", batch * 3 * size * size * 4, "one batch in float32")
    if torch.cuda.is_available() or cfg.run.device.startswith("cuda"):
        plan.add("CUDA", estimate.CUDA_CONTEXT, "context, kernels, workspaces")
    return plan


def _builder(cfg: Config) -> Callable[[], FaceStudent]:
    """Makes the student without its head, wherever tensors are made when it is called."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    written: Any = read_json(Path(cfg.blip_path) / "config.json")
    vision = written.get("vision_config", written) if isinstance(written, dict) else {}
    # without a file: transformers' defaults are those of the tower that download_weight.py fetches
    config = Blip2VisionConfig.from_dict(vision)

    def build() -> FaceStudent:
        tower = Blip2VisionModel(config).requires_grad_(False).eval()
        layers = adapter_layers(len(tower.encoder.layers), cfg.adapter_layers)
        return FaceStudent(
            tower, layers, image_size=cfg.image_size, checkpointing=cfg.gradient_checkpointing
        )

    return build


def _kept(cfg: Config, batch: int) -> tuple[int, str]:
    """Bytes kept from the forward pass to the backward pass, and how they were found."""
    if cfg.gradient_checkpointing:
        inputs = _saved(cfg, batch)
        activations = _saved(replace(cfg, gradient_checkpointing=False), batch)
        layers = estimate.on_meta(_builder(cfg)).vit.encoder.layers
        with_gradient = len(layers) - adapter_layers(len(layers), cfg.adapter_layers)[0]
        return inputs + activations // with_gradient, "the layers' inputs, one layer's activations"
    return _saved(cfg, batch), "activations from the first adapter on"


def _saved(cfg: Config, batch: int) -> int:
    def forward(student: FaceStudent) -> Any:
        size = student.image_size
        return student(torch.empty((batch, 3, size, size), device=student.vit.device))

    level = _LEVELS.get("bf16" if cfg.run.amp == "auto" else cfg.run.amp)
    if level:
        return estimate.saved_bytes_in_half(_builder(cfg), forward, level)
    student = estimate.on_meta(_builder(cfg))
    return estimate.saved_bytes(student, lambda: forward(student))


def _add_head(plan: MemoryPlan, cfg: Config, batch: int, width: int) -> None:
    known = cfg.num_classes != "auto"
    classes = int(cfg.num_classes) if known else _IMAGES
    parts = class_centres.bytes_per_rank(classes, width, 1, batch, moments=2)
    how = f"{classes:,} identities{'' if known else ' at most'}, with AdamW"
    plan.add("ArcFace head", sum(parts.values()), how)


def _alternatives(cfg: Config, processes: int) -> dict[str, MemoryPlan]:
    """The plan under each setting that may save memory, as it would be typed."""
    changes: dict[str, Callable[[], Config]] = {}
    half = cfg.batch_size // 2
    if half >= processes:
        changes[f"--batch-size {half}"] = lambda: replace(cfg, batch_size=half)
    if not cfg.gradient_checkpointing:
        changes["--gradient-checkpointing"] = lambda: replace(cfg, gradient_checkpointing=True)
    if cfg.run.amp == "off":
        changes["--amp bf16"] = lambda: replace(cfg, run=replace(cfg.run, amp="bf16"))
    if cfg.adapter_layers.startswith("spread:"):
        last = "last:" + cfg.adapter_layers.partition(":")[2]
        changes[f"--adapter-layers {last}"] = lambda: replace(cfg, adapter_layers=last)
    if cfg.image_size is None:
        changes["--image-size 112"] = lambda: replace(cfg, image_size=112)
    found: dict[str, MemoryPlan] = {}
    for setting, change in changes.items():
        try:
            found[setting] = reckon(change(), processes)
        except Exception:  # a setting that does not suit this tower is no advice
            continue
    return found
