"""What becomes of the run that a directory holds: the contract of --resume, and the description of
the new one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared import checkpoint, seed, status
from shared.checkpoint import Parts, Position
from shared.config import HasRunOptions, RunOptions
from shared.device import driver_version
from shared.distributed import World
from shared.errors import UserError, one_line
from shared.files import move_aside, read_object, read_text, write_json, write_text
from shared.settings import differing, settings

log = logging.getLogger(__name__)

# what a run that never took a step leaves
_TRACES = {"status.json", "config.json", "metrics.jsonl", "tensorboard", "report.html"}


@dataclass(frozen=True)
class Decision:
    """How a run begins: from `checkpoint` or afresh, and whether an older run makes room.

    why: in words; "" where the options say it.
    """

    checkpoint: Path | None = None
    why: str = ""
    move_aside: bool = False
    is_named: bool = False  # the user named this file: no other will do


def decide(
    run_dir: Path, last: str, resume: str, identity: dict[str, Any], restarted: bool
) -> Decision:
    """Whether a run in `run_dir` continues, and from which checkpoint (the contract of --resume).

    identity: the settings that must be the same for an automatic continuation.
    restarted: the launcher started this process again after a crash; then always continue.
    """
    if restarted and (run_dir / last).exists():
        return Decision(run_dir / last)
    if resume not in ("auto", "latest", "never"):
        path = Path(resume)
        return Decision(path / last if path.is_dir() else path, is_named=not path.is_dir())
    if restarted:
        return Decision()
    state = read_object(run_dir / "status.json")
    written = status.files_of(run_dir)
    if not written:
        _refuse_others_files(run_dir, last)
    if not (state.get("step") or written - _TRACES):
        return Decision()
    if resume == "never":
        return Decision(move_aside=True)
    if not (run_dir / last).exists() and not checkpoint.older(run_dir / last):
        return Decision(None, "no checkpoint there to continue from", move_aside=True)
    if state.get("state") == "done":
        return Decision(None, "the run there is finished", move_aside=True)
    stored = read_object(run_dir / "config.json").get("identity")
    changed = differing(stored if isinstance(stored, dict) else {}, identity)
    if changed:
        return Decision(
            None, f"the run there had other settings ({'; '.join(changed)})", move_aside=True
        )
    return Decision(run_dir / last)


def _refuse_others_files(run_dir: Path, last: str) -> None:
    """Raise UserError when the run would write over files that no run of this toolkit wrote."""
    names = ("status.json", "config.json", "metrics.jsonl", last)
    found = [name for name in names if (run_dir / name).exists()]
    if found:
        raise UserError(
            f"{run_dir} holds {', '.join(found)} and no run of this toolkit that wrote them: choose"
            " another --run-dir, or move them away"
        )


def continue_from(
    decision: Decision, parts: Parts, world: World, *, total_steps: int, allow_reshard: bool
) -> Position:
    """Put the state of `decision.checkpoint` into `parts` and this rank's generators.

    Returns the position it was saved at; the very beginning without a checkpoint that can be read.
    Raises UserError when it does not fit or, named explicitly, cannot be read.
    """
    if decision.checkpoint is None:
        return Position()
    found = checkpoint.find(decision.checkpoint, explicit=decision.is_named)
    if found is None:
        directory = decision.checkpoint.parent
        log.warning("no checkpoint in %s can be read: starting from the beginning", directory)
        return Position()
    path, state = found
    _check_kind(path, state)
    _check_world_size(path, state["world_size"], world.size, allowed=allow_reshard)
    checkpoint.load_parts(parts, state["parts"], path)
    position = _restored(path, state, world.rank)
    log.info("continuing from %s at step %d of %d", path, position.step, total_steps)
    if position.step >= total_steps:
        log.info("this run is finished; more --epochs would continue it")
    return position


def _restored(path: Path, state: dict[str, Any], rank: int) -> Position:
    """Set the generators of this rank, of those that were saved; the position. Raises UserError."""
    try:
        if rank < len(state["generators"]):
            seed.set_state(state["generators"][rank])
        return Position(**state["position"])
    except Exception as error:  # numpy's, torch's and Python's, of many kinds
        raise UserError(
            f"{path}: its random states or position do not fit: {one_line(error)}; give another "
            "checkpoint, or --resume never"
        ) from None


def _check_kind(path: Path, state: dict[str, Any]) -> None:
    """Raise UserError for weights alone, from which no run can continue."""
    if not {"position", "world_size", "parts", "generators"} <= state.keys():
        raise UserError(
            f"{path} holds weights and no state of a run (optimizer, position): give a checkpoint "
            "that was saved while training, or --resume auto"
        )


def _check_world_size(path: Path, before: int, now: int, *, allowed: bool) -> None:
    """Raise UserError when another number of processes wrote the checkpoint, unless `allowed`."""
    if before == now:
        return
    if not allowed:
        raise UserError(
            f"{path} was written by {before} process(es), this run has {now}; use --nproc "
            f"{before}, or --allow-reshard to continue with another order of samples"
        )
    log.warning("%d → %d processes: not the same run to the bit from here", before, now)


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
    decision = decide(run_dir, last, resume_from, identity, restarted)
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
