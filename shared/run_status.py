"""What a run directory tells: the one reader behind monitor, report, demos and launcher.

    run = read(run_dir)         state and status.json, as far as they can be read
    shown = view(run_dir)       the same with numbers of metrics.jsonl, flat, for monitor --json
    curves(run)                 every value of metrics.jsonl

States: done, stopped and failed, as the run said when it ended; starting (a process holds the
directory and has no status yet); running; silent (no heartbeat for minutes, but its processes use
the processor); stale (it has not ended, and its processes are gone or use no processor time).

Nothing is written, the run does not notice, and nothing is raised for what the files hold.
Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import lock, processes
from shared.errors import one_line
from shared.files import open_regular, read_text
from shared.progress import span
from shared.status import SILENCE, heartbeat_age, loss_tag

DONE, FAILED, STOPPED = "done", "failed", "stopped"
STARTING, RUNNING, SILENT, STALE = "starting", "running", "silent", "stale"
ENDED, LIVE = (DONE, FAILED, STOPPED), (STARTING, RUNNING, SILENT)

_LARGEST_JSON, _LARGEST_METRICS, _LONGEST_LINE = 32_000_000, 400_000_000, 1_000_000  # bytes
_TAIL = 1 << 20  # bytes of the log that are searched for warnings
_WARNING = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^\w*(Error|Exception)\b|^Traceback")
_SHOWN_LOSSES, _CURVE, _SMOOTHING = 20, 600, 0.9
_LOWER_IS_BETTER = re.compile(r"loss|perplexity|error|eer|distance", re.I)
_PLACES = ("step", "epoch", "split", "time")  # of a row in metrics.jsonl; all else are numbers
_SHOWN = ("grad_norm", "samples_per_s", "steps_per_s", "skipped", "reward", "reward_std")
_SPEED = ("steps_per_s", "samples_per_s", "seconds_per_step")

Series = tuple[list[float], list[float]]  # steps, values; NaN where the run wrote null


@dataclass
class Run:
    """A run at one moment. note: what a person should know about the state.

    status: status.json as it is, {} when it cannot be read. heartbeat_s: seconds since it was
    written. problems: what could not be read.
    """

    run_dir: Path
    state: str = STALE
    note: str = ""
    heartbeat_s: float | None = None
    status: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass
class View:
    """A run in numbers. Sizes in bytes, times in seconds; None where nobody wrote it."""

    run_dir: str
    state: str
    note: str = ""
    recipe: str | None = None
    exit_code: int | None = None
    reason: str | None = None
    pid: int | None = None
    host: str | None = None
    world_size: int | None = None
    step: int | None = None
    total_steps: int | None = None
    percent: float | None = None
    epoch: int | None = None  # as people count, from 1
    eta_s: float | None = None
    heartbeat_s: float | None = None
    started_at: str | None = None
    updated_at: str | None = None
    samples_per_s: float | None = None
    steps_per_s: float | None = None
    loss: float | None = None
    loss_smoothed: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    skipped: float | None = None
    reward: float | None = None  # of GRPO: the mean over a step's answers
    reward_std: float | None = None  # and their spread, without which nothing is learnt
    best: dict[str, Any] | None = None  # name, value, epoch, step: of the validation so far
    validation: dict[str, Any] = field(default_factory=dict)  # the newest one's numbers
    result: dict[str, Any] | None = None
    outputs: list[str] = field(default_factory=list)
    memory_bytes: int | None = None
    disk_free_bytes: int | None = None
    gpus: list[dict[str, float]] = field(default_factory=list)  # of the machine
    log: str | None = None
    warnings: list[str] = field(default_factory=list)
    recent_losses: list[tuple[int, float]] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)  # the loss over the whole run, thinned out


def read(run_dir: Path) -> Run:
    """The run in `run_dir`, as it is now."""
    run = Run(run_dir)
    run.status = json_object(run_dir / "status.json", run.problems)
    status = _sound(run.status)
    run.heartbeat_s = heartbeat_age(status)
    run.state, run.note = _state(run_dir, status, run.heartbeat_s)
    return run


def json_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in a file; {} and a problem when there is none."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError("too large to be one")
        value = json.loads(read_text(path))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {one_line(error)[:200]}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no object")
        return {}
    return value


def _state(run_dir: Path, status: dict[str, Any], age: float | None) -> tuple[str, str]:
    """The state that the files and the machine agree on, and what is worth saying about it."""
    said, pid, host = (status.get(name) for name in ("state", "pid", "host"))
    is_here = host in (None, socket.gethostname())
    is_there = is_here and processes.is_same(status)
    if is_here and not is_there and lock.is_held(run_dir):
        return STARTING, "a process holds the directory: a run begins, or its last one is ending"
    if said in ENDED:
        return said, ""
    if said != RUNNING:
        return STALE, "status.json is missing or not readable"
    last = f"last heartbeat {span(age or 0.0)} ago"
    if is_here and not is_there:
        return STALE, f"process {pid} not found, {last}; --resume auto continues the run"
    where = "" if is_here else f"on {host}, whose processes cannot be seen from here"
    doing = status.get("doing") or ""
    if (age or 0.0) <= SILENCE:
        return RUNNING, "; ".join(filter(None, (doing, where)))
    if not is_here:
        return STALE, f"{last}, {where}"
    if pid is not None and processes.are_working(pid):
        return SILENT, f"{last}; its processes use the processor"
    return STALE, f"{last}; its processes use no processor time"


# What a status says, by its types: a file that was damaged or written by hand may say anything.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("recipe", "state", "reason", "host", "log", "pid_born", "doing"), str),
    **dict.fromkeys(("started_at", "updated_at"), str),
    **dict.fromkeys(("pid", "exit_code", "world_size", "step", "total_steps", "epoch"), int),
    **dict.fromkeys(("eta_s", "memory_bytes"), (int, float)),
    **{"last": dict, "result": dict, "outputs": list, "pid_command": list},
}
_COPIED = (
    *("recipe", "exit_code", "reason", "pid", "host", "world_size", "step", "total_steps"),
    *("started_at", "updated_at", "result", "memory_bytes", "log"),
)


def _sound(status: dict[str, Any]) -> dict[str, Any]:
    """What of a status has the type that it should have."""
    return {
        name: status[name]
        for name, kind in _KINDS.items()
        if isinstance(status.get(name), kind) and _is_bounded(status[name])
    }


def _is_bounded(value: Any) -> bool:
    """Whether a number is one to count with; True for what is no number."""
    if isinstance(value, bool):
        return False
    return abs(value) < 2**53 if isinstance(value, (int, float)) else True  # NaN is not below


# --- the log --------------------------------------------------------------------------------------


def log_lines(log: Path | str | None, number: int | None = None) -> list[str]:
    """The last lines of a log, of its last megabyte at most; of a rewritten line the last state."""
    with contextlib.suppress(OSError), open_regular(Path(log or "")) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL))
        text = stream.read().decode("utf-8", "replace")
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f]", "", line) for line in lines]
        lines = [line for line in lines if line.strip()]
        return lines[-number:] if number else lines
    return []


def warnings_of(log: Path | str | None, number: int = 5) -> list[str]:
    """The last lines of a log that warn or tell of an error."""
    return [line for line in log_lines(log) if _WARNING.search(line)][-number:]


# --- metrics.jsonl --------------------------------------------------------------------------------


def curves(run: Run) -> dict[str, dict[str, Series]]:
    """Tag → split → series; what could not be read is added to `run.problems`."""
    path = run.run_dir / "metrics.jsonl"
    found: dict[str, dict[str, Series]] = {}
    refused = 0
    try:
        for line in _lines(path):
            row = _row(line)
            step = number(row.get("step")) if row else None
            if row is None or step is None or not math.isfinite(step):
                refused += 1
                continue
            split = str(row.get("split", ""))[:40]
            for tag, value in row.items():
                plain = None if tag in _PLACES else number(value)
                if plain is not None:
                    steps, values = found.setdefault(tag, {}).setdefault(split, ([], []))
                    steps.append(step)
                    values.append(plain)
    except FileNotFoundError:
        last = run.status.get("last")
        if isinstance(last, dict) and any(number(value) is not None for value in last.values()):
            run.problems.append(f"{path.name} is missing")  # else it has no losses, as a filter
    except OSError as error:
        run.problems.append(f"{path.name} cannot be read: {one_line(error)}")
    if refused:
        run.problems.append(f"{path.name}: {refused} line(s) are no rows and were skipped")
    return found


def number(value: Any) -> float | None:
    """`value` as a float: NaN for null, None for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _lines(path: Path) -> Iterator[bytes]:
    with open_regular(path) as stream:
        while (line := stream.readline(_LONGEST_LINE)) and stream.tell() <= _LARGEST_METRICS:
            if line.strip():
                yield line


