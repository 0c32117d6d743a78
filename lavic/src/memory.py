"""What the estimates of both stages share: the model without values, precision, recomputation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lavic.src.llava import MOST_VIEWS
from shared import memory
from shared.errors import UserError, one_line
from shared.precision import Amp

HUB_ID = "llava-hf/llava-v1.6-mistral-7b-hf"
ITEMS = list(range(1, 1 + MOST_VIEWS))  # any five ids in a row
_REAL = Path(__file__).with_name("llava_v16_mistral_7b.json")
_SMALLEST = 20 * memory.GB  # the GPU that the document names


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


def base_model(model_name: str, dtype: str) -> Any:
    """The frozen model, as load_base gives it."""
    from transformers import LlavaNextForConditionalGeneration

    model: Any = LlavaNextForConditionalGeneration(configuration(model_name))
    half = torch.float32 if dtype == "float32" else torch.bfloat16
    return model.requires_grad_(False).eval().to(half)


def amp_of(cfg: Any) -> Amp:
    """The precision of the settings, without loss scaling."""
    scaled = cfg.dtype == "float16" and cfg.run.amp == "off"
    return Amp("bf16" if scaled else memory.mode_of(cfg.run.amp), memory.CPU)


def recomputes(cfg: Any, below: int) -> bool:
    """What --gradient_checkpointing comes to on the smallest GPU here; without any, of 20 GB."""
    if cfg.gradient_checkpointing != "auto":
        return cfg.gradient_checkpointing == "on"
    return min((size for _, size in memory.devices()), default=_SMALLEST) < below
