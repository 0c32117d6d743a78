"""--estimate of both stages: the memory of one step, its tensors without values.

Stage 1 learns from a product as the real data have them, stage 2 from a prompt of --max_length.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lavic.src import distillation_setup, recommend_setup
from lavic.src.adapter_files import SETTINGS, base_of
from lavic.src.adapters import adapter_parameters, add_adapter
from lavic.src.caption_loss import FixedStart, caption_nll, why_not_reusable
from lavic.src.captions import NO_LABEL, Batch
from lavic.src.item_vectors import ItemVectors
from lavic.src.llava import MOST_VIEWS, VISION_TARGETS, core_of
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
from shared.errors import UserError, one_line
from shared.precision import Amp

if TYPE_CHECKING:
    from lavic.src import knowledge_distillation, prompt_tuning

_REAL = Path(__file__).with_name("llava_v16_mistral_7b.json")
_HUB_ID = "llava-hf/llava-v1.6-mistral-7b-hf"
_SMALLEST = 20 * memory.GB  # the GPU that the document names
# Tokens of stage 1: what all prompts begin with, all before the picture, after it, the description.
_FIXED, _HEAD, _MARK, _SAID = 85, 120, 4, 115
_ID = 12  # tokens of stage 2's answer, an id and its end


def distillation_text(cfg: knowledge_distillation.Config, processes: int) -> str:
    """Stage 1: the table for one process, whether it fits on the GPUs here, what saves most."""
    others = {
        "--gradient_checkpointing on": replace(cfg, gradient_checkpointing="on"),
        "--batch_size 1": replace(cfg, batch_size=1),
    }
    plans = {name: distillation_plan(c, processes) for name, c in others.items() if c != cfg}
    return memory.report(distillation_plan(cfg, processes), plans)


def distillation_plan(
    cfg: knowledge_distillation.Config, processes: int, batch: Batch | None = None
) -> memory.Plan:
    """Stage 1: what one process holds at the peak of a step on `batch`, usual samples if None."""
    batch = batch or _usual_samples(cfg.batch_size, configuration(cfg.model_name))
    recomputed = _recomputes(cfg, distillation_setup.CHECKPOINT_BELOW)
    with memory.counted() as live:
        base = _base(cfg.model_name, cfg.dtype)
        model = add_adapter(
            base, VISION_TARGETS, r=cfg.lora_r, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout
        )
        core = core_of(model)
        core.vision_tower.train()
        core.multi_modal_projector.train()
        if recomputed:
            distillation_setup.checkpoint_tower(model)
        trained = list(adapter_parameters(model).values())
        optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
        amp, start = _amp(cfg), None
        batch = batch._replace(views=torch.empty(batch.views.shape))
        live.begin(model, optimizer)
        if cfg.reuse_prompt and not why_not_reusable(core.language_model):
            start = FixedStart(model, [0] * _FIXED)
        for _ in range(min(2, cfg.grad_accum)):
            with amp.autocast():
                loss = caption_nll(model, batch, _ITEMS, start)
            amp.backward(loss)
        amp.step(optimizer, trained, clip_norm=1.0)
    title = f"{cfg.model_name}, stage 1, batch size {cfg.batch_size}"
    num_views, length = len(batch.views) // len(batch.tokens), batch.tokens.shape[1]
    what = f"{num_views} views of {batch.views.shape[-1]} pixels and {length} tokens a sample"
    what += ", the tower recomputed" * recomputed
    found = live.plan(title, what, wrapped=None, processes=processes)
    if processes > 1:  # the gradients travel in one piece, without DDP
        found.add("exchange", 2 * memory.gradient_bytes(model), "gradients of one and of all")
    return found


def tuning_text(cfg: prompt_tuning.Config, processes: int) -> str:
    """Stage 2: the table for one process, whether it fits on the GPUs here, what saves most."""
    others = {
        "--gradient_checkpointing on": replace(cfg, gradient_checkpointing="on"),
        "--batch_size 1": replace(cfg, batch_size=1),
        "--max_length 1024": replace(cfg, max_length=min(1024, cfg.max_length)),
    }
    plans = {name: tuning_plan(other, processes) for name, other in others.items() if other != cfg}
    return memory.report(tuning_plan(cfg, processes), plans)


def tuning_plan(
    cfg: prompt_tuning.Config, processes: int, batch: dict[str, Any] | None = None
) -> memory.Plan:
    """Stage 2: what one process holds at the peak of a step on `batch`, longest prompts if None."""
    name = cfg.model_name or _HUB_ID
    if not cfg.model_name and cfg.model_dir and (cfg.model_dir / SETTINGS).is_file():
        name = base_of(cfg.model_dir)
    recomputed = _recomputes(cfg, recommend_setup.CHECKPOINT_BELOW)
    length = cfg.max_length - ANSWER_ROOM + _ID
    longest = Prompt([0] * length, length - _ID, (), 0)
    batch = {**(batch or collate_training([longest] * cfg.batch_size, 0)), "pictured": []}
    with memory.counted() as live:
        base = _base(name, cfg.dtype)
        drop_tower(base)
        model = add_adapter(base, LANGUAGE_TARGETS)
        if recomputed:
            checkpoint_activations(model)
        recommender = Recommender(model, _ITEMS, ItemVectors({}, {})).train()
        trained = list(adapter_parameters(model).values())
        optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
        amp = _amp(cfg)
        live.begin(recommender, optimizer)
        accumulate(recommender, [batch] * min(2, cfg.grad_accum), amp, World())
        amp.step(optimizer, trained, clip_norm=cfg.clip_norm)
    what = " x ".join(map(str, batch["ids"].shape)) + " tokens" + ", recomputed" * recomputed
    title = f"{name}, stage 2, batch size {cfg.batch_size}"
    return live.plan(title, what, wrapped=recommender, processes=processes)


def configuration(model_name: str) -> Any:
    """The model's configuration: of a directory, else that of LLaVA-v1.6-Mistral-7B."""
    from transformers import LlavaNextConfig

    path = Path(model_name) / "config.json"
    if Path(model_name).is_dir() and not path.is_file():
        raise UserError(f"{path} is missing: the memory is estimated from it")
    try:
        content = json.loads((path if path.is_file() else _REAL).read_text(encoding="utf-8"))
        return LlavaNextConfig(**content)
    except Exception as error:  # transformers' own and Python's: a value may be wrong in many ways
        raise UserError(f"{path} is no configuration of a LLaVA-NeXT: {one_line(error)}") from None


