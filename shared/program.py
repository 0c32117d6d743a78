"""The care that our own runs get, for a program that is not ours: lock, status, signals, exit code.

    python shared/program.py --run-dir DIR [--recipe NAME] [--total-steps N] -- PROGRAM [ARGUMENT…]

A guard process (shared/guard.py) owns the program's processes, so that nothing of them is left
however we end. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":  # imported, it leaves the importer's path as it is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared import guard, lock, logs, outcome, processes, stop
from shared.child import Child
from shared.config import free, parse
from shared.errors import (
    DONE,
    FAILED,
    MISSING_TOOL,
    USER_ERROR,
    MissingToolError,
    UserError,
    one_line,
)
from shared.files import open_regular
from shared.processes import adopt_orphans
from shared.settings import Range
from shared.status import Status

log = logging.getLogger(__name__)

Progress = Callable[[], dict[str, Any]]  # the changes for status.json since the last call
_POSITION, _PACE, _MEMORY = "global_step/max_steps", "train_speed(s/it)", "memory(GiB)"
_CHECKPOINTS = ("best_model_checkpoint", "last_model_checkpoint")
_NAMES = {"learning_rate": "lr"}  # what our own recipes call it
_FLAT_STEPS = 10  # of GRPO without a spread of rewards, before it is said


@dataclass(frozen=True)
class ProgramOptions:
    """Flags for a foreign program's run, before the --."""

    run_dir: Path | None = free(None, "where status, lock and metrics go")
    recipe: str = free("", "whose run this is, for status.json")
    total_steps: int = free(0, "steps in all, when the program's log does not say")
    shutdown_timeout: Annotated[int, Range(0, 2_000_000)] = free(
        120, "seconds to save and leave after SIGTERM before SIGKILL"
    )


def run(
    command: Sequence[str],
    run_dir: Path,
    options: ProgramOptions = ProgramOptions(),
    *,
    env: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    data: Mapping[str, int] | None = None,
) -> int:
    """Run a foreign program to its end; the exit code of the run.

    0 done; 143 or 130 when it ended after a stop signal to us; 2 and 3 as the program left with
    them; else 1. progress: what changes in status.json (default: read from logging.jsonl). data:
    counts for the report.
    Raises UserError when the program is missing or a live run holds `run_dir`.
    """
    path = None if env is None else env.get("PATH")
    if shutil.which(command[0], path=path) is None:
        raise MissingToolError(f"{command[0]} is not a program on this machine's PATH: install it")
    handle = lock.take(run_dir)
    try:
        adopt_orphans()
        program = _Program(command, run_dir, options, progress)
        program.counts(data or {})
        return program.run(env, handle)
    finally:
        os.close(handle)


class _Program:
    """One run of a foreign program."""

    def __init__(
        self,
        command: Sequence[str],
        run_dir: Path,
        options: ProgramOptions,
        progress: Progress | None,
    ) -> None:
        self._command, self._timeout = list(command), options.shutdown_timeout
        self._run_dir = run_dir
        self._progress = progress or JsonLinesProgress(run_dir)
        self._status = Status(
            run_dir,
            **{"recipe": options.recipe, "log": outcome.log_file()},
            **{"command": shlex.join(command)},
            **{"step": 0, "total_steps": options.total_steps or None, "epoch": 0, "eta_s": None},
        )

    def counts(self, data: Mapping[str, int]) -> None:
        """What the program is given to work on."""
        self._status.fields["data"] = dict(data)

    def run(self, env: Mapping[str, str] | None, handle: int) -> int:
        """Start the program under its guard and wait; the exit code of the run."""
        keeper = [sys.executable, guard.__file__, str(os.getpid()), str(self._timeout)]
        older = processes.children()  # the log's tee, where a script has become this process
        with Child() as child:  # to the end: the last words are not lost to a late signal
            self._status.write()
            # the guard shares the lock: no new run begins while it ends what a killed one has left
            code = child.run_attached([*keeper, *self._command], env, self._tick, keep=[handle])
            processes.end_children(spare=older)  # none, but where the guard itself was killed
            return self._conclude(code, child.stopped_by)

    def _tick(self) -> None:
        if self._status.is_due:
            self._status.write(**self._progress())

    def _conclude(self, left_with: int, stopped_by: int) -> int:
        self._status.fields |= self._progress()
        step, total = self._status.fields["step"], self._status.fields["total_steps"]
        at = f"step {step} of {total}" if total else "a number of steps that it did not tell"
        code, state, reason = DONE, "done", f"{step} steps" if step else "the program has ended"
        if stopped_by and left_with == guard.KILLED:
            code, state = FAILED, "failed"
            name = stop.name_of(stopped_by)
            reason = f"killed after {name}, before it had ended by itself, at {at}"
        elif stopped_by and not (left_with == DONE and step and step == total):
            code, state = stop.exit_code_for(stopped_by), "stopped"
            reason = f"{stop.name_of(stopped_by)}: the program has ended, at {at}"
        elif left_with != DONE:
            code, state = left_with if left_with in (USER_ERROR, MISSING_TOOL) else FAILED, "failed"
            reason = f"{Path(self._command[0]).name} {_ending(left_with)}, at {at}"
        if state == "done" and step:
            self._status.fields["epoch"] += 1  # as in our own runs: the epochs that are behind
        self._status.write(state=state, exit_code=code, reason=reason)
        outcome.leave_page(self._run_dir)
        outcome.closing_line(code, reason)
        return code


