"""--estimate of stage 1: one step on a product as the real data have them, without values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lavic.src import distillation_setup
from lavic.src.adapters import adapter_parameters, add_adapter
from lavic.src.caption_loss import FixedStart, caption_nll, why_not_reusable
from lavic.src.captions import NO_LABEL, Batch
from lavic.src.llava import MOST_VIEWS, VISION_TARGETS, core_of
from lavic.src.memory import ITEMS, amp_of, base_model, configuration, recomputes
from shared import memory

if TYPE_CHECKING:
    from lavic.src.knowledge_distillation import Config

# Tokens: what all prompts begin with, all before the picture, after it, the description.
_FIXED, _HEAD, _MARK, _SAID = 85, 120, 4, 115


def text(cfg: Config, processes: int) -> str:
    """The table for one process, whether it fits on the GPUs here, what saves most."""
    others = {
        "--gradient_checkpointing on": replace(cfg, gradient_checkpointing="on"),
        "--batch_size 1": replace(cfg, batch_size=1),
    }
    plans = {name: plan(c, processes) for name, c in others.items() if c != cfg}
    return memory.report(plan(cfg, processes), plans)


def plan(cfg: Config, processes: int, batch: Batch | None = None) -> memory.Plan:
    """What one process holds at the peak of a step on `batch`, usual samples if None."""
    batch = batch or _usual_samples(cfg.batch_size, configuration(cfg.model_name))
    recomputed = recomputes(cfg, distillation_setup.CHECKPOINT_BELOW)
    with memory.counted() as live:
        base = base_model(cfg.model_name, cfg.dtype)
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
        amp, start = amp_of(cfg), None
        batch = batch._replace(views=torch.empty(batch.views.shape))
        live.begin(model, optimizer)
        if cfg.reuse_prompt and not why_not_reusable(core.language_model):
            start = FixedStart(model, [0] * _FIXED)
        for _ in range(min(2, cfg.grad_accum)):
            with amp.autocast():
                loss = caption_nll(model, batch, ITEMS, start)
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


def _usual_samples(rows: int, config: Any) -> Batch:
    """Samples as the real data have them, each with all views."""
    asked = [*[0] * _HEAD, *ITEMS, *[0] * _MARK]
    tokens = torch.tensor([[*asked, *[0] * _SAID]] * rows)
    labels = torch.tensor([[*[NO_LABEL] * len(asked), *[0] * _SAID]] * rows)
    mask = torch.tensor([[1] * (len(asked) + _SAID)] * rows)
    side = config.vision_config.image_size
    views = torch.empty(rows * MOST_VIEWS, 3, side, side)
    num_views = torch.tensor([MOST_VIEWS] * rows)
    return Batch(tokens, mask, labels, views, num_views, _HEAD, True, rows * _SAID)
