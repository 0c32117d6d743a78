"""--estimate: the memory of steps of the last stage, their tensors without values.

That stage trains every part of the model. Each kind of pair has its step; the largest counts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from multimodal import grad_cache, stages
from multimodal.audio import FRAMES_PER_SECOND
from multimodal.batches import split
from multimodal.learner import Batch, Learner, LossOptions, Task, loss_of
from multimodal.model import CONTEXT, MEL_BINS, MODALITIES, SIZES, create_model
from multimodal.samples import NUM_LABELS
from shared import memory
from shared.distributed import World
from shared.precision import Amp

if TYPE_CHECKING:
    from multimodal.grad_cache import Outputs
    from multimodal.run_training import Config

LIMITS_GB = {"tiny": 4, "small": 8, "base": 12, "large": 20}  # the documented minimum
_TASKS = {
    "coco": Task("coco", ("image", "text"), True, "classes"),
    "clotho": Task("clotho", ("audio", "text"), True, "keywords"),
    "audiocaps": Task("audiocaps", ("audio", "text"), True),
    "voxceleb": Task("voxceleb", ("image", "audio"), True),
}
_DIFFERENT = ("coco", "clotho", "voxceleb")  # AudioCaps' steps are Clotho's without keywords


def text(cfg: Config, processes: int) -> str:
    """The table for one of `processes`, whether it fits on the GPUs here, and what saves most."""
    steps = [replace(cfg, datasets=(name,)) for name in cfg.datasets or _DIFFERENT]
    plans = [plan(step, processes) for step in steps]
    largest = max(range(len(steps)), key=lambda number: plans[number].total)
    others = {
        name: plan(other, processes)
        for name, other in _smaller(steps[largest]).items()
        if other != steps[largest]
    }
    said = memory.report(plans[largest], others)
    limit = LIMITS_GB.get(cfg.model_size)
    return said if limit is None else f"{said}\nthe documented minimum is {limit} GB"


def _smaller(cfg: Config) -> dict[str, Config]:
    """Settings that may save memory, as they would be typed."""
    half = max(1, cfg.batch_size // 2)
    return {
        f"--batch-size {half}": replace(cfg, batch_size=half),
        "--use-checkpoint": replace(cfg, use_checkpoint=True),
        "--amp bf16": replace(cfg, use_amp=True),
        "--model-size tiny": replace(cfg, model_size="tiny"),
    }


def plan(cfg: Config, processes: int) -> memory.Plan:
    """What one of `processes` holds at the peak of the largest step."""
    with memory.counted() as live:
        model = create_model(
            cfg.model_size,
            num_classes=NUM_LABELS,
            embed_dim=cfg.embed_dim,
            use_checkpoint=cfg.use_checkpoint,
            attention=cfg.attention,
            dropout=cfg.dropout,
            activation=cfg.activation,
        )
        learner = Learner(model, NUM_LABELS, cfg.loss)
        optimizer = stages.optimizer_for(learner, cfg)
        amp = Amp(memory.mode_of(cfg.amp), memory.CPU)
        live.begin(learner, optimizer)
        for name in cfg.datasets or _DIFFERENT:
            _backward(cfg, learner, _TASKS[name], amp)
            amp.step(optimizer, learner.parameters(), clip_norm=cfg.clip_norm)
    precision = "float32" if cfg.amp == "off" else "half precision"
    title = f"multimodal, {cfg.model_size}, batch {cfg.batch_size}, {precision}"
    recomputed = ", recomputed" * cfg.use_checkpoint
    return live.plan(
        title,
        f"samples, and all that is kept of them{recomputed}",
        wrapped=learner,
        processes=processes,
    )


def _backward(cfg: Config, learner: Learner, task: Task, amp: Amp) -> None:
    """The gradients of a step of this task."""
    options = LossOptions(cfg.loss, cfg.local_loss, cfg.label_weight)
    chunks = split(_batch(cfg, task), cfg.batch_size, task, memory.CPU)[:2]  # the others are alike
    rows = len(chunks) * cfg.batch_size
    labels = torch.empty(rows, NUM_LABELS) if task.target else None

    def loss(outputs: Outputs) -> torch.Tensor:
        return loss_of(task, outputs, labels, options, World())[0]

    grad_cache.backward(learner, chunks, loss, amp)


def _batch(cfg: Config, task: Task) -> Batch:
    """The samples of a step, as the loader gives them."""
    rows, side = cfg.step_rows, SIZES[cfg.model_size].image_size
    frames = round(cfg.clip_seconds * FRAMES_PER_SECOND)
    batch: Batch = {}
    if "image" in task.modalities:
        batch["images"] = torch.empty(rows, 3, side, side)
    if "text" in task.modalities:
        batch["input_ids"] = torch.empty(rows, CONTEXT, dtype=torch.long)
        batch["attention_mask"] = torch.empty(rows, CONTEXT, dtype=torch.bool)
    if "audio" in task.modalities:
        batch["audio"] = torch.empty(rows, frames, MEL_BINS)
        batch["audio_mask"] = torch.empty(rows, frames, dtype=torch.bool)
    if task.target:
        batch["modality_mask"] = torch.empty(rows, len(MODALITIES), dtype=torch.bool)
    return batch