def _row(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None when there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line.decode("utf-8", "replace"))
        return row if isinstance(row, dict) else None
    return None


# --- the numbers of a monitor ---------------------------------------------------------------------


def view(run_dir: Path) -> View:
    """The run that `run_dir` holds, as it is now, in numbers."""
    run = read(run_dir)
    status, rows = _sound(run.status), _rows(run_dir / "metrics.jsonl")
    step, total, epoch = (status.get(name) for name in ("step", "total_steps", "epoch"))
    known = {name: status.get(name) for name in _COPIED}
    if known["memory_bytes"] is None:
        known["memory_bytes"] = rows.last.get("memory_bytes")  # a foreign program tells it there
    eta = status.get("eta_s") if run.state in (RUNNING, SILENT) else None
    return View(
        str(run_dir),
        run.state,
        run.note,
        **known,
        percent=round(100 * step / total, 1) if step is not None and total else None,
        epoch=None if epoch is None else epoch + (run.state != DONE),
        eta_s=None if eta is None else max(0.0, eta - (run.heartbeat_s or 0.0)),
        heartbeat_s=run.heartbeat_s,
        outputs=status.get("outputs") or [],
        disk_free_bytes=_free(run_dir),
        warnings=warnings_of(status.get("log")),
        **_numbers(rows, status.get("last") or {}),
    )