def _base(model_name: str, dtype: str) -> Any:
    """The frozen model, as load_base gives it."""
    from transformers import LlavaNextForConditionalGeneration

    model: Any = LlavaNextForConditionalGeneration(configuration(model_name))
    half = torch.float32 if dtype == "float32" else torch.bfloat16
    return model.requires_grad_(False).eval().to(half)


def _amp(cfg: Any) -> Amp:
    scaled = cfg.dtype == "float16" and cfg.run.amp == "off"  # float16 comes with loss scaling
    return Amp("bf16" if scaled else memory.mode_of(cfg.run.amp), memory.CPU)


def _recomputes(cfg: Any, below: int) -> bool:
    """What --gradient_checkpointing comes to on the smallest GPU here; without any, of 20 GB."""
    if cfg.gradient_checkpointing != "auto":
        return cfg.gradient_checkpointing == "on"
    return min((size for _, size in memory.devices()), default=_SMALLEST) < below


_ITEMS = list(range(1, 1 + MOST_VIEWS))  # any five ids in a row


def _usual_samples(rows: int, config: Any) -> Batch:
    """Samples of stage 1 as the real data have them, each with all views."""
    asked = [*[0] * _HEAD, *_ITEMS, *[0] * _MARK]
    tokens = torch.tensor([[*asked, *[0] * _SAID]] * rows)
    labels = torch.tensor([[*[NO_LABEL] * len(asked), *[0] * _SAID]] * rows)
    mask = torch.tensor([[1] * (len(asked) + _SAID)] * rows)
    side = config.vision_config.image_size
    views = torch.empty(rows * MOST_VIEWS, 3, side, side)
    num_views = torch.tensor([MOST_VIEWS] * rows)
    return Batch(tokens, mask, labels, views, num_views, _HEAD, True, rows * _SAID)
