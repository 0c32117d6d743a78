"""How a run ended: the one place that turns it into words, the final status and the exit code.

Processes and launcher leave word for each other in the directory that NOTES names. Standard
library only.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from shared import launched, logs, status
from shared.config import of_script
from shared.errors import (
    DONE,
    FAILED,
    INTERRUPTED,
    STOPPED,
    MissingToolError,
    UserError,
    hint_for,
    missing_package,
    one_line,
)
from shared.files import read_json, write_json
from shared.launched import NOTES

log = logging.getLogger(__name__)

LAUNCHER_PID = "TOOLKIT_LAUNCHER_PID"
WORD = "TOOLKIT_LAUNCH_WORD"  # the variable with the file that shared/launched.py keeps of us
LOG = "TOOLKIT_LOG"  # the file that a recipe's script sends all output to
_REPORT = Path(__file__).parent / "tools" / "report.py"
_PEER_LOST = re.compile(
    r"closed by peer|connection reset|broken pipe|read error|remote process exited", re.I
)
_TIMED_OUT = re.compile(
    r"timed out waiting|wait timeout|timeout.*(collective|allreduce|barrier)", re.I
)


class NotSavedError(OSError):
    """The disk refused the last checkpoint: what was trained since the one before it is lost."""


@dataclass(frozen=True)
class Failure:
    """How a process ended badly. kind: user, error, timeout or peer_lost (a consequence)."""

    rank: int
    code: int
    kind: str
    message: str
    traceback: str = ""
    at: float = 0.0


_run_dir: Path | None = None
last_words = ""  # how the run ended, as it was told to the user


def announce(run_dir: Path) -> None:
    """Tell the launcher where the run keeps its status, so that it can close it after a crash."""
    global _run_dir
    _run_dir = run_dir
    if NOTES in os.environ:
        write_json(Path(os.environ[NOTES]) / "run_dir.json", str(run_dir), durable=False)
    if WORD in os.environ and os.environ.get("RANK", "0") == "0":
        launched.note(Path(os.environ[WORD]), run_dir=str(run_dir.resolve()))


def forget() -> None:
    """Know of no run: none has announced itself yet."""
    global _run_dir
    _run_dir = None


def run_dir() -> Path | None:
    """The directory that this process's run announced."""
    return _run_dir


def launcher_pid() -> int:
    """The process to signal in order to stop the run: the launcher, or this process."""
    return int(os.environ.get(LAUNCHER_PID, os.getpid()))


def log_file() -> str | None:
    """The file that holds this run's output: the script's, or where stdout was sent to."""
    if LOG in os.environ:
        return os.environ[LOG]
    try:
        target = os.readlink("/proc/self/fd/1")  # noqa: PTH115, a Path would lose " (deleted)"
    except OSError:
        return None
    return target if Path(target).is_file() else None


def closing_line(code: int, reason: str) -> None:
    """The last line of a run: how it ended and with which exit code."""
    global last_words
    last_words = reason
    words = {DONE: "done", INTERRUPTED: "interrupted", STOPPED: "stopped"}
    log.info("%s: %s (exit %d)", words.get(code, "failed"), reason, code)


def end_now(code: int, reason: str, kept: str) -> None:
    """The last words of a process that a signal ends before it could save; it leaves after them.

    kept: what the words end with.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if code != FAILED and (_run_dir or WORD in os.environ):
        reason += " before the first step"
    reason += f": {kept}" if kept else ""
    status.close(_run_dir, code, reason, "failed" if code == FAILED else "stopped")
    closing_line(code, reason)
    if WORD in os.environ:
        launched.end(Path(os.environ[WORD]), code, reason)


def leave_page(run_dir: Path | None) -> None:
    """Renew the run's report.html; called before the last line is said.

    By a process of its own: a page that fails, or takes a minute, is not worth the run.
    """
    if run_dir is None or not (run_dir / "status.json").is_file():
        return
    command = [sys.executable, _REPORT, run_dir]
    try:
        subprocess.run(command, timeout=60, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        reason = one_line(error.stderr.removeprefix("error: "))
        log.warning("no report.html in %s: %s", run_dir, reason)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("no report.html in %s: %s", run_dir, one_line(error))


def report(failure: Failure, run_dir: Path | None) -> int:
    """Print a failure once, at the end of the output, close the run's status; its exit code."""
    global last_words
    last_words = failure.message
    if failure.kind == "user":
        status.close(run_dir, failure.code, failure.message)
        leave_page(run_dir)
        logs.say(f"error: {failure.message}")
        return failure.code
    if failure.traceback:
        logs.say(failure.traceback.rstrip())
    hint = hint_for(failure.message, of_script())
    reason = failure.message + (f" — {hint}" if hint else "")
    status.close(run_dir, failure.code, reason)
    leave_page(run_dir)
    log.error("failed: %s (exit %d)", reason, failure.code)
    return failure.code


def close_with_status(code: int) -> None:
    """The closing line from what the run wrote into its status.json, when there was a run."""
    fields = read_json(_run_dir / "status.json") if _run_dir else None
    if isinstance(fields, dict):
        leave_page(_run_dir)
        closing_line(code, str(fields.get("reason")))


def failure_of(error: BaseException, rank: int = 0) -> Failure:
    """The failure that an exception is: the user's, a cause, or the consequence of another's."""
    if isinstance(error, UserError):
        return Failure(rank, error.exit_code, "user", _mistake(error), at=time.time())
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = _missing_module(error.name)
        return Failure(rank, missing.exit_code, "user", str(missing), at=time.time())
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted before training began"
        return Failure(rank, INTERRUPTED, "user", text, at=time.time())
    if isinstance(error, NotSavedError):
        return Failure(rank, FAILED, "error", str(error), at=time.time())
    text = _essence(error)
    kind = (
        "timeout"
        if _TIMED_OUT.search(text)
        else "peer_lost"
        if _PEER_LOST.search(text)
        else "error"
    )
    lines = "".join(traceback.format_exception(error))
    where = "".join(f", {note}" for note in getattr(error, "__notes__", []))
    message = f"{type(error).__name__}: {text}{where}"
    return Failure(rank, FAILED, kind, message, lines, time.time())


def leave_word(failure: Failure) -> None:
    """Write the failure for our supervisor, and for torchrun's summary when there is one."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if NOTES in os.environ:
        path = Path(os.environ[NOTES]) / f"failure.{restart}.{failure.rank}.json"
        write_json(path, asdict(failure), durable=False)
    elastic = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if elastic:
        extra = {"py_callstack": failure.traceback, "timestamp": str(int(failure.at))}
        message = {"message": failure.message, "errorCode": failure.code, "extraInfo": extra}
        Path(elastic).write_text(json.dumps({"message": message}))


def _mistake(error: UserError) -> str:
    """A user's mistake on one line; one met in a loader worker, without the worker's traceback."""
    kind = type(error)
    return one_line(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2]


def _essence(error: BaseException) -> str:
    """An exception's message on one line; of a loader worker's traceback its last line."""
    text = str(error).strip()
    if "Original Traceback" in text:
        return "in a loader worker: " + text.splitlines()[-1].strip()
    return one_line(error)


def _missing_module(name: str) -> MissingToolError:
    """What to do about a module that is not there: a package to install, or a file of ours."""
    root = Path(__file__).parents[1]
    if not (root / name.partition(".")[0]).exists():
        return missing_package(name)
    file = f"{name.replace('.', '/')}.py"
    return MissingToolError(
        f"{file} is missing in {root}: put it back there (git checkout -- {file})"
    )