def _free(directory: Path) -> int | None:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(directory).free
    return None


@dataclass
class _Rows:
    """What metrics.jsonl holds: training rows thinned out, all of the others."""

    train: list[dict[str, Any]] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)  # the newest training values


def _rows(path: Path) -> _Rows:
    """Parse no more than is shown: a long run's file has a million lines."""
    try:
        lines = list(_lines(path))
    except OSError:
        return _Rows()
    train = [line for line in lines if b'"split": "train"' in line]
    head, tail = train[:-_SHOWN_LOSSES], train[-_SHOWN_LOSSES:]
    thin = max(1, len(head) // _CURVE)
    rows = _Rows(
        _parsed(head[::thin] + tail),
        _parsed([line for line in lines if b'"split": "train"' not in line]),
    )
    for row in rows.train[-_SHOWN_LOSSES:]:
        rows.last |= row
    return rows


def _parsed(lines: list[bytes]) -> list[dict[str, Any]]:
    rows = [row for line in lines if (row := _row(line)) and _is_number(row.get("step"))]
    return [{name: value for name, value in row.items() if _is_plain(value)} for row in rows]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_number(value)


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and abs(value) < 1e300  # NaN and infinity are not below it


def _numbers(rows: _Rows, last: dict[str, Any]) -> dict[str, Any]:
    """The fields of a view that are numbers of the training."""
    values = {name.lower(): value for name, value in {**last, **rows.last}.items()}
    tag = loss_tag(rows.last)
    losses = [(row["step"], row[tag]) for row in rows.train if _is_number(row.get(tag))]
    judged = [row for row in rows.others if row.get("split") in ("val", "epoch")]
    return {
        "loss": rows.last.get(tag),
        "loss_smoothed": _smoothed([loss for _, loss in losses[-_SHOWN_LOSSES:]]),
        "lr": values.get("lr", values.get("learning_rate")),
        **{name: values.get(name) for name in _SHOWN},
        "best": _best(judged),
        "validation": _measures(judged[-1]) if judged else {},
        "recent_losses": losses[-_SHOWN_LOSSES:],
        "curve": [loss for _, loss in losses],
    }


def _measures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in (*_PLACES, *_SPEED)}


def _smoothed(losses: list[float]) -> float | None:
    """Their exponential mean, the weights normed."""
    total, weight = 0.0, 0.0
    for loss in losses:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
    return total / weight if weight else None


def _best(judged: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best validation by its loss, or by its first number where it has none."""
    if not judged:
        return None
    names = list(_measures(judged[-1]))
    tag = next((name for name in names if "loss" in name.lower()), names[0] if names else "")
    found = [row for row in judged if _is_number(row.get(tag))]
    if not found:
        return None
    pick = min if _LOWER_IS_BETTER.search(tag) else max
    row = pick(found, key=lambda row: row[tag])
    step, epoch = row["step"], row.get("epoch")
    epoch = epoch + (step > 0) if _is_number(epoch) else None
    return {"name": tag, "value": row[tag], "epoch": epoch, "step": step}
