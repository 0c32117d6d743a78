"""--estimate and --fit: the memory of steps of the last stage, their tensors without values.

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
from shared import fit, memory
from shared.amp import Amp
from shared.distributed import World

if TYPE_CHECKING:
    from multimodal.training.grad_cache import Outputs

_DIFFERENT = ("coco", "clotho", "voxceleb")  # AudioCaps' steps are Clotho's without keywords


@dataclass(frozen=True)
class Step:
    """What decides about the memory of a step. model: create_model's arguments."""

    model: Mapping[str, Any]
    rows: int  # samples of the step
    at_once: int  # samples computed at once
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
    exact = next((name for name in others if name.startswith("--micro-batch")), "")
    said = memory.report(plans[largest], others, exact)
    limit = MINIMUM_GB.get(step.model["size"])
    return said if limit is None else f"{said}\nthe documented minimum is {limit} GB"


def fitted(cfg: Any, step_of: Any, processes: int) -> Any:
    """`cfg` with the chunks and the checkpointing that --fit has room for. Raises UserError.

    step_of: the Step of a configuration. Either costs a forward pass, whatever the chunks' size.
    """
    whole, *parts = fit.halves(cfg.step_rows)
    ways = [{"use_checkpoint": again, "micro_batch": whole} for again in (False, True)]
    ways += [
        {"use_checkpoint": again, "micro_batch": size} for again in (False, True) for size in parts
    ]
    on_cpu = fit.is_without_gpu(cfg.run) and not cfg.estimate
    tried = (
        (other, plan(_as_computed(step_of(other), on_cpu=on_cpu), processes))
        for other in fit.variants(cfg, ways)
    )
    return fit.first(cfg, tried, "a smaller --model-size")


def _as_computed(step: Step, *, on_cpu: bool) -> Step:
    """`step` with the precision that `auto` means there."""
    return replace(step, amp="off") if on_cpu and step.amp == "auto" else step


def _smaller(step: Step) -> dict[str, Step]:
    """Settings that may save memory, as they would be typed."""
    half = max(1, step.at_once // 2)
    return {
        f"--micro-batch {half}": replace(step, at_once=half),
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
    title = f"multimodal, {step.model['size']}, batch {step.at_once}, {precision}"
    recomputed = ", recomputed" * step.model["use_checkpoint"]
    return live.plan(
        title,
        f"samples, and all that is kept of them{recomputed}",
        wrapped=learner,
        processes=processes,
    )


def _backward(step: Step, learner: Learner, task: Task, amp: Amp) -> None:
    """The gradients of a step of this task."""
    chunks = split(_batch(step, task), step.at_once, task, memory.CPU)
    labels = torch.empty(step.rows, NUM_LABELS) if task.target else None

    def loss(outputs: Outputs) -> torch.Tensor:
        whole = {name: _with_rest(value, step.rows) for name, value in outputs.items()}
        return loss_of(task, whole, labels, step.losses, World())[0]

    grad_cache.backward(learner, chunks[:2], loss, amp)  # the others are alike


def _with_rest(output: torch.Tensor, rows: int) -> torch.Tensor:
    """An output with the rows of all chunks, a scalar as it is."""
    if output.ndim == 0 or len(output) == rows:
        return output
    return torch.cat([output, torch.empty(rows - len(output), *output.shape[1:])])


def _batch(step: Step, task: Task) -> Batch:
    """The samples of a step, as the loader gives them."""
    rows = step.rows
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
