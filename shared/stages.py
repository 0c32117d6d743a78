"""The stages of a run_all script: each done once, the chain goes on where it broke.

    stages = [
        command_stage("train", [sys.executable, str(TRAIN), "--lr", "1e-4"], outputs=(BEST,)),
        Stage("table", write_table, inputs={"checkpoint": BEST}, outputs=(TABLE,)),
    ]
    return run_stages(stages, cfg.stages, run_dir / "stages")

A stage that ended well leaves a marker in the state directory. It is passed over as long as its
inputs are the same and its outputs exist. Standard library only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared import outcome, status
from shared.child import Child
from shared.config import option
from shared.errors import (
    DONE,
    FAILED,
    INTERRUPTED,
    STOPPED,
    MissingToolError,
    UserError,
    did_you_mean,
    one_line,
)
from shared.files import open_lock, read_json, write_json
from shared.lock import try_to_lock
from shared.progress import clock
from shared.settings import differing, plain
from shared.signals import StopRequest, exit_code_for, name_of

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


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
    """One step of a chain. `run` returns an exit code.

    inputs: what the result depends on, as JSON values and paths; a file counts by its size and
    time of change, a directory by its name. outputs: files and directories that must be there
    afterwards. optional: later stages run although this one failed.
    """

    name: str
    run: Callable[[], int]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[Path, ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"stage {self.name!r}: letters, digits, dot, dash and underscore only")


@dataclass(frozen=True)
class _Result:
    """What became of a stage. state: done, already done, failed, stopped, passed over, not run."""

    name: str
    state: str
    seconds: float | None = None
    code: int | None = None


def command_stage(
    name: str,
    command: Sequence[str | Path],
    inputs: Mapping[str, Any] | None = None,
    outputs: tuple[Path, ...] = (),
    *,
    env: Mapping[str, str] | None = None,
    optional: bool = False,
) -> Stage:
    """A stage that runs a program; the command is one of its inputs.

    Running it raises MissingToolError when the program does not start.
    """
    line = shlex.join(os.fspath(word) for word in command)

    def run() -> int:
        log.info("%s", line)
        try:
            with Child() as child:
                code = child.run(command, env)
        except OSError as error:
            raise MissingToolError(f"{command[0]} does not start: {one_line(error)}") from None
        if child.stopped_by:  # the chain, too, is to hear of it
            os.kill(os.getpid(), child.stopped_by)
        return code

    return Stage(name, run, {"command": line, **(inputs or {})}, outputs, optional)


def run_stages(stages: Sequence[Stage], options: StageOptions, state_dir: Path) -> int:
    """Run the stages that are not done, in order; the exit code of the first that failed.

    The next call goes on at the stage that failed. Ends with a table of all stages. Raises
    UserError for unknown stage names, and when the chain is at work in another process.
    """
    again = _chosen(stages, options)
    results: dict[str, _Result] = {stage.name: _Result(stage.name, "not run") for stage in stages}
    stop = StopRequest()
    with _only_one(state_dir):
        stop.install()
        try:
            for stage in stages:
                if stop.number:
                    break
                result = _settle(stage, again[stage.name], state_dir, stop)
                results[stage.name] = result
                if result.state == "stopped" or (result.state == "failed" and not stage.optional):
                    break
        finally:
            stop.remove()
    return _conclude(list(results.values()), stages, stop)


def _chosen(stages: Sequence[Stage], options: StageOptions) -> dict[str, bool | None]:
    """For each stage: True to run it in any case, False if it is not done, None to leave it out."""
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"stages of the same name: {names}")
    for flag, name in (("--from", options.from_stage), ("--only", options.only)):
        if name is not None and name not in names:
            near = did_you_mean(name, names)
            raise UserError(f"{flag} {name}: no such stage{near} (stages: {', '.join(names)})")
    if options.from_stage and options.only:
        raise UserError("--from and --only exclude each other: give one of them")
    if options.only:
        return {name: True if name == options.only else None for name in names}
    if options.from_stage:
        begin = names.index(options.from_stage)
        return {name: True if at >= begin else None for at, name in enumerate(names)}
    return dict.fromkeys(names, options.force)


@contextlib.contextmanager
def _only_one(state_dir: Path) -> Iterator[None]:
    handle = open_lock(state_dir)
    try:
        if not try_to_lock(handle):
            raise UserError(
                f"these stages are at work in another process, which keeps {state_dir}; wait for "
                "it, or stop it"
            )
        yield
    finally:
        os.close(handle)


def _settle(stage: Stage, again: bool | None, state_dir: Path, stop: StopRequest) -> _Result:
    """Run the stage, or say why not."""
    if again is None:
        return _Result(stage.name, "passed over")
    marker, inputs = state_dir / f"{stage.name}.json", _described(stage.inputs)
    reason = "asked for" if again else _why_not_done(stage, inputs, read_json(marker))
    if not reason:
        log.info("stage %s: done before, with the same inputs", stage.name)
        return _Result(stage.name, "already done")
    log.info("stage %s: %s", stage.name, reason)
    marker.unlink(missing_ok=True)  # whatever happens now, the earlier result no longer stands
    began = time.monotonic()
    code = _call(stage, stop)
    seconds = time.monotonic() - began
    if code != DONE:
        stopped = code in (INTERRUPTED, STOPPED) and stop.number
        return _Result(stage.name, "stopped" if stopped else "failed", seconds, code)
    facts = {"stage": stage.name, "exit_code": code, "seconds": round(seconds, 3)}
    write_json(marker, facts | {"finished_at": status.now(), "inputs": inputs})
    return _Result(stage.name, "done", seconds, code)


def _why_not_done(stage: Stage, inputs: dict[str, Any], marker: Any) -> str:
    """Why the stage has to run, or '' when it is done."""
    if not isinstance(marker, dict):
        return "starts"
    missing = [str(path) for path in stage.outputs if not path.exists()]
    if missing:
        return f"runs again: {', '.join(missing)} is missing"
    changed = differing(marker.get("inputs") or {}, inputs)
    return f"runs again: {'; '.join(changed)}" if changed else ""


def _call(stage: Stage, stop: StopRequest) -> int:
    """The stage's exit code; a failure that was raised is reported here."""
    try:
        code = stage.run()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else FAILED if left.code else DONE
    except (KeyboardInterrupt, outcome.StopNow):
        return exit_code_for(stop.number) if stop.number else INTERRUPTED
    except Exception as error:
        return outcome.report(outcome.failure_of(error), None)
    missing = [str(path) for path in stage.outputs if not path.exists()]
    if code == DONE and missing:
        log.error("stage %s ended well but left no %s", stage.name, ", ".join(missing))
        return FAILED
    return code


