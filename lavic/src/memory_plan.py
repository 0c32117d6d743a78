"""--estimate: the memory of stage 1, reckoned from the model's configuration; loads no weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lavic.src.adapters import adapter_parameters, add_adapter
from lavic.src.distillation_setup import CHECKPOINT_BELOW, checkpoint_tower
from lavic.src.llava import MOST_VIEWS, VISION_TARGETS, cls_vectors, core_of, head_of
from shared import estimate
from shared.errors import UserError, one_line

if TYPE_CHECKING:
    from lavic.src.knowledge_distillation import Config

_REAL = Path(__file__).with_name("llava_v16_mistral_7b.json")
# A sample as the real data has them: prompt with a title, then a description of some 115 tokens.
_HEAD, _MARK, _ANSWER = 120, 4, 115


def reckon(cfg: Config) -> str:
    """The plan as a table, and whether it fits the GPUs that are visible."""
    devices = estimate.device_memory()
    cfg = replace(cfg, gradient_checkpointing=_checkpointing(cfg, devices))
    alternatives = {
        "--gradient_checkpointing on": replace(cfg, gradient_checkpointing="on"),
        "--batch_size 1": replace(cfg, batch_size=1),
    }
    found = plan(cfg)
    others = {name: plan(other) for name, other in alternatives.items() if other != cfg}
    return found.text(devices, found.advised(others))


def _checkpointing(cfg: Config, devices: list[tuple[str, int]]) -> Literal["on", "off"]:
    """What auto comes to on these GPUs; without any, on the 20 GB that the document names."""
    if cfg.gradient_checkpointing == "auto":
        smallest = min((size for _, size in devices), default=20 * estimate.GB)
        return "on" if smallest < CHECKPOINT_BELOW else "off"
    return cfg.gradient_checkpointing


def plan(cfg: Config) -> estimate.MemoryPlan:
    """What one process of this run keeps on its GPU."""
    settings = configuration(cfg.model_name)
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    model = estimate.on_meta(lambda: _build(settings, cfg, dtype))
    adapter = list(adapter_parameters(model).values())
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    size = settings.vision_config.image_size
    found = estimate.MemoryPlan(f"{cfg.model_name}, stage 1, batch size {cfg.batch_size}")
    how = f"{estimate.count(frozen):,} parameters in {dtype}".replace("torch.", "")
    found.add("frozen weights", estimate.parameter_bytes(frozen), how)
    found.add(
        "adapter",
        estimate.parameter_bytes(adapter),
        f"{estimate.count(adapter):,} parameters in float32, with gradients and AdamW below",
    )
    found.add("its gradients", estimate.gradient_bytes(adapter), "float32")
    found.add("its AdamW", estimate.adamw_bytes(adapter), "two float32 moments of each")
    kept = "kept for the gradients, from a forward pass without memory"
    if cfg.gradient_checkpointing == "on":
        kept += "; the tower keeps its layers' inputs"
    tokens = _HEAD + MOST_VIEWS + _MARK + _ANSWER
    how = f"{MOST_VIEWS} views of {size} pixels, {tokens} tokens a sample"
    found.add("activations", _activations(model, cfg, dtype), f"{how}; {kept}")
    found.add("CUDA itself", estimate.CUDA_CONTEXT, "context and workspaces")
    return found


def configuration(model_name: str) -> Any:
    """The model's configuration: of a directory, else that of LLaVA-v1.6-Mistral-7B."""
    from transformers import LlavaNextConfig

    path = Path(model_name) / "config.json"
    if Path(model_name).is_dir() and not path.is_file():
        raise UserError(f"{path} is missing: the memory is reckoned from it")
    try:
        content = json.loads((path if path.is_file() else _REAL).read_text(encoding="utf-8"))
        return LlavaNextConfig(**content)
    except Exception as error:  # transformers' own and Python's: a value may be wrong in many ways
        raise UserError(f"{path} is no configuration of a LLaVA-NeXT: {one_line(error)}") from None


def _build(settings: Any, cfg: Config, dtype: torch.dtype) -> nn.Module:
    from transformers import LlavaNextForConditionalGeneration

    base: Any = LlavaNextForConditionalGeneration(settings).requires_grad_(False).eval()
    base = base.to(dtype)
    return add_adapter(
        base, VISION_TARGETS, r=cfg.lora_r, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout
    )


def _activations(model: nn.Module, cfg: Config, dtype: torch.dtype) -> int:
    """Bytes that one batch keeps for its backward pass: tower, projector, language model, logits.

    With the prompts' start kept apart only what follows it has gradients.
    """
    core = core_of(model)
    core.vision_tower.train()
    core.multi_modal_projector.train()
    if cfg.gradient_checkpointing == "on":
        checkpoint_tower(model)
    side = core.config.vision_config.image_size
    views = torch.empty(cfg.batch_size * MOST_VIEWS, 3, side, side, device="meta")
    before = 0 if cfg.reuse_prompt else _HEAD
    text = torch.empty(
        cfg.batch_size, before + _MARK + _ANSWER, core.config.text_config.hidden_size,
        dtype=dtype, device="meta",
    )  # fmt: skip
    return estimate.saved_bytes(model, lambda: _loss(model, views, text))


def _loss(model: nn.Module, views: Tensor, text: Tensor) -> Any:
    """A loss of the training's shapes; its values mean nothing."""
    vectors = cls_vectors(model, views).unflatten(0, (len(text), MOST_VIEWS))
    embeds = torch.cat([vectors.to(text.dtype), text], dim=1)
    length = embeds.shape[1]
    mask = torch.ones(
        1, 1, length, length, dtype=torch.bool, device="meta"
    )  # else its values count
    language = core_of(model).language_model
    hidden = language(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    logits = head_of(model)(hidden[:, -_ANSWER:]).float().flatten(0, 1)
    labels = torch.zeros(len(logits), dtype=torch.long, device="meta")
    return nn.functional.cross_entropy(logits, labels)
