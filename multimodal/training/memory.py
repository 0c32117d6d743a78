"""--estimate: the memory of steps of the last stage, their tensors without values.

That stage trains every part of the model. Each kind of pair has its step; the largest counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from multimodal.datasets import Batch, Task
from multimodal.model import CONTEXT, MEL_BINS, MODALITIES, SIZES, create_model
from multimodal.pairs.audio import FRAMES_PER_SECOND
from multimodal.pairs.batches import split
from multimodal.pairs.samples import NUM_LABELS
from multimodal.pairs.sources import DATA_SETS
from multimodal.training import grad_cache, schedule
from multimodal.training.losses import Learner, LossOptions, loss_of
from multimodal.training.settings_file import MINIMUM_GB
from shared import memory
from shared.amp import Amp
from shared.distributed import World

if TYPE_CHECKING:
    from multimodal.training.grad_cache import Outputs

_DIFFERENT = ("coco", "clotho", "voxceleb")  # AudioCaps' steps are Clotho's without keywords


@dataclass(frozen=True)
class Step:
    """What decides about the memory of a step. model: create_model's arguments."""

    model: Mapping[str, Any]
    batch_size: int
    accumulation: int
    clip_seconds: float
    datasets: tuple[str, ...]
    losses: LossOptions
    amp: str  # off, auto, bf16 or fp16


def text(step: Step, processes: int) -> str:
    """The table for one of `processes`, whether it fits on the GPUs here, and what saves most."""
    steps = [replace(step, datasets=(name,)) for name in step.datasets or _DIFFERENT]
    plans = [plan(one, processes) for one in steps]
    largest = max(range(len(steps)), key=lambda number: plans[number].total)
    others = {
        name: plan(other, processes)
        for name, other in _smaller(steps[largest]).items()
        if other != steps[largest]
    }
    said = memory.report(plans[largest], others)
    limit = MINIMUM_GB.get(step.model["size"])
    return said if limit is None else f"{said}\nthe documented minimum is {limit} GB"


def _smaller(step: Step) -> dict[str, Step]:
    """Settings that may save memory, as they would be typed."""
    half = max(1, step.batch_size // 2)
    return {
        f"--batch-size {half}": replace(step, batch_size=half),
        "--use-checkpoint": replace(step, model={**step.model, "use_checkpoint": True}),
        "--amp bf16": replace(step, amp="auto") if step.amp == "off" else step,
        "--model-size tiny": replace(step, model={**step.model, "size": "tiny"}),
    }


def plan(step: Step, processes: int) -> memory.Plan:
    """What one of `processes` holds at the peak of the largest step."""
    with memory.counted() as live:
        learner = Learner(create_model(**step.model), NUM_LABELS, step.losses.kind)
        optimizer = schedule.optimizer_for(learner, 1e-4, 0.1)
        amp = Amp(memory.mode_of(step.amp), memory.CPU)
        live.begin(learner, optimizer)
        for name in step.datasets or _DIFFERENT:
            row = DATA_SETS[name]
            _backward(step, learner, Task(name, row.modalities, True, row.labels), amp)
            amp.step(optimizer, learner.parameters(), clip_norm=1.0)
    precision = "float32" if step.amp == "off" else "half precision"
    title = f"multimodal, {step.model['size']}, batch {step.batch_size}, {precision}"
    recomputed = ", recomputed" * step.model["use_checkpoint"]
    return live.plan(
        title,
        f"samples, and all that is kept of them{recomputed}",
        wrapped=learner,
        processes=processes,
    )


def _backward(step: Step, learner: Learner, task: Task, amp: Amp) -> None:
    """The gradients of a step of this task."""
    chunks = split(_batch(step, task), step.batch_size, task, memory.CPU)[
        :2
    ]  # the others are alike
    rows = len(chunks) * step.batch_size
    labels = torch.empty(rows, NUM_LABELS) if task.target else None

    def loss(outputs: Outputs) -> torch.Tensor:
        return loss_of(task, outputs, labels, step.losses, World())[0]

    grad_cache.backward(learner, chunks, loss, amp)


def _batch(step: Step, task: Task) -> Batch:
    """The samples of a step, as the loader gives them."""
    rows = step.batch_size * step.accumulation
    side = SIZES[step.model["size"]].image_size
    frames = round(step.clip_seconds * FRAMES_PER_SECOND)
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
