"""--estimate of stage 2: one step on prompts of --max_length, its tensors without values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lavic.src.recommend.item_vectors import ItemVectors
from lavic.src.recommend.model import LANGUAGE_TARGETS, ROOM_FOR_ALL_FROM, Recommender, drop_tower
from lavic.src.recommend.prompts import ANSWER_ROOM, Prompt, collate_training
from lavic.src.vision import memory as of_vision
from lavic.src.vision.adapter_files import SETTINGS, base_of
from lavic.src.vision.adapters import adapter_parameters, add_adapter
from lavic.src.vision.model import checkpoint_activations, core_of
from shared import memory

_ID = 12  # tokens of the answer, an id and its end


def text(values: dict[str, Any], processes: int) -> str:
    """The table for one process, whether it fits on the GPUs here, what saves most.

    values: the arguments of `plan` by their names.
    """
    changes = {
        "--gradient_checkpointing on": {"gradient_checkpointing": "on"},
        "--micro-batch 1": {"batch_size": 1, "grad_accum": 2},
        "--load_in_4bit": {"load_in_4bit": True},
        "--max_length 1024": {"max_length": min(1024, values["max_length"])},
    }
    return of_vision.report(plan, values, changes, processes)


def plan(
    *,
    model_name: str | None,
    model_dir: Path | None,
    batch_size: int,
    grad_accum: int,
    max_length: int,
    clip_norm: float,
    dtype: str,
    amp: str,
    load_in_4bit: bool,
    gradient_checkpointing: str,
    processes: int = 1,
    batch: dict[str, Any] | None = None,
) -> memory.Plan:
    """What one process holds at the peak of a step on `batch`, longest prompts if None."""
    name = model_name or of_vision.HUB_ID
    if not model_name and model_dir and (model_dir / SETTINGS).is_file():
        name = base_of(model_dir)
    recomputed = of_vision.recomputes(gradient_checkpointing, ROOM_FOR_ALL_FROM)
    length = max_length - ANSWER_ROOM + _ID
    longest = Prompt([0] * length, length - _ID, (), 0)
    batch = {**(batch or collate_training([longest] * batch_size, 0)), "pictured": []}
    with memory.counted() as live:
        base = of_vision.base_model(name, dtype, four_bit=load_in_4bit)
        drop_tower(base)
        llava = add_adapter(base, LANGUAGE_TARGETS)
        if recomputed:
            checkpoint_activations(core_of(llava).language_model)
        recommender = Recommender(llava, of_vision.ITEMS, ItemVectors({}, {})).train()
        trained = list(adapter_parameters(llava).values())
        optimizer, scaler = torch.optim.AdamW(trained), of_vision.amp_of(dtype, amp)
        live.begin(recommender, optimizer)
        for _ in range(min(2, grad_accum)):
            with scaler.autocast():
                loss = recommender(batch)
            scaler.backward(loss)
        scaler.step(optimizer, trained, clip_norm=clip_norm)
    what = " x ".join(map(str, batch["ids"].shape)) + " tokens" + ", recomputed" * recomputed
    title = f"{name}, stage 2, batch size {batch_size}"
    return of_vision.planned(live, title, what, recommender, processes)
