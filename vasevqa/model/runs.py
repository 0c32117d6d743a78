"""What earlier runs left in a run directory: checkpoints that are whole, and how to continue.

Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared import status
from shared.device import driver_version, present_gpus
from shared.errors import UserError
from shared.files import read_json, write_json
from vasevqa.model import swift_flags
from vasevqa.model.needs import broken_safetensors
from vasevqa.model.paths import RESUME_WORDS
from vasevqa.model.plan import Plan
from vasevqa.model.swift_flags import Flags

log = logging.getLogger(__name__)

CONFIG = "config.json"
_NUMBERED = re.compile(r"checkpoint-(\d+)")
_PACKAGES = ("ms-swift", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed")


@dataclass(frozen=True)
class Checkpoint:
    """A directory checkpoint-N that swift has written to its end."""

    path: Path
    step: int

    @property
    def is_adapter(self) -> bool:
        """Whether it holds LoRA weights and no model."""
        return (self.path / "adapter_config.json").is_file()

    @property
    def written_at(self) -> float:
        """When its last file was written."""
        return (self.path / "trainer_state.json").stat().st_mtime


def files_of(directory: Path) -> list[list[Any]]:
    """Name, size and time of change of each weight file: stays the same when all are moved."""
    return [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(directory.glob("*.safetensors"))
    ]


def checkpoints(root: Path) -> list[Checkpoint]:
    """The whole checkpoints anywhere below `root`, the last written last.

    One that a killed process left half written is passed over, with a warning.
    """
    found = []
    for state in sorted(root.rglob("checkpoint-*/trainer_state.json")):
        number = _NUMBERED.fullmatch(state.parent.name)
        if number and (whole := _whole(state.parent, int(number[1]))):
            found.append(whole)
    return sorted(found, key=lambda each: (each.written_at, each.step))


def newest(root: Path) -> Checkpoint | None:
    """The checkpoint below `root` with the most steps of the newest run there."""
    found = checkpoints(root)
    return found[-1] if found else None


def begin(plan: Plan) -> Plan:
    """`plan` as it continues an interrupted run, or anew; an older run is moved aside.

    Raises UserError for a checkpoint that was named and is not whole.
    """
    resume = swift_flags.text(plan.own, "resume", "auto")
    if "demo" in plan.own and "resume" not in plan.own:
        resume = "never"
    start = typed_checkpoint(plan)
    if start:
        if not start.path.is_relative_to(plan.output_dir):
            continuation(plan.output_dir, {}, "never")
    else:
        start = continuation(plan.output_dir, plan.identity, resume)
    if start is None:
        return plan
    return replace(plan, flags=plan.flags | {"resume_from_checkpoint": [str(start.path)]})


def typed_checkpoint(plan: Plan) -> Checkpoint | None:
    """The checkpoint that the user named, if any. Raises UserError when it is not whole."""
    resume = swift_flags.text(plan.own, "resume", "auto")
    given = swift_flags.text(plan.flags, "resume_from_checkpoint")
    given = given if resume in RESUME_WORDS else resume
    return named(Path(given)) if given else None


def describe(plan: Plan) -> None:
    """Write config.json: flags, what a continued run must share, command and environment."""
    typed = {name: value for name, value in plan.flags.items()
             if value != plan.documented.get(name)}  # fmt: skip
    description = {
        "settings": _words(plan.flags),
        "defaults": {**dict.fromkeys(typed, "swift's own"), **_words(plan.documented, typed)},
        "identity": plan.identity,
        "command": shlex.join(["swift", *plan.command]),
        "base_files": files_of(Path(swift_flags.text(plan.flags, "model"))),
        **surroundings(),
    }
    write_json(plan.output_dir / CONFIG, description)


def describe_merge(run_dir: Path, flags: Flags, command: str) -> None:
    """Write config.json of a run that merges."""
    run_dir.mkdir(parents=True, exist_ok=True)
    description = {"settings": _words(flags), "command": command, **surroundings()}
    write_json(run_dir / CONFIG, description)


def surroundings() -> dict[str, dict[str, Any]]:
    """Versions of what swift stands on, and the machine."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine = {"system": f"{platform.system()} {platform.release()}", "cpu_cores": os.cpu_count()}
    if gpus := present_gpus():
        machine |= {"gpus": gpus, "driver": driver_version()}
    return {"versions": versions, "environment": machine}


def _words(flags: Flags, names: Collection[str] | None = None) -> dict[str, str]:
    """The flags as they are typed, without their dashes."""
    chosen = flags if names is None else [name for name in flags if name in names]
    return {name: shlex.join(flags[name]) for name in chosen}


def continuation(run_dir: Path, identity: dict[str, Any], resume: str) -> Checkpoint | None:
    """The checkpoint that the run in `run_dir` continues from; None to start anew.

    resume: auto continues an interrupted run of the same settings; never. An older run that is
    not continued is moved aside, with one line that says why.
    """
    if resume != "never":
        why = _why_not(run_dir, identity)
        last = newest(run_dir)
        if not why and last:
            log.info("continuing the interrupted run from %s", last.path)
            return last
    else:
        why = "it is not continued"
    _refuse_others_checkpoints(run_dir)
    if aside := status.move_aside(run_dir):
        log.info(
            "a new run starts (%s): the run in %s is now in %s",
            why or "no checkpoint", run_dir, aside,
        )  # fmt: skip
    return None


def named(path: Path) -> Checkpoint:
    """The checkpoint that the user named: a checkpoint-N, or a run directory, of which the last.

    Raises UserError when it is not there or not whole.
    """
    number = _NUMBERED.fullmatch(path.name)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; ls {path.parent} shows those that are there")
    found = _whole(path, int(number[1])) if number else newest(path)
    if found is None:
        raise UserError(f"{path} is no whole checkpoint (trainer_state.json or weights): name one")
    return found


def _why_not(run_dir: Path, identity: dict[str, Any]) -> str:
    """Why the run in `run_dir` is not continued, or ''."""
    status, config = read_json(run_dir / "status.json"), read_json(run_dir / CONFIG)
    if not isinstance(status, dict) or not isinstance(config, dict):
        return "what is there tells no settings"
    if status.get("state") == "done":
        return "the run there is finished"
    before = config.get("identity", {})
    names = sorted({*before, *identity})
    changed = [name for name in names if before.get(name) != identity.get(name)]
    return f"settings differ: {', '.join(changed)}" if changed else ""


def _refuse_others_checkpoints(run_dir: Path) -> None:
    """Raise UserError where a run of swift's own left checkpoints that would be written over."""
    found = None if status.files_of(run_dir) else newest(run_dir)
    if found:
        raise UserError(
            f"{run_dir} holds {found.path.name} of a run that this toolkit did not start: continue "
            f"it with --resume_from_checkpoint {found.path}, or type another --output_dir"
        )


def _whole(path: Path, step: int) -> Checkpoint | None:
    state = read_json(path / "trainer_state.json")  # the last file that is written
    reasons = [broken_safetensors(file) for file in path.glob("*.safetensors")]
    if isinstance(state, dict) and state.get("global_step") == step and not any(reasons):
        return Checkpoint(path, step)
    log.warning("%s is not whole and passed over", path)
    return None
