"""Taking a run directory: one live run at a time, and what becomes of the run that was there."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from shared import checkpoint
from shared.checkpoint import Decision
from shared.config import RunOptions, settings
from shared.errors import UserError, one_line
from shared.files import move_aside, read_json, remove_stale_temporaries, write_json

log = logging.getLogger(__name__)


def take(run_dir: Path) -> int:
    """Make `run_dir` this process's own, for as long as it lives; the lock's descriptor.

    Removes what a killed process left half written. Raises UserError when a live run holds the
    directory, or when it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"the run directory {run_dir} cannot be written: {one_line(error)}; choose another "
            "--run-dir"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        holder = (read_json(run_dir / "status.json") or {}).get("pid", "unknown")
        raise UserError(
            f"{run_dir} is in use by a live run (pid {holder}); wait for it, stop it with "
            f"kill -TERM {holder}, or give this run another --run-dir"
        ) from None
    remove_stale_temporaries(run_dir)
    return handle


def begin(run_dir: Path, last: str, config: Any, options: RunOptions, world_size: int) -> Decision:
    """Decide how the run begins, move an older one aside if need be, write config.json."""
    identity = settings(config, ("result", "length")) | {"world_size": world_size}
    fresh_demo = options.demo and "resume" not in options.typed
    resume = "never" if fresh_demo else options.resume
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    decision = checkpoint.decide(run_dir, last, resume, json.loads(json.dumps(identity)), restarted)
    if decision.move_aside:
        aside = move_aside(run_dir, keep=("run.lock",))
        log.info("a new run starts: %s; what was in %s is now in %s", decision.why, run_dir, aside)
    write_json(run_dir / "config.json", _description(config, identity))
    return decision


def _description(config: Any, identity: dict[str, Any]) -> dict[str, Any]:
    return {
        "settings": settings(config),
        "identity": identity,
        "command": shlex.join(sys.argv),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
