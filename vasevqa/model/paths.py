"""Which values of a swift command are paths, and what they are relative to.

What a script's list of flags says is relative to model/, what the user typed to where it was
typed. A value that may also be a hub's id stays one unless it looks like a path. Standard library
only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from shared.errors import UserError
from vasevqa.model.swift_flags import Flags

ALWAYS = ("output_dir", "resume_from_checkpoint", "logging_dir", "external_plugins", "resume")
OR_HUB_ID = (
    *("model", "dataset", "val_dataset", "adapters"),
    *("ref_model", "ref_adapters", "reward_model", "reward_adapters", "custom_dataset_info"),
)
BY_ENDING = {"system": ".txt", "deepspeed": ".json", "chat_template": ".jinja"}
RESUME_WORDS = ("auto", "latest", "never")
_FILES = (".json", ".jsonl", ".csv", ".txt")
_SAMPLE = re.compile(r"#\d+$")  # data.json#500: that many rows of it


def absolute(flags: Mapping[str, list[str]], base: Path) -> Flags:
    """`flags` with every path made absolute; relative ones begin at `base`."""
    return {name: [_value(name, value, base) for value in values] for name, values in flags.items()}


def without_sample(dataset: str) -> str:
    """A data set's path without swift's `#500`, the number of rows to take."""
    return _SAMPLE.sub("", dataset)


def is_local(value: str) -> bool:
    """Whether a model or data set is meant to lie on this machine, there or not."""
    value = without_sample(value)
    looks = value.startswith(("/", "./", "../", "~")) or value in (".", "..")
    return looks or value.endswith(_FILES) or value.count("/") > 1 or Path(value).exists()


def _value(name: str, value: str, base: Path) -> str:
    ending = BY_ENDING.get(name)
    if name in (*ALWAYS, "run_dir") and not value.strip():
        raise UserError(f"--{name} is empty (an unset variable?): name a path")
    if name == "resume" and value in RESUME_WORDS:
        return value
    if name in ALWAYS or (ending and value.endswith(ending)):
        return str(_join(base, value))
    if name in OR_HUB_ID:
        sample = value[len(without_sample(value)) :]
        path = _join(base, without_sample(value))
        return f"{path}{sample}" if is_local(value) or path.exists() else value
    return value


def _join(base: Path, value: str) -> Path:
    path = Path(value).expanduser()
    return path if path.is_absolute() else Path(base, path)
