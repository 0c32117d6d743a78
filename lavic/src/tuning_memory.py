"""--estimate: the memory of stage 2, reckoned from the model's configuration; loads no weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lavic.src.adapters import adapter_parameters, add_adapter
from lavic.src.llava import core_of, head_of
from lavic.src.memory_plan import configuration
from lavic.src.recommend_prompts import ANSWER_ROOM
from lavic.src.recommender import LANGUAGE_TARGETS, checkpoint_activations, drop_tower
from shared import estimate

if TYPE_CHECKING:
    from lavic.src.prompt_tuning import Config

_HUB_ID = "llava-hf/llava-v1.6-mistral-7b-hf"
_ANSWER = 12  # tokens of an id and its end


def reckon(cfg: Config) -> str:
    """The plan as a table, and whether it fits the GPUs that are visible."""
    alternatives = {
        "--gradient_checkpointing on": replace(cfg, gradient_checkpointing="on"),
        "--batch_size 1": replace(cfg, batch_size=1),
        "--max_length 1024": replace(cfg, max_length=min(1024, cfg.max_length)),
    }
    found = plan(cfg)
    others = {name: plan(other) for name, other in alternatives.items() if other != cfg}
    return found.text(estimate.device_memory(), found.advised(others))


def plan(cfg: Config) -> estimate.MemoryPlan:
    """What one process of this run keeps on its GPU while it trains, with the longest prompts."""
    name = cfg.model_name or _HUB_ID
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    model = estimate.on_meta(lambda: _build(configuration(name), dtype))
    adapter = list(adapter_parameters(model).values())
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    found = estimate.MemoryPlan(f"{name}, stage 2, batch size {cfg.batch_size}")
    how = f"{estimate.count(frozen):,} parameters in {dtype}, without the vision tower"
    found.add("frozen weights", estimate.parameter_bytes(frozen), how.replace("torch.", ""))
    how = f"{estimate.count(adapter):,} parameters in float32"
    found.add("adapter", estimate.parameter_bytes(adapter), how)
    found.add("its gradients", estimate.gradient_bytes(adapter), "float32")
    found.add("its AdamW", estimate.adamw_bytes(adapter), "two float32 moments of each")
    how = f"{cfg.batch_size} x {cfg.max_length} tokens, kept for the gradients"
    if cfg.gradient_checkpointing == "on":
        how += ": the layers' inputs alone"
    found.add("activations", _activations(model, cfg, dtype), how)
    found.add("CUDA itself", estimate.CUDA_CONTEXT, "context and workspaces")
    return found


def _build(settings: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import LlavaNextForConditionalGeneration

    base: Any = LlavaNextForConditionalGeneration(settings).requires_grad_(False)
    drop_tower(base)
    return add_adapter(base.to(dtype), LANGUAGE_TARGETS)


def _activations(model: nn.Module, cfg: Config, dtype: torch.dtype) -> int:
    """Bytes that a batch of the longest prompts keeps for its backward pass."""
    model.train()
    if cfg.gradient_checkpointing == "on":
        checkpoint_activations(model)
    core = core_of(model)
    width, length = core.config.text_config.hidden_size, cfg.max_length - ANSWER_ROOM + _ANSWER
    embeds = torch.empty(cfg.batch_size, length, width, dtype=dtype, device="meta")
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")

    def loss() -> Any:
        hidden = core.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        logits = head_of(model)(hidden.last_hidden_state[:, -_ANSWER:]).float().flatten(0, 1)
        labels = torch.zeros(len(logits), dtype=torch.long, device="meta")
        return nn.functional.cross_entropy(logits, labels)

    return estimate.saved_bytes(model, loss)
