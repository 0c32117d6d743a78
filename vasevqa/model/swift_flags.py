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

from shared import settings
from shared.errors import UserError, did_you_mean, shortened
from shared.settings import COUNTS, SIZES, WORKERS, Range

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
ANY = Range(-Range.high)
_COUNT, _POSITIVE, _NOT_NEGATIVE = (int, COUNTS), (float, Range(above=True)), (float, Range())
_SEED = (int, Range(0, 2**32 - 1))  # which swift hands to numpy
# The ranges of numbers whose flags say no to others only after swift's imports, or in a traceback.
_NUMBERS: dict[str, tuple[type, Range]] = {
    "learning_rate": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "max_steps": (int, Range(-1, COUNTS.high)),
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "steps_per_generation": _COUNT,
    "generation_batch_size": _COUNT,
    "num_generations": _COUNT,
    "max_completion_length": _COUNT,
    "max_length": _COUNT,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "logging_steps": _POSITIVE,
    "save_total_limit": _COUNT,
    "dataloader_num_workers": (int, WORKERS),
    "dataset_num_proc": (int, WORKERS),
    "seed": _SEED,
    "data_seed": _SEED,
    "lora_rank": (int, SIZES),
    "lora_alpha": _COUNT,
    "lora_dropout": (float, Range(0, 1, below=True)),
    "split_dataset_ratio": (float, Range(0, 1, below=True)),
    "warmup_ratio": (float, Range(0, 1)),
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "temperature": _POSITIVE,
    "beta": _NOT_NEGATIVE,
}
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
            raise UserError(f"{shortened(word)}: expected --flag value; every setting has a name")
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


def check_numbers(flags: Flags) -> None:
    """Raise UserError for a number that is not finite or outside of its flag's range."""
    for name, values in flags.items():
        kind, allowed = _NUMBERS.get(name, (float, ANY))
        for value in values:
            if name in _NUMBERS or _is_number(value):
                settings.number(f"--{name}", value, kind, allowed)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


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
    return settings.number(f"--{name}", text(flags, name, str(default)), float, ANY)


def whole(flags: Mapping[str, list[str]], name: str, default: int) -> int:
    """A flag as a whole number. Raises UserError when it is none."""
    value = number(flags, name, default)
    return settings.number(f"--{name}", int(value) if value.is_integer() else value, int, ANY)


def is_true(flags: Mapping[str, list[str]], name: str, default: bool = False) -> bool:
    """A yes-or-no flag; typed alone it means yes."""
    if name not in flags:
        return default
    return text(flags, name, "true").lower() in ("true", "1", "yes", "y", "t", "on")
