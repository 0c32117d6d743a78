"""The stages of a run_all script: each is done once, and a broken chain continues where it broke.

    stages = [
        Stage("train", [sys.executable, TRAIN, "--lr", "1e-4"], {"data": DATA}, (BEST,)),
        Stage("table", write_table, {"checkpoint": BEST}, (TABLE,)),
    ]
    return run_stages(stages, cfg.stages, run_dir / "stages")

A stage that ended well leaves a marker NAME.json with its command and inputs. It is done as long as
these are the same and its outputs are there; a stage that runs again makes all after it run again.
Standard library only.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared import lock, outcome, stop, terminal
from shared.child import Child
from shared.config import option
from shared.errors import DONE, FAILED, MissingToolError, UserError, did_you_mean, one_line
from shared.files import read_object, write_json
from shared.progress import clock
from shared.status import Status, now

log = logging.getLogger(__name__)

Words = Sequence[str | Path]


@dataclass(frozen=True)
class StageOptions:
    """Flags that choose among the stages of a chain."""

    from_stage: str | None = option(
        None, "begin again at this stage, done or not", scope="free", aliases=("--from",)
    )
    only: str | None = option(None, "run this stage alone, done or not", scope="free")
    force: bool = option(False, "run the stages that are done again", scope="free")


@dataclass(frozen=True)
class Stage:
    """One step of a chain.

    command: the words of a program; or a function of some seconds that returns an exit code, or
    words that depend on the stages before. inputs: what else the result depends on; a file counts
    by its size and time of change, a directory by its name. outputs: what must be there afterwards.
    optional: later stages run although this one failed. is_check: it runs every time, and later
    stages stay done.
    """

    name: str
    command: Words | Callable[[], Words | int]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[Path, ...] = ()
    optional: bool = False
    is_check: bool = False

    @property
    def line(self) -> str:
        """The command as a shell takes it; '' for a function."""
        return "" if callable(self.command) else shlex.join(map(str, self.command))

    @property
    def missing(self) -> str:
        """The outputs that are not there."""
        return ", ".join(str(path) for path in self.outputs if not path.exists())


def run_stages(
    stages: Sequence[Stage], options: StageOptions, state_dir: Path, progress: Status | None = None
) -> int:
    """Run the stages that are not done, in order; the exit code of the one that ended the chain.

    progress: a status.json that is told which stage runs. Raises UserError for an unknown stage,
    and when the chain is running in another process.
    """
    chosen, is_forced = _chosen([stage.name for stage in stages], options)
    rows = {stage.name: ("not run", "-", "-") for stage in stages}  # state, time, exit code
    with os.fdopen(lock.take(state_dir, "directory")), Child() as child:
        for number, stage in enumerate(stages, 1):
            if stage.name not in chosen:
                continue
            inputs, marker = _inputs(stage), state_dir / f"{stage.name}.json"
            reason = "asked for" if is_forced else _why(stage, inputs, read_object(marker))
            log.info("stage %s: %s", stage.name, reason or "already done, with the same inputs")
            if not reason:
                rows[stage.name] = ("already done", "-", "-")
                continue
            if progress:
                progress.write(step=number, last={"stage": stage.name})
            marker.unlink(missing_ok=True)
            began = time.monotonic()
            code = _run(stage, child)
            seconds = time.monotonic() - began
            if code == DONE:
                _forget([] if stage.is_check else stages[number:], state_dir)
                facts = {"finished_at": now(), "seconds": round(seconds, 3), "inputs": inputs}
                write_json(marker, facts)
            rows[stage.name] = (_state(code, child), clock(seconds), str(code))
            if child.stopped_by or (code != DONE and not stage.optional):
                break
    return _conclude(rows, stages, child.stopped_by)


def _chosen(names: list[str], options: StageOptions) -> tuple[list[str], bool]:
    """The stages that the flags name, and whether they run although they are done."""
    for flag, name in (("--from", options.from_stage), ("--only", options.only)):
        if name is not None and name not in names:
            near = did_you_mean(name, names)
            raise UserError(f"{flag} {name}: no such stage{near} (stages: {', '.join(names)})")
    if options.from_stage and options.only:
        raise UserError("--from and --only exclude each other: give one of them")
    if options.only:
        return [options.only], True
    if options.from_stage:
        return names[names.index(options.from_stage) :], True
    return names, options.force


def _forget(stages: Sequence[Stage], state_dir: Path) -> None:
    """Remove the markers of stages whose input was made anew."""
    for stage in stages:
        (state_dir / f"{stage.name}.json").unlink(missing_ok=True)


def _why(stage: Stage, inputs: dict[str, str], marker: dict[str, Any]) -> str:
    """Why the stage has to run, or '' when it is done."""
    if stage.is_check or not marker:
        return "starts"
    if stage.missing:
        return f"runs again: {stage.missing} is missing"
    told = marker.get("inputs")
    before = told if isinstance(told, dict) else {}
    names = [name for name in before | inputs if before.get(name) != inputs.get(name)]
    changes = [f"{name}: {before.get(name)} → {inputs.get(name)}" for name in names]
    return f"runs again: {'; '.join(changes)}" if changes else ""


def _inputs(stage: Stage) -> dict[str, str]:
    """Command and inputs as texts; a file with its size and time of change."""
    found = {"command": stage.line} if stage.line else {}
    for name, value in stage.inputs.items():
        found[name] = str(value)
        if isinstance(value, Path) and value.is_file():
            facts = value.stat()
            changed = datetime.fromtimestamp(facts.st_mtime, UTC).isoformat()
            found[name] += f" of {changed}, {facts.st_size} bytes"
    return found


def _run(stage: Stage, child: Child) -> int:
    """The stage's exit code; a failure that was raised is reported here."""
    try:
        code = _call(stage, child)
    except Exception as error:
        return outcome.report(outcome.failure_of(error), None)
    if code == DONE and stage.missing:
        log.error("stage %s ended well but left no %s", stage.name, stage.missing)
        return FAILED
    return code


def _call(stage: Stage, child: Child) -> int:
    command = stage.command() if callable(stage.command) else stage.command
    if isinstance(command, int):  # of a function: Ctrl-C ends the programs that it asks
        return stop.exit_code_for(child.stopped_by) if command and child.stopped_by else command
    log.info("%s", shlex.join(map(str, command)))
    try:
        return child.run(command)
    except OSError as error:
        raise MissingToolError(f"{command[0]} does not start: {one_line(error)}") from None


def _state(code: int, child: Child) -> str:
    if code == DONE:
        return "done"
    return (
        "stopped" if child.stopped_by and code == stop.exit_code_for(child.stopped_by) else "failed"
    )


def _conclude(
    rows: dict[str, tuple[str, str, str]], stages: Sequence[Stage], stopped_by: int
) -> int:
    """Log the table and the closing line; the exit code of the chain."""
    cells = [(name, *row) for name, row in rows.items()]
    log.info("stages\n%s", terminal.table(("stage", "state", "time", "exit code"), cells))
    failed = [stage for stage in stages if rows[stage.name][0] == "failed"]
    code, reason = DONE, f"{len(stages)} stages"
    if stopped_by and all(stage.optional for stage in failed):
        code = stop.exit_code_for(stopped_by)
        reason = f"{stop.name_of(stopped_by)}; the same command continues"
    elif failed:  # one that ended the chain is the last
        code = int(rows[failed[-1].name][2])
        names = ", ".join(stage.name for stage in failed)
        reason = f"stage {names}; the same command continues there"
    outcome.closing_line(code, reason)
    return code
