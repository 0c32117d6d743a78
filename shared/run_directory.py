"""What becomes of the run that a run directory holds, and the description of the new one."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from shared import checkpoint
from shared.checkpoint import Decision
from shared.config import HasRunOptions, settings
from shared.files import move_aside, write_json
from shared.reporter import Plan

log = logging.getLogger(__name__)


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