def _ending(code: int) -> str:
    """What an exit code says, as a shell has it."""
    names = {128 + number: number.name for number in signal.Signals}
    if code not in names:
        return f"left with exit code {code}"
    why = " (by the kernel when RAM ran out, or by someone)" if code == guard.KILLED else ""
    return f"was ended by {names[code]}{why}"


# --- how far it is: ms-swift's logging.jsonl -----------------------------------------------------


class JsonLinesProgress:
    """Reads what is added to logging.jsonl in `run_dir` and in the directories in it.

    Called from time to time; returns the changes for status.json, and writes the same numbers into
    `run_dir/metrics.jsonl`, one object a step, as our own runs do.
    """

    def __init__(self, run_dir: Path, name: str = "logging.jsonl") -> None:
        self._run_dir, self._name = run_dir, name
        self._offsets = {path: path.stat().st_size for path in self._files()}  # of earlier runs
        self._last: dict[str, float | None] = {}
        self._flat_steps = 0
        self._metrics = run_dir / "metrics.jsonl"
        if self._metrics.exists():
            self._metrics.rename(_free_name(self._metrics))

    def __call__(self) -> dict[str, Any]:
        """The newest step, total_steps, epoch, eta_s, last and outputs, where there is news."""
        changes: dict[str, Any] = {}
        for path in self._files():
            for line in self._news(path):
                changes |= self._take(line)
        return changes

    def _files(self) -> list[Path]:
        return sorted([*self._run_dir.glob(self._name), *self._run_dir.glob(f"*/{self._name}")])

    def _news(self, path: Path) -> Iterator[dict[str, Any]]:
        """The whole lines that were added; half a line waits for its end."""
        with contextlib.suppress(OSError), open_regular(path) as stream:
            stream.seek(self._offsets.get(path, 0))
            text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offsets[path] = stream.tell() - len(text) + len(whole)
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    found = json.loads(line)
                    if isinstance(found, dict):
                        yield found

    def _take(self, line: dict[str, Any]) -> dict[str, Any]:
        outputs = [line[name] for name in _CHECKPOINTS if isinstance(line.get(name), str)]
        if outputs:
            return {"outputs": list(dict.fromkeys(outputs))}
        step, _, total = str(line.get(_POSITION, "")).partition("/")
        if not (step.isdigit() and total.isdigit() and len(step) + len(total) < 30):
            return {}
        values = numbers(line)
        epoch = max(0, math.ceil(values.pop("epoch", 0) or 0) - 1)  # theirs counts what is behind
        left = (int(total) - int(step)) * (values.get("seconds_per_step") or math.nan)
        self._record(int(step), epoch, values)
        self._watch_rewards(int(step), values)
        self._last |= values
        return {
            **{"step": int(step), "total_steps": int(total), "epoch": epoch},
            "last": dict(self._last),
            "eta_s": left if math.isfinite(left) else None,
        }

    def _record(self, step: int, epoch: int, values: dict[str, float | None]) -> None:
        is_validation = any(name.startswith("eval_") for name in values)
        split = "val" if is_validation else "train" if "loss" in values else "end"
        row = {"step": step, "epoch": epoch, "split": split, "time": round(time.time(), 3)}
        named = {name.removeprefix("eval_"): value for name, value in values.items()}
        with contextlib.suppress(OSError), self._metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row | named) + "\n")

    def _watch_rewards(self, step: int, values: dict[str, float | None]) -> None:
        """Warn, once a stretch, when the answers to each question earn the same: no gradient."""
        if "reward_std" not in values:
            return
        self._flat_steps = 0 if values["reward_std"] else self._flat_steps + 1
        if self._flat_steps == _FLAT_STEPS:
            log.warning(
                "step %d: %d steps in a row without a spread of rewards, so nothing is learnt: "
                "raise --temperature or --num_generations, or reward parts of an answer",
                *(step, _FLAT_STEPS),
            )


def numbers(line: dict[str, Any]) -> dict[str, float | None]:
    """The line's numbers under our names; None for NaN and infinities."""
    found: dict[str, float | None] = {}
    for name, value in line.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            continue
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            found[_NAMES.get(name, name)] = number if math.isfinite(number) else None
    for theirs, ours, factor in (
        (_MEMORY, "memory_bytes", 2.0**30),
        (_PACE, "seconds_per_step", 1),
    ):
        number = found.pop(theirs, None)
        if number:
            found[ours] = number * factor
    if found.get("seconds_per_step"):
        found["steps_per_s"] = round(1 / (found["seconds_per_step"] or 1), 4)
    return found


def _free_name(path: Path) -> Path:
    """The first of metrics.1.jsonl, metrics.2.jsonl, … that is not there."""
    number = 1
    while os.path.lexists(free := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    return free


def main(argv: list[str] | None = None) -> int:
    """Run the program after the `--`; the exit code of its run."""
    logs.open_streams()
    logs.setup()
    words = sys.argv[1:] if argv is None else argv
    at = words.index("--") if "--" in words else len(words)
    command = words[at + 1 :]
    try:
        options = parse(ProgramOptions, words[:at], __doc__)
        if options.run_dir is None or not command:
            missing = "a program after --" if options.run_dir else "--run-dir"
            raise UserError(f"{missing} is missing: program.py --run-dir DIR -- PROGRAM …")
        return run(command, options.run_dir, options)
    except UserError as error:
        failure = outcome.Failure(0, error.exit_code, "user", one_line(error))
        return outcome.report(failure, None)


if __name__ == "__main__":
    sys.exit(main())
