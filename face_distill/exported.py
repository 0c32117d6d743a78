"""An exported adapter: the trained tensors of a student, and all that is known of them.

    OUT/model.safetensors   adapters and, unless left out, the head
    OUT/config.json         `facts`
    OUT/README.md           the model card (model_card.py)

What is written holds no path of this machine: the directory is meant to be given away.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from face_distill.model import Adapter
from face_distill.model_card import model_card
from face_distill.preprocess import CLIP_MEAN, CLIP_STD
from face_distill.run_settings import BEST, SETTINGS, settings_of
from face_distill.trained import AdapterShape, adapter_shape, read_trained, stored_image_size
from shared import weights
from shared.errors import UserError
from shared.files import read_json, write_atomic, write_json, write_text

SCHEMA = 1
KIND = "face_adapter"
TENSORS = "model.safetensors"
CARD = "README.md"
FACE_SIZE = 112

_TRAINED = re.compile(r"vit\.encoder\.layers\.\d+\.mlp\.adapter\..+|head\..+")
# The vision tower and the language model of the checkpoint that the recipe asks for.
_KNOWN_TOWER = {"hidden_size": 1408, "num_hidden_layers": 39, "image_size": 224, "patch_size": 14}
_KNOWN_TEXT = {"model_type": "opt", "hidden_size": 2560, "num_hidden_layers": 32}
_KNOWN_NAME = "Salesforce/blip2-opt-2.7b"


def trained_parts(checkpoint: Path, *, head: bool = True) -> dict[str, Tensor]:
    """Adapters and head of a trainable-only or full checkpoint, as the file has them.

    Raises UserError when there are no adapters, one lacks a part, or a value is not finite.
    """
    state = read_trained(checkpoint)
    shape = adapter_shape(state, checkpoint)
    parts = Adapter(1, 1).state_dict()
    wanted = {f"vit.encoder.layers.{i}.mlp.adapter.{part}" for i in shape.layers for part in parts}
    if missing := sorted(wanted - state.keys()):
        raise UserError(
            f"{checkpoint} lacks {len(missing)} tensors of its adapters ({missing[0]}, …): it is "
            "damaged or of another program"
        )
    kept = {
        name: tensor
        for name, tensor in sorted(state.items())
        if _TRAINED.fullmatch(name) and (head or not name.startswith("head."))
    }
    broken = [name for name, tensor in kept.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UserError(f"{checkpoint}: {broken[0]} is not finite, its run diverged; give another")
    return kept


def facts(checkpoint: Path, state: dict[str, Tensor], tower: Path | None) -> dict[str, Any]:
    """What config.json says: what loading and use need, and where the tensors come from.

    tower: the BLIP-2 directory, of which only config.json is read; None when it is not at hand.
    Raises UserError when the tower is not the one of these adapters.
    """
    shape = adapter_shape(state, checkpoint)
    width = state[f"vit.encoder.layers.{shape.layers[0]}.mlp.adapter.down_proj.weight"].shape[1]
    base = base_model(tower) if tower else None
    _check_tower(checkpoint, tower, base, shape, width)
    size = stored_image_size(checkpoint) or (base or {}).get("image_size")
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "adapter": {"layers": shape.layers, "bottleneck": shape.bottleneck},
        "embedding_dim": width,
        "image_size": size,
        "base_model": base,
        "preprocessing": {
            "faces": f"cropped and aligned, RGB, {FACE_SIZE} x {FACE_SIZE} pixels",
            "resize": "bicubic, antialias, to image_size",
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
        },
        "head": _head(state, settings_of(checkpoint)),
        "training": _training(checkpoint),
        "verification": _verification(checkpoint),
        "source": {"file": checkpoint.name, "sha256": _sha256(checkpoint)},
    }


def base_model(tower: Path) -> dict[str, Any] | None:
    """The tower's name on the Hub, None for an unknown one, and its sizes; None without any.

    tower: a BLIP-2 directory, or that of a vision tower alone.
    """
    content = read_json(tower / "config.json")
    vision = content.get("vision_config", content) if isinstance(content, dict) else None
    if not isinstance(vision, dict):
        return None
    sizes = {name: vision.get(name) for name in _KNOWN_TOWER}
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        return None
    text = content.get("text_config")
    text = text if isinstance(text, dict) else {}
    is_known = sizes == _KNOWN_TOWER and _KNOWN_TEXT.items() <= text.items()
    return {"name": _KNOWN_NAME if is_known else None, **sizes}


def is_export(directory: Path) -> bool:
    """Whether `directory` holds an exported adapter."""
    content = read_json(directory / SETTINGS)
    return isinstance(content, dict) and content.get("kind") == KIND


def holds(directory: Path, state: dict[str, Tensor], content: dict[str, Any]) -> bool:
    """Whether the export in `directory` is, tensor for tensor, the one that would be written."""
    if read_json(directory / SETTINGS) != content or not (directory / CARD).is_file():
        return False
    try:
        there = weights.read(directory / TENSORS)
    except UserError:
        return False
    return there.keys() == state.keys() and all(torch.equal(there[n], t) for n, t in state.items())


def write(directory: Path, state: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Write the three files into `directory`, config.json last: with it the export is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    encoded = save(tensors, metadata={"format": "pt"})
    write_atomic(directory / TENSORS, lambda stream: (stream.write(encoded), None)[1])
    write_text(directory / CARD, model_card(content, directory.name))
    write_json(directory / SETTINGS, content)


def _check_tower(
    checkpoint: Path,
    tower: Path | None,
    base: dict[str, Any] | None,
    shape: AdapterShape,
    width: int,
) -> None:
    if base and (base["hidden_size"] != width or base["num_hidden_layers"] <= shape.layers[-1]):
        raise UserError(
            f"{checkpoint} has adapters of width {width} up to layer {shape.layers[-1]}, the tower "
            f"in {tower} has {base['num_hidden_layers']} layers of width {base['hidden_size']}: "
            "give the tower it was trained on (--blip-path)"
        )


def _head(state: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Any] | None:
    centres = state.get("head.weight")
    if centres is None:
        return None
    return {
        "classes": centres.shape[0],
        **{
            name: value
            for name in ("arc_scale", "arc_margin")
            if _is_plain(value := settings.get(name))
        },
    }


def _training(checkpoint: Path) -> dict[str, Any]:
    """The settings that decided the numbers of the run beside `checkpoint`; paths are not among."""
    content = read_json(checkpoint.parent / SETTINGS)
    found = content.get("identity") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """Whether a setting is text, a switch or a number that JSON can hold."""
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _verification(checkpoint: Path) -> dict[str, Any] | None:
    """The accuracies that training noted; they are those of the best student alone."""
    note = read_json(checkpoint.parent / "verification.json")
    if checkpoint.name != BEST or not isinstance(note, dict):
        return None
    before, after = note.get("before"), note.get("after")
    if not all(isinstance(value, float) and _is_plain(value) for value in (before, after)):
        return None
    return {"pairs": Path(str(note.get("pairs"))).name, "before": before, "after": after}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
