"""From a script's flags and the user's to the swift command that is run, and how long it will be.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared import settings
from shared.errors import UserError
from shared.files import read_json
from shared.settings import COUNTS, PORTS, PROCESSES
from vasevqa.model import paths, swift_flags
from vasevqa.model.swift_flags import Flags

# Flags of ours, which swift does not know.
OWN = (
    *("demo", "resume", "dry_run", "print_config", "estimate", "image_check", "no_image_check"),
    *("run_dir", "nproc", "nproc_per_node", "skip_bad_rows"),
)
COMMANDS = {"sft": "sft", "grpo": "rlhf"}  # script → swift's command
# A value that may change while the numbers stay the same: the run is still the same run.
FREE = frozenset({
    *("dataloader_num_workers", "dataset_num_proc", "logging_steps", "save_steps", "eval_steps"),
    *("save_total_limit", "report_to", "logging_dir", "output_dir", "log_completions"),
    *("resume_from_checkpoint", "check_model", "callbacks", "create_checkpoint_symlink"),
    *("per_device_eval_batch_size", "eval_strategy", "save_strategy"),
    "strict",
})  # fmt: skip
ARCHITECTURE = "qwen2_5_vl"
_PLUGINS = Path(__file__).resolve().parent / "plugin"


@dataclass(frozen=True)
class Plan:
    """What will be run. `own` are the flags that stay here, `documented` those of the script
    itself; notes are lines for the log.
    """

    script: str
    flags: Flags
    own: Flags = field(default_factory=dict)
    documented: Flags = field(default_factory=dict)
    world_size: int = 1
    notes: tuple[str, ...] = ()

    @property
    def is_grpo(self) -> bool:
        """Whether answers are generated and rewarded."""
        return self.script == "grpo"

    @property
    def output_dir(self) -> Path:
        """Where checkpoints, log and status go."""
        return Path(swift_flags.text(self.flags, "output_dir"))

    @property
    def command(self) -> list[str]:
        """The words after `swift`."""
        return [COMMANDS[self.script], *swift_flags.write(self.flags)]

    @property
    def wants_all_pictures(self) -> bool:
        """Whether every picture is decoded before training, and not a sample alone."""
        return "no_image_check" not in self.own and swift_flags.is_true(
            self.own, "image_check", default=True
        )

    @property
    def datasets(self) -> list[Path]:
        """The data sets that are files: those to train on, then those to validate with."""
        return self.train_files + self._files("val_dataset")

    @property
    def train_files(self) -> list[Path]:
        """The data sets to train on that are files."""
        return self._files("dataset")

    @property
    def wants_every_row(self) -> bool:
        """Whether training is to see each row of them at least once."""
        sampled = any(name != paths.without_sample(name) for name in self.flags.get("dataset", ()))
        limited = swift_flags.whole(self.flags, "max_steps", -1) > 0
        return (
            not (sampled or limited) and swift_flags.number(self.flags, "num_train_epochs", 1) >= 1
        )

    def _files(self, flag: str) -> list[Path]:
        names = self.flags.get(flag, ())
        return [Path(paths.without_sample(name)) for name in names if paths.is_local(name)]

    @property
    def identity(self) -> dict[str, Any]:
        """What a continued run must share."""
        shared: dict[str, Any] = {
            name: value for name, value in self.flags.items() if name not in FREE
        }
        return shared | {"world_size": self.world_size}


def make(script: str, documented: list[str], typed: list[str], here: Path, there: Path) -> Plan:
    """The plan of `script` with its own flags, written for the directory `there`, and the typed.

    here: where the command was typed. Typed flags win. Raises UserError for what nobody knows.
    """
    base, base_notes = swift_flags.translate(swift_flags.read(documented))
    own_words, notes = swift_flags.translate(swift_flags.read(typed))
    documented_flags = paths.absolute(base, there)
    flags = documented_flags | paths.absolute(own_words, here)
    own = {name: flags.pop(name) for name in OWN if name in flags}
    if "run_dir" in own:
        flags["output_dir"] = [str(here / swift_flags.text(own, "run_dir"))]
    swift_flags.refuse_unknown(flags)
    swift_flags.check_numbers(flags)
    if not flags.get("output_dir"):
        raise UserError("--output_dir is not given: name a directory for checkpoints and log")
    return Plan(script, flags, own, documented_flags, notes=(*base_notes, *notes))


def for_this_machine(plan: Plan, visible_gpus: int, environ: Mapping[str, str]) -> Plan:
    """`plan` with what swift needs told on this machine and for this model; the user's stays.

    Raises UserError for more processes than there are GPUs.
    """
    flags = dict(plan.flags)
    if visible_gpus == 0:
        flags.setdefault("use_cpu", ["true"])
    flags.setdefault("check_model", ["false"])  # else 7 s of asking a hub about a directory
    flags.setdefault("add_version", ["false"])  # checkpoints lie where the documents look for them
    flags.setdefault("strict", ["true"])  # else swift takes another row for one it cannot read
    callbacks = flags.get("callbacks", [])
    if "graceful_exit" not in callbacks:
        flags["callbacks"] = [*callbacks, "graceful_exit"]  # SIGTERM saves
    own = ["receipt.py", "adapt.py"] if plan.is_grpo else ["receipt.py"]
    own = [str(_PLUGINS / name) for name in own]
    flags["external_plugins"] = [*flags.get("external_plugins", []), *own]
    if architecture(swift_flags.text(flags, "model")) == ARCHITECTURE:
        flags.setdefault("model_type", [ARCHITECTURE])  # a directory's name alone does not say it
        flags.setdefault("template", [ARCHITECTURE])
    return replace(plan, flags=flags, world_size=_world_size(environ, visible_gpus))


def architecture(model: str) -> str | None:
    """model_type of a model directory's config.json."""
    config = read_json(Path(model) / "config.json") if model else None
    return config.get("model_type") if isinstance(config, dict) else None


