"""--estimate of stage 2: one step on prompts of --max_length, its tensors without values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lavic.src import recommend_setup
from lavic.src.adapter_files import SETTINGS, base_of
from lavic.src.adapters import adapter_parameters, add_adapter
from lavic.src.item_vectors import ItemVectors
from lavic.src.memory import HUB_ID, ITEMS, amp_of, base_model, recomputes
from lavic.src.recommend_prompts import ANSWER_ROOM, Prompt, collate_training
from lavic.src.recommend_training import accumulate
from lavic.src.recommender import (
    LANGUAGE_TARGETS,
    Recommender,
    checkpoint_activations,
    drop_tower,
)
from shared import memory
from shared.distributed import World

if TYPE_CHECKING:
    from lavic.src.prompt_tuning import Config

_ID = 12  # tokens of the answer, an id and its end


def text(cfg: Config, processes: int) -> str:
    """The table for one process, whether it fits on the GPUs here, what saves most."""
    others = {
        "--gradient_checkpointing on": replace(cfg, gradient_checkpointing="on"),
        "--batch_size 1": replace(cfg, batch_size=1),
        "--max_length 1024": replace(cfg, max_length=min(1024, cfg.max_length)),
    }
    plans = {name: plan(other, processes) for name, other in others.items() if other != cfg}
    return memory.report(plan(cfg, processes), plans)


def plan(cfg: Config, processes: int, batch: dict[str, Any] | None = None) -> memory.Plan:
    """What one process holds at the peak of a step on `batch`, longest prompts if None."""
    name = cfg.model_name or HUB_ID
    if not cfg.model_name and cfg.model_dir and (cfg.model_dir / SETTINGS).is_file():
        name = base_of(cfg.model_dir)
    recomputed = recomputes(cfg, recommend_setup.CHECKPOINT_BELOW)
    length = cfg.max_length - ANSWER_ROOM + _ID
    longest = Prompt([0] * length, length - _ID, (), 0)
    batch = {**(batch or collate_training([longest] * cfg.batch_size, 0)), "pictured": []}
    with memory.counted() as live:
        base = base_model(name, cfg.dtype)
        drop_tower(base)
        model = add_adapter(base, LANGUAGE_TARGETS)
        if recomputed:
            checkpoint_activations(model)
        recommender = Recommender(model, ITEMS, ItemVectors({}, {})).train()
        trained = list(adapter_parameters(model).values())
        optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
        amp = amp_of(cfg)
        live.begin(recommender, optimizer)
        accumulate(recommender, [batch] * min(2, cfg.grad_accum), amp, World())
        amp.step(optimizer, trained, clip_norm=cfg.clip_norm)
    what = " x ".join(map(str, batch["ids"].shape)) + " tokens" + ", recomputed" * recomputed
    title = f"{name}, stage 2, batch size {cfg.batch_size}"
    return live.plan(title, what, wrapped=recommender, processes=processes)
