"""How much memory a training takes on each device, by `run_training.py --estimate`.

What autograd keeps is counted on tensors without memory, in a step that brings all three
modalities, as no step of training does. With `use_checkpoint` that is each block's input, and the
inside of one block while it is computed again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from multimodal.model import CONTEXT, FRAMES_A_TOKEN, MEL_BINS, SIZES, Block, BlockOptions, Shape
from multimodal.model import create_model as create
from shared.estimate import (
    CUDA_CONTEXT,
    MemoryPlan,
    adamw_bytes,
    count,
    device_memory,
    gradient_bytes,
    on_meta,
    parameter_bytes,
    saved_bytes,
    saved_bytes_in_half,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from multimodal.run_training import Config

FRAMES_A_SECOND = 100
LIMITS_GB = {"tiny": 4, "small": 8, "base": 12, "large": 20}  # the documented minimum
_SLACK = 1.1  # fragments, workspaces, and what the optimizer's step holds for a moment


def plan(cfg: Config) -> MemoryPlan:
    """The rows of the estimate."""
    model = on_meta(lambda: create(cfg.model_size, embed_dim=cfg.embed_dim))
    parameters = list(model.parameters())
    found = MemoryPlan(
        f"multimodal, {cfg.model_size}, batch {cfg.batch_size}, "
        f"{'float32' if cfg.amp == 'off' else 'half precision'}"
    )
    found.add("weights", parameter_bytes(model), f"{count(model):,} parameters in float32")
    found.add("gradients", gradient_bytes(parameters), "float32")
    found.add("AdamW", adamw_bytes(parameters), "two float32 moments of each parameter")
    how = "what autograd keeps of a batch with three modalities"
    found.add("activations", _kept(cfg), how)
    if cfg.use_checkpoint:
        found.add("block inputs", _block_inputs(cfg), "kept by gradient checkpointing")
    found.add("moment", 2 * _largest_block(cfg), "the inside of one block, and its gradients")
    if cfg.gradient_accumulation_steps > 1:
        kept = 4 * cfg.step_rows * cfg.embed_dim * 4
        found.add("cached features", kept, f"{cfg.step_rows} samples, with their gradients")
    found.add("CUDA", CUDA_CONTEXT, "context and kernels")
    found.add("slack", int((_SLACK - 1) * found.total), "a tenth: fragments and workspaces")
    return found


def plan_text(cfg: Config) -> str:
    """The estimate for people."""
    found = plan(cfg)
    others = {
        f"--batch-size {max(1, cfg.batch_size // 2)}": {"batch_size": max(1, cfg.batch_size // 2)},
        "--use-checkpoint": {"use_checkpoint": True},
        "--amp bf16": {"use_amp": True},
        "--model-size tiny": {"model_size": "tiny"},
    }
    plans = {setting: plan(replace(cfg, **changes)) for setting, changes in others.items()}
    text = found.text(device_memory(), advice=found.advised(plans))
    limit = LIMITS_GB.get(cfg.model_size)
    return text if limit is None else f"{text}\nthe documented minimum is {limit} GB"


def _kept(cfg: Config) -> int:
    """Bytes that a forward pass keeps for the backward pass."""

    def build() -> nn.Module:
        return create(cfg.model_size, embed_dim=cfg.embed_dim, use_checkpoint=cfg.use_checkpoint)

    return _saved(cfg, build, lambda model: model(**_inputs(cfg)))


def _largest_block(cfg: Config) -> int:
    """Bytes that the largest block keeps while it is computed."""
    found = []
    for name, shape in _shapes(cfg).items():
        size = (cfg.batch_size, _tokens(cfg)[name], shape.width)
        found.append(
            _saved(
                cfg,
                lambda shape=shape: Block(shape, BlockOptions()),
                lambda block, size=size: block(torch.empty(size, requires_grad=True), None),
            )
        )
    return max(found)


def _block_inputs(cfg: Config) -> int:
    """Bytes of the inputs of all blocks: the residual stream is float32."""
    tokens = _tokens(cfg)
    return sum(
        shape.layers * cfg.batch_size * tokens[name] * shape.width * 4
        for name, shape in _shapes(cfg).items()
    )


def _saved(
    cfg: Config, build: Callable[[], nn.Module], forward: Callable[[nn.Module], object]
) -> int:
    if cfg.amp != "off":
        return saved_bytes_in_half(build, forward, torch.bfloat16)
    module = on_meta(build)
    with torch.device("meta"):
        return saved_bytes(module, lambda: forward(module))


def _shapes(cfg: Config) -> dict[str, Shape]:
    size = SIZES[cfg.model_size]
    return {"image": size.image, "text": size.text, "audio": size.audio, "fusion": size.fusion}


def _tokens(cfg: Config) -> dict[str, int]:
    """Tokens a sample in each transformer."""
    size = SIZES[cfg.model_size]
    tokens = {
        "image": (size.image_size // size.patch) ** 2 + 1,
        "text": CONTEXT,
        "audio": _frames(cfg) // FRAMES_A_TOKEN,
    }
    return tokens | {"fusion": sum(tokens.values()) + 1}


def _frames(cfg: Config) -> int:
    return round(cfg.clip_seconds * FRAMES_A_SECOND)


def _inputs(cfg: Config) -> dict[str, Tensor]:
    side, rows = SIZES[cfg.model_size].image_size, cfg.batch_size
    return {
        "images": torch.empty(rows, 3, side, side),
        "input_ids": torch.empty(rows, CONTEXT, dtype=torch.long),
        "attention_mask": torch.empty(rows, CONTEXT, dtype=torch.bool),
        "audio": torch.empty(rows, _frames(cfg), MEL_BINS),
        "audio_mask": torch.empty(rows, _frames(cfg), dtype=torch.bool),
    }
