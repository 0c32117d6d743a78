"""A swift command's flags as a mapping: read, translated from older releases, checked, written.

`--flag value`, `--flag=value`, `--flag a b` and `--flag` alone; `-` and `_` in names are the same.
Standard library only.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from shared.errors import UserError, did_you_mean

Flags = dict[str, list[str]]  # name without dashes, with underscores → its values

# What releases 2 and 3 called what release 4 calls otherwise.
OLD_NAMES = {
    "train_type": "tuner_type",
    "sft_type": "tuner_type",
    "model_id_or_path": "model",
    "template_type": "template",
    "dtype": "torch_dtype",
    "custom_register_path": "external_plugins",
    "custom_train_dataset_path": "dataset",
    "custom_val_dataset_path": "val_dataset",
    "dataset_test_ratio": "split_dataset_ratio",
    "lora_target_modules": "target_modules",
    "lora_dropout_p": "lora_dropout",
    "lora_lr_ratio": "lorap_lr_ratio",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "evaluation_strategy": "eval_strategy",
    "quantization_bit": "quant_bits",
    "deepspeed_config_path": "deepspeed",
    "preprocess_num_proc": "dataset_num_proc",
    "ckpt_dir": "adapters",
}

# Where swift 4, transformers and trl declare the settings that become flags.
_DECLARED_IN = (
    ("swift", "arguments/**/*.py"),
    ("swift", "trainers/*.py"),
    ("swift", "rlhf_trainers/*.py"),
    ("swift", "ray_utils/*.py"),
    ("transformers", "training_args*.py"),
    ("trl", "trainer/*config.py"),
    ("trl", "trainer/*args*.py"),
)
_FIELD = re.compile(r"^    ([a-zA-Z_]\w*) *:", re.MULTILINE)


def read(words: Iterable[str]) -> Flags:
    """The flags in `words`; of one typed twice the last counts. Raises UserError for strays."""
    flags: Flags = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            written, equals, value = word[2:].partition("=")
            name = written.replace("-", "_")
            flags[name] = [value] if equals else []
        elif not name:
            raise UserError(f"{word}: expected --flag value; every setting has a name")
        else:
            flags[name].append(word)
    return flags


def translate(flags: Mapping[str, list[str]]) -> tuple[Flags, list[str]]:
    """`flags` under today's names, and a line for each that was written in an older way.

    Raises UserError when a flag is given under both names with different values.
    """
    found: Flags = {}
    notes: list[str] = []
    for name, values in flags.items():
        today = OLD_NAMES.get(name, name)
        if today in found and found[today] != values:
            raise UserError(
                f"--{name} and --{today} are the same setting, given twice: "
                f"{' '.join(values)} and {' '.join(found[today])}; leave one out"
            )
        if today != name:
            notes.append(f"--{name} of older ms-swift is --{today} now")
        found[today] = values
    return found, notes


def refuse_unknown(flags: Iterable[str]) -> None:
    """Raise UserError for a name that no setting of the installed swift has.

    swift itself says so only after its imports. Does nothing where its sources are not to be read.
    """
    known = declared()
    for name in flags:
        if known and name not in known:
            near = did_you_mean(f"--{name}", sorted(f"--{word}" for word in known))
            raise UserError(
                f"unknown argument --{name}{near or '; `swift sft --help` lists the flags'}"
            )


@cache
def declared() -> frozenset[str]:
    """Every name declared where swift's settings are: all flags, and a few names more."""
    found: set[str] = set()
    for package, pattern in _DECLARED_IN:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            for path in Path(root).glob(pattern):
                found.update(_FIELD.findall(path.read_text(encoding="utf-8", errors="replace")))
    return frozenset(found)


def write(flags: Mapping[str, list[str]]) -> list[str]:
    """The words of a command line."""
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


def text(flags: Mapping[str, list[str]], name: str, default: str = "") -> str:
    """The first value of a flag, or `default` when it is not there or stands alone."""
    return (flags.get(name) or [default])[0]


def number(flags: Mapping[str, list[str]], name: str, default: float) -> float:
    """A flag as a number. Raises UserError when it is none."""
    value = text(flags, name, str(default))
    try:
        return float(value)
    except ValueError:
        raise UserError(f"--{name} {value} must be a number") from None


def whole(flags: Mapping[str, list[str]], name: str, default: int) -> int:
    """A flag as a whole number. Raises UserError when it is none."""
    value = number(flags, name, default)
    if value != int(value):
        raise UserError(f"--{name} {text(flags, name)} must be a whole number")
    return int(value)


def is_true(flags: Mapping[str, list[str]], name: str, default: bool = False) -> bool:
    """A yes-or-no flag; typed alone it means yes."""
    if name not in flags:
        return default
    return text(flags, name, "true").lower() in ("true", "1", "yes", "y", "t", "on")
