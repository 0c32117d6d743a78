"""Taking a run directory: one live run at a time, and what becomes of the run that was there."""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from shared import checkpoint
from shared.checkpoint import Decision
from shared.config import HasRunOptions, settings
from shared.errors import UserError
from shared.files import (
    is_alive,
    move_aside,
    open_lock,
    read_json,
    remove_stale_temporaries,
    write_json,
)
from shared.reporter import Plan

log = logging.getLogger(__name__)

_DYING = 2.0  # seconds that workers, which share the lock, may take to follow their process


def take(run_dir: Path) -> int:
    """Make `run_dir` this process's own, for as long as it lives; the lock's descriptor.

    Removes what a killed process left half written. Raises UserError when a live run holds the
    directory, or when it cannot be written.
    """
    handle = open_lock(run_dir)
    holder = (read_json(run_dir / "status.json") or {}).get("pid")
    if not _locked(handle, holder):
        os.close(handle)
        raise UserError(
            f"{run_dir} is in use by a live run (pid {holder}); wait for it, stop it with "
            f"kill -TERM {holder}, or give this run another --run-dir"
        )
    remove_stale_temporaries(run_dir)
    return handle


def _locked(handle: int, holder: int | None) -> bool:
    """Whether the lock could be had; waits a moment for the workers of a holder that was killed."""
    deadline = time.monotonic() + _DYING
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline or (holder and is_alive(holder)):
                return False
        time.sleep(0.05)


def begin(run_dir: Path, plan: Plan, config: HasRunOptions, world_size: int) -> Decision:
    """Decide how the run begins; an older one that is not continued is moved aside."""
    options = config.run
    fresh_demo = options.demo and "resume" not in options.typed
    resume = "never" if fresh_demo else options.resume
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    identity = _identity(config, world_size)
    decision = checkpoint.decide(run_dir, plan.last, resume, identity, restarted)
    if decision.move_aside:
        aside = move_aside(run_dir, keep=("run.lock",))
        log.info("a new run starts: %s; what was in %s is now in %s", decision.why, run_dir, aside)
        if plan.tensorboard and plan.tensorboard.is_dir():
            move_aside(plan.tensorboard)
    return decision


def describe(run_dir: Path, config: Any, world_size: int) -> None:
    """Write config.json: the settings, what a continuation must share, command and versions."""
    description = {
        "settings": settings(config),
        "identity": _identity(config, world_size),
        "command": shlex.join(sys.argv),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    write_json(run_dir / "config.json", description)


def _identity(config: Any, world_size: int) -> dict[str, Any]:
    return settings(config, ("result", "length")) | {"world_size": world_size}
