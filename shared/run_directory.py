"""What becomes of the run that a run directory holds, and the description of the new one."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from shared import resume, status
from shared.config import HasRunOptions, RunOptions
from shared.device import driver_version
from shared.files import move_aside, read_text, write_json, write_text
from shared.resume import Decision
from shared.settings import settings

log = logging.getLogger(__name__)

_EVENTS = "events.out.tfevents.*"
_PACKAGES = {  # module → its package
    **{name: name for name in ("numpy", "torchvision", "transformers", "peft", "safetensors")},
    **{"open_clip": "open_clip_torch", "PIL": "pillow", "soundfile": "soundfile"},
}


def begin(run_dir: Path, last: str, tensorboard: Path | None, config: HasRunOptions,
          world_size: int) -> Decision:  # fmt: skip
    """Decide how the run begins; an older one that is not continued is moved aside.

    last: name of the checkpoint to continue from. tensorboard: where events go, unless into the
    run directory. Raises UserError when files that are not a run's stand in the way.
    """
    options = config.run
    resume_from = options.resume if is_continued(options) or options.is_explicit_resume else "never"
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    identity = _identity(config, world_size)
    decision = resume.decide(run_dir, last, resume_from, identity, restarted)
    if decision.move_aside:
        aside = status.move_aside(run_dir)
        why = decision.why or _why_anew(options)
        log.info("a new run starts: %s; the run in %s is now in %s", why, run_dir, aside)
        events = [path.name for path in tensorboard.glob(_EVENTS)] if tensorboard else []
        if tensorboard and events:
            move_aside(tensorboard, events)
    return decision


def description(run_dir: Path) -> dict[str, str]:
    """What describes the run in the directory: name → content of its status and settings."""
    paths = (run_dir / "status.json", run_dir / "config.json")
    return {path.name: read_text(path, errors="replace") for path in paths if path.is_file()}


def put_back(run_dir: Path, description: dict[str, str]) -> None:
    """Write these files as they were before a run that was refused."""
    for name, content in description.items():
        with contextlib.suppress(OSError):  # the refusal is what the user is told
            write_text(run_dir / name, content)


def is_continued(options: RunOptions) -> bool:
    """Whether the same command, typed again, continues an interrupted run; a demo starts anew."""
    is_fresh_demo = options.demo and "resume" not in options.typed
    return options.resume in ("auto", "latest") and not is_fresh_demo


def how_to_continue(options: RunOptions) -> str:
    """What to type in order to continue a run that was stopped."""
    flag = "" if is_continued(options) else " with --resume auto"
    return f"the same command{flag} continues it"


def _why_anew(options: RunOptions) -> str:
    if "resume" in options.typed:
        return f"--resume {options.resume}"
    return "a demo starts anew" if options.demo else "--resume auto was not typed"


def describe(run_dir: Path, config: Any, world_size: int) -> None:
    """Write config.json: the settings, what a continuation must share, command and environment.

    "defaults" are those of the settings that have another value. A configuration that is not made
    of flags alone names them itself, by a method `departures()` → {setting: default}.
    """
    description = {
        "settings": settings(config),
        "identity": _identity(config, world_size),
        "defaults": _departures(config),
        "command": shlex.join(sys.argv),
        "versions": _versions(),
        "environment": _environment(),
    }
    write_json(run_dir / "config.json", description)


def _departures(config: Any) -> dict[str, Any]:
    """Setting → default, of the settings that have another value."""
    own = getattr(config, "departures", None)
    try:
        after, before = (config.run, RunOptions()) if own else (config, type(config)())
    except TypeError:  # one that cannot do without values
        return {}
    values, defaults = settings(after), settings(before)
    changed = {name: defaults[name] for name in values if values[name] != defaults[name]}
    return changed | own() if own else changed


def _versions() -> dict[str, str]:
    """Python, torch, and those packages that the run has imported."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for module, package in _PACKAGES.items():
        if module in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[package] = importlib.metadata.version(package)
    return found


def _environment() -> dict[str, Any]:
    """The machine, for people who compare runs."""
    found: dict[str, Any] = {"system": f"{platform.system()} {platform.release()}"}
    found |= {"cpu_cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        found |= {"gpus": names, "cuda": torch.version.cuda, "driver": driver_version()}
    return found


def _identity(config: Any, world_size: int) -> dict[str, Any]:
    return settings(config, ("result", "length")) | {"world_size": world_size}