def max_pixels(environ: Mapping[str, str]) -> int:
    """Pixels that larger pictures are scaled down to, as in the scripts. Raises UserError."""
    return settings.number("MAX_PIXELS", environ.get("MAX_PIXELS") or 1003520, int, COUNTS)


def num_steps(plan: Plan, num_rows: int) -> int:
    """Optimizer steps of the run, as swift will count them."""
    most = swift_flags.whole(plan.flags, "max_steps", -1)
    if most > 0:
        return most
    kept = num_rows * (1 - swift_flags.number(plan.flags, "split_dataset_ratio", 0.0))
    batch = swift_flags.whole(plan.flags, "per_device_train_batch_size", 1) * plan.world_size
    accumulated = swift_flags.whole(plan.flags, "gradient_accumulation_steps", 1)
    samples = kept
    if plan.is_grpo:  # every row is answered num_generations times
        samples *= swift_flags.whole(plan.flags, "num_generations", 8)
    per_epoch = math.ceil(math.ceil(samples / batch) / accumulated)
    return math.ceil(per_epoch * swift_flags.number(plan.flags, "num_train_epochs", 3))


def checkpoint_bytes(plan: Plan) -> int:
    """About how large one checkpoint will be; 0 when the model lies on a hub."""
    model = Path(swift_flags.text(plan.flags, "model"))
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if swift_flags.text(plan.flags, "tuner_type", "lora") != "full":
        return weights // 50  # rank 8 on 7B: 0.3 GB with AdamW's moments beside 16 GB
    return weights * (1 if swift_flags.is_true(plan.flags, "save_only_model") else 3)


def num_checkpoints(plan: Plan, steps: int) -> int:
    """How many checkpoints will lie on the disk at once."""
    every = max(1, int(swift_flags.number(plan.flags, "save_steps", 500)))
    limit = swift_flags.whole(plan.flags, "save_total_limit", 10**6)
    return min(limit, math.ceil(steps / every))


def _world_size(environ: Mapping[str, str], visible_gpus: int) -> int:
    ranges = {"NPROC_PER_NODE": PROCESSES, "NNODES": COUNTS, "MASTER_PORT": PORTS}
    sizes = {
        name: settings.number(name, environ.get(name) or 1, int, allowed)
        for name, allowed in ranges.items()
    }
    if visible_gpus and sizes["NPROC_PER_NODE"] > visible_gpus:
        raise UserError(
            f"NPROC_PER_NODE={sizes['NPROC_PER_NODE']}, but {visible_gpus} GPU(s) are visible "
            f"(CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES', 'unset')}): lower the one "
            "or widen the other"
        )
    return sizes["NPROC_PER_NODE"] * sizes["NNODES"]