def _conclude(results: list[_Result], stages: Sequence[Stage], stop: StopRequest) -> int:
    """The table, the closing line and the exit code of the chain."""
    optional = {stage.name for stage in stages if stage.optional}
    broken = [result for result in results if result.state in ("failed", "stopped")]
    broken.sort(key=lambda result: result.name in optional)  # one that ended the chain comes first
    if broken and (broken[0].name not in optional or not stop.number):
        names = ", ".join(result.name for result in broken)
        code, reason = broken[0].code or FAILED, f"stage {names}; the same command goes on there"
    elif stop.number:
        code, name = exit_code_for(stop.number), name_of(stop.number)
        reason = f"{name}; the same command goes on"
    else:
        code, reason = DONE, f"{len(results)} stages"
    log.info("%s", "stages\n" + _table(results))
    outcome.closing_line(code, reason)
    return code


def _table(results: list[_Result]) -> str:
    rows: list[tuple[str, ...]] = [("stage", "state", "time", "exit code")]
    for result in results:
        took = "-" if result.seconds is None else _duration(result.seconds)
        code = "-" if result.code is None else str(result.code)
        rows.append((result.name, result.state, took, code))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def _described(value: Any) -> Any:
    """Inputs as JSON values; a file with its size and time of change."""
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    if isinstance(value, Path) and value.is_file():
        facts = value.stat()
        changed = datetime.fromtimestamp(facts.st_mtime, UTC).isoformat()
        return f"{value} of {changed}, {facts.st_size} bytes"
    return plain(value)
