"""LoRA adapters on LLaVA-NeXT: made, saved as peft does, and loaded whole or not at all.

Adapters written under older transformers have other names for the same modules; they are read too:
    4.4x    vision_tower.vision_model.encoder…  multi_modal_projector…  language_model.model…
    4.5x    model.vision_tower.vision_model.encoder…  model.multi_modal_projector…
    5.x     model.vision_tower.encoder…  model.multi_modal_projector…  model.language_model…
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lavic.src.vision.adapter_files import SETTINGS
from shared import weights
from shared.errors import UserError, one_line
from shared.files import read_json

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

WEIGHTS = "adapter_model.safetensors"
# A module's name in older versions → its name now; peft applies the first that matches.
_MODERN = {
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": "model.vision_tower.",
    r"^(?:model\.)?multi_modal_projector\.": "model.multi_modal_projector.",
    r"^language_model\.model\.": "model.language_model.",
}
_PREFIX = "base_model.model."
_IN_MODEL = re.compile(r"\.(lora_[AB])\.default\.")


def add_adapter(
    model: nn.Module, targets: str, *, r: int = 8, alpha: int = 32, dropout: float = 0.1
) -> PeftModel:
    """`model` with fresh, trainable LoRA on every Linear whose full name the regex matches.

    The adapter is float32 whatever the base's dtype; its first output is zero.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)  # type: ignore[arg-type, return-value]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA parameters under the names they have in adapter files."""
    found = ((name, p) for name, p in model.named_parameters() if _IN_MODEL.search(name))
    return {_IN_MODEL.sub(r".\1.", name): parameter for name, parameter in found}


class AdapterState:
    """The adapter's parameters alone, as a part of checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self._own = adapter_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """The parameters under the names of adapter files, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self._own.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises ValueError when it is not of this adapter."""
        if self._own.keys() != state.keys():
            raise ValueError(f"an adapter of {len(state)} tensors, this one has {len(self._own)}")
        with torch.no_grad():
            for name, parameter in self._own.items():
                parameter.copy_(state[name])


def save_adapter(model: PeftModel, processor: Any, directory: Path) -> None:
    """Write adapter_model.safetensors, adapter_config.json, README.md and the processor's files.

    Each file is put in place in one step: a reader, or a kill, finds the old adapter or the new.
    Raises OSError when the disk refuses them.
    """
    from safetensors import SafetensorError

    making = directory.with_name(f".{directory.name}.saving")
    shutil.rmtree(making, ignore_errors=True)  # of a run that was killed while it saved
    try:
        model.save_pretrained(str(making), save_embedding_layers=False)
        processor.save_pretrained(str(making))
    except (SafetensorError, OSError) as error:
        shutil.rmtree(making, ignore_errors=True)
        raise OSError(one_line(error)) from None
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(making.iterdir(), key=lambda path: path.name == WEIGHTS):
        path.replace(directory / path.name)  # the weights last
    making.rmdir()


def load_adapter(model: nn.Module, directory: Path) -> PeftModel:
    """`model` with the adapter of `directory` on it, frozen and in eval.

    Raises UserError when a file is missing or damaged, and when the weights there are not exactly
    those that its adapter_config.json asks for in this model.
    """
    from peft import PeftModel

    settings, stored = _settings(directory), _names_in(directory)
    try:
        wrapped = PeftModel.from_pretrained(
            model,  # type: ignore[arg-type]
            str(directory),
            config=settings,
            key_mapping=_MODERN,
            torch_device="cpu",
        )
    except (RuntimeError, ValueError, KeyError) as error:  # other shapes; no module of this name
        raise UserError(f"{directory} does not fit this model: {one_line(error)}") from None
    _check_names(adapter_parameters(wrapped).keys(), stored, directory)
    return wrapped.eval()


def _modern(name: str) -> str:
    """The name in transformers 5 of a parameter or module of an adapter of any version."""
    prefix = _PREFIX if name.startswith(_PREFIX) else ""
    plain = name.removeprefix(prefix)
    for old, new in _MODERN.items():
        plain, found = re.subn(old, new, plain)
        if found:
            break
    return prefix + plain


def _settings(directory: Path) -> LoraConfig:
    from peft import LoraConfig

    path = directory / SETTINGS
    if not path.is_file():
        raise UserError(f"{path} is missing: {directory} is no adapter; train stage 1 first")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise UserError(f"{path} does not describe a LoRA adapter")
    targets = content.get("target_modules")
    if isinstance(targets, list):
        targets = sorted(_modern(str(target)) for target in targets)
    if not targets:
        raise UserError(f"{path} names no target_modules")
    numbers: dict[str, Any] = {"lora_dropout": 0.0} | {
        name: content[name] for name in ("r", "lora_alpha", "lora_dropout") if name in content
    }
    bad = [name for name in ("r", "lora_alpha", "lora_dropout") if not _is_number(numbers, name)]
    if bad:
        raise UserError(f"{path}: {bad[0]} is no number: copy the adapter again")
    try:
        return LoraConfig(
            **numbers,
            target_modules=targets,
            exclude_modules=content.get("exclude_modules"),
            use_rslora=bool(content.get("use_rslora")),
            task_type=content.get("task_type"),
            base_model_name_or_path=content.get("base_model_name_or_path"),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a LoRA adapter: {one_line(error)}") from None


def _is_number(values: dict[str, Any], name: str) -> bool:
    value = values.get(name, "")
    return isinstance(value, int | float) and math.isfinite(value)


def _names_in(directory: Path) -> set[str]:
    """The modern names of the weights there. Raises UserError for a missing or damaged file."""
    old, path = directory / "adapter_model.bin", directory / WEIGHTS
    found = weights.read(old if old.is_file() and not path.exists() else path)
    return {_modern(name) for name in found}


def _check_names(own: Any, stored: set[str], directory: Path) -> None:
    """Raise UserError unless the adapter and its file name the same weights."""
    kinds = {"missing": own - stored, "unexpected": stored - own}
    wrong = [
        f"{len(names)} {kind} ({', '.join(sorted(names)[:2])}{', …' if len(names) > 2 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if wrong:
        raise UserError(
            f"{directory} does not fit this model: {'; '.join(wrong)}; use the base model it was "
            "trained on, or train it again"
        )
