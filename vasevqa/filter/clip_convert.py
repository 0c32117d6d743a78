"""A CLIP folder of transformers as open_clip's configuration and weights.

Both libraries hold the same network. transformers keeps queries, keys and values apart and writes
every linear layer the usual way; open_clip has them stacked, and its two projections transposed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import weights
from shared.errors import UserError
from shared.files import read_object

_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
_IN_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OUTSIDE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # transformers' own spelling
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """open_clip's model_cfg, preprocess_cfg and state dict for a transformers CLIP folder.

    Raises UserError when the folder is not whole or holds another activation.
    """
    config = read_object(folder / "config.json")
    return _model_cfg(folder, config), _preprocess_cfg(folder), _state(weights.read(folder))


def _model_cfg(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    # what transformers does not write into config.json has the size of ViT-B-32
    vision = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12,
              "intermediate_size": 3072, "patch_size": 32, "image_size": 224,
              "hidden_act": "quick_gelu"} | (config.get("vision_config") or {})  # fmt: skip
    text = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 12,
            "intermediate_size": 2048, "vocab_size": 49408, "max_position_embeddings": 77,
            "hidden_act": "quick_gelu"} | (config.get("text_config") or {})  # fmt: skip
    kinds = {vision["hidden_act"], text["hidden_act"]}
    if len(kinds) != 1 or not kinds <= {"gelu", "quick_gelu"}:
        raise UserError(
            f"{folder / 'config.json'}: hidden_act {', '.join(sorted(kinds))} cannot be read; "
            "allowed: gelu or quick_gelu, the same for both towers"
        )
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": kinds == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "layers": text["num_hidden_layers"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }


def _preprocess_cfg(folder: Path) -> dict[str, Any]:
    """Mean, standard deviation and resampling, where the folder has its own."""
    written = read_object(folder / "preprocessor_config.json")
    names = {"image_mean": "mean", "image_std": "std"}
    found: dict[str, Any] = {
        new: tuple(written[old]) for old, new in names.items() if old in written
    }
    if written.get("resample") in _RESAMPLE:
        found["interpolation"] = _RESAMPLE[written["resample"]]
    return found


def _state(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' tensors under open_clip's names."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in given.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            found |= _outside(name, tensor)
            continue
        tower = "visual." if block[1] == "vision" else ""
        start = f"{tower}transformer.resblocks.{block[2]}."
        inner, _, kind = block[3].rpartition(".")
        if inner in _IN_BLOCK:
            found[f"{start}{_IN_BLOCK[inner]}.{kind}"] = tensor
        else:  # self_attn.q_proj and its like
            part = inner.rpartition(".")[2][0]
            stacks.setdefault(f"{start}attn.in_proj_{kind}", {})[part] = tensor
    for name, parts in stacks.items():
        found[name] = torch.cat([parts[letter] for letter in "qkv"])
    return found


def _outside(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name in _TRANSPOSED:
        return {_TRANSPOSED[name]: tensor.T.contiguous()}
    if name in _OUTSIDE:
        return {_OUTSIDE[name]: tensor}
    return {} if name.endswith("position_ids") else {name: tensor}  # unknown: named when loading
