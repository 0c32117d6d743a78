"""How a run begins: the contract of --resume, and the state of the run that is continued."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import checkpoint, seed, status
from shared.checkpoint import Parts, Position
from shared.distributed import World
from shared.errors import UserError, one_line
from shared.files import read_object
from shared.settings import differing

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
