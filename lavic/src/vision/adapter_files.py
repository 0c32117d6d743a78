"""What is checked before torch is imported: adapter files, base models, bitsandbytes.

Standard library only.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from shared.errors import MissingToolError, UserError
from shared.files import read_json

SETTINGS = "adapter_config.json"
# What the stages leave in their run directories.
DISTILLED, RECOMMENDER = "vision_lora_adapter_best", "trained_lora_adapter"
ABOUT, VISION = "recommender.json", "vision_lora_adapter"  # stage 2's, beside its adapter


def stage_of(adapter: Path) -> int | None:
    """1 for an adapter of the vision tower, 2 for a recommender, None for anything else."""
    targets = str(_settings(adapter).get("target_modules"))
    if "vision_tower" in targets:
        return 1
    return 2 if "language_model" in targets and (adapter / ABOUT).is_file() else None


def trained_in(directory: Path) -> Path | None:
    """The adapter that `directory` is, or that a run has left in it."""
    for path in (directory, directory / RECOMMENDER, directory / DISTILLED):
        if (path / SETTINGS).is_file():
            return path
    return None


def base_of(adapter: Path, typed: str | None = None) -> str:
    """The base model: the one `typed`, else the one that the adapter was trained on.

    Raises UserError when there is none, or when it is a path that leads nowhere; whether the Hub
    has an id, owner/name, is for the Hub to say.
    """
    stored = _settings(adapter).get("base_model_name_or_path")
    name = typed or stored
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter} does not name its base model: type --model-name")
    check_base(name, f" (the adapter was trained on {stored})")
    return name


def check_base(name: str, remark: str = "") -> None:
    """Raise UserError, with the remark, for a path that leads nowhere; a Hub's id passes."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") != 1
    if is_path and not Path(name).is_dir():
        raise UserError(
            f"the base model {name} is not there{remark}: type --model-name with its directory, or "
            "with its id on the Hub"
        )


def check_four_bit(wanted: bool) -> None:
    """Raise MissingToolError when --load_in_4bit lacks its package."""
    if wanted and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingToolError(
            "--load_in_4bit needs the Python package bitsandbytes: "
            f"{sys.executable} -m pip install bitsandbytes"
        )


def _settings(adapter: Path) -> dict[str, Any]:
    found = read_json(adapter / SETTINGS)
    return found if isinstance(found, dict) else {}
