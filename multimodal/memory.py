"""How much memory a training takes on each device, by formula: `run_training.py --estimate`.

Counted are the tensors that autograd keeps, per token of a block of width W: with `use_checkpoint`
each block's input, and everything inside one block while it is computed again. The kernels of
attention keep no scores (attention sdpa). Legend: B batch, N tokens, W width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from multimodal.model import CONTEXT, FRAMES_A_TOKEN, SIZES, Shape, create_model
from multimodal.samples import NUM_LABELS
from shared.estimate import (
    CUDA_CONTEXT,
    MemoryPlan,
    adamw_bytes,
    count,
    device_memory,
    gradient_bytes,
    on_meta,
    parameter_bytes,
)

if TYPE_CHECKING:
    from multimodal.run_training import Config

FRAMES_A_SECOND = 100
# Values a token that a block keeps, in units of W: two norms' inputs and outputs (4), queries, keys
# and values (3), their mixture and its projection (2), the MLP's inner side before and after its
# activation (8), its output (1).
_KEPT_IN_BLOCK = 18
_SLACK = 1.1  # fragments, workspaces, and what the optimizer's step holds for a moment
LIMITS_GB = {"tiny": 4, "small": 8, "base": 12, "large": 20}  # the documented minimum


def plan(cfg: Config) -> MemoryPlan:
    """The rows of the estimate, of a step of the last stage with all three modalities."""
    model = on_meta(lambda: create_model(cfg.model_size, embed_dim=cfg.embed_dim))
    parameters = list(model.parameters())
    value_bytes = 4 if cfg.amp == "off" else 2
    found = MemoryPlan(f"multimodal, {cfg.model_size}, batch {cfg.batch_size}")
    found.add("weights", parameter_bytes(model), f"{count(model):,} parameters in float32")
    found.add("gradients", gradient_bytes(parameters), "float32")
    found.add("AdamW", adamw_bytes(parameters), "two float32 moments of each parameter")
    if cfg.amp != "off":
        halved = sum(p.numel() for p in parameters if p.ndim >= 2) * 2
        found.add("weights in half precision", halved, "autocast's copies during a step")
    found.add("activations", _activations(cfg, value_bytes), _how(cfg))
    kept = 4 * cfg.step_rows * cfg.embed_dim * 4
    if cfg.gradient_accumulation_steps > 1:
        found.add("cached features", kept, f"{cfg.step_rows} samples, with their gradients")
    found.add("CUDA", CUDA_CONTEXT, "context and kernels")
    rest = int((_SLACK - 1) * found.total)
    found.add("slack", rest, "a tenth: fragments and workspaces")
    return found


def plan_text(cfg: Config) -> str:
    """The estimate for people."""
    advice = ["--batch-size smaller", "--model-size smaller", "--use-checkpoint", "--amp bf16"]
    text = plan(cfg).text(device_memory(), advice=advice)
    limit = LIMITS_GB.get(cfg.model_size)
    return text if limit is None else f"{text}\nthe documented minimum is {limit} GB"


def _how(cfg: Config) -> str:
    kept = "each block's input, and one block" if cfg.use_checkpoint else "all of every block"
    return f"{kept}; {_tokens(cfg)['fusion']} tokens a sample in the fusion"


def _tokens(cfg: Config) -> dict[str, int]:
    size = SIZES[cfg.model_size]
    tokens = {
        "image": (size.image_size // size.patch) ** 2 + 1,
        "text": CONTEXT,
        "audio": round(cfg.clip_seconds * FRAMES_A_SECOND) // FRAMES_A_TOKEN,
    }
    return tokens | {"fusion": sum(tokens.values()) + 1}


def _activations(cfg: Config, value_bytes: int) -> int:
    """Bytes that one batch's graph keeps, and the largest moment beside it."""
    size, tokens = SIZES[cfg.model_size], _tokens(cfg)
    shapes: dict[str, Shape] = {
        "image": size.image,
        "text": size.text,
        "audio": size.audio,
        "fusion": size.fusion,
    }
    kept = moment = 0
    for name, shape in shapes.items():
        one = cfg.batch_size * tokens[name] * shape.width
        inside = one * _KEPT_IN_BLOCK * value_bytes
        # the residual stream is float32, whatever the blocks compute in
        kept += shape.layers * one * 4 if cfg.use_checkpoint else shape.layers * (one * 4 + inside)
        # and each tower's first and last layers: convolutions, embeddings, norms
        kept += 6 * one * 4
        if name == "audio":  # before the two strides: 4 and 2 values a token
            kept += 2 * (4 + 2) * one * 4
        moment = max(moment, 2 * inside)  # the block, and the gradients inside it
    labels = cfg.batch_size * NUM_LABELS * 4
    return kept + (moment if cfg.use_checkpoint else moment // 2) + labels
