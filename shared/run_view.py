"""What can be seen of a run from outside: read from status.json, metrics.jsonl and the log alone.

Nothing is written, and the run does not notice. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from shared import lock, processes
from shared.files import open_regular, read_bytes, read_object

DONE, FAILED, STOPPED = "done", "failed", "stopped"
RUNNING, STARTING, STALE = "running", "starting", "stale"

_SILENCE = 600.0  # seconds without a heartbeat before a run with quick steps counts as stuck
_STEPS_OF_SILENCE = 20  # for one with slow steps
_SHOWN_LOSSES, _CURVE, _SMOOTHING = 20, 600, 0.9
_TAIL = 1 << 20  # bytes of the log that are searched for warnings
_WARNING = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^\w*(Error|Exception)\b|^Traceback")
_LOWER_IS_BETTER = re.compile(r"loss|perplexity|error|eer|distance", re.I)
_ABOUT = {"step", "epoch", "split", "time", "steps_per_s", "samples_per_s", "seconds_per_step"}


@dataclass
class View:
    """A run at one moment. Sizes in bytes, times in seconds; None where nobody wrote it."""

    run_dir: str
    state: str
    note: str = ""  # what a person should know about the state
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
    heartbeat_s: float | None = None  # age of status.json
    started_at: str | None = None
    updated_at: str | None = None
    samples_per_s: float | None = None
    steps_per_s: float | None = None
    loss: float | None = None
    loss_smoothed: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    skipped: float | None = None
    best: dict[str, Any] | None = None  # name, value, epoch, step: of the validation so far
    validation: dict[str, Any] = field(default_factory=dict)  # the newest one's numbers
    result: dict[str, Any] | None = None
    outputs: list[str] = field(default_factory=list)
    memory_bytes: int | None = None
    disk_free_bytes: int | None = None
    gpus: list[dict[str, float]] = field(default_factory=list)  # of the machine, by nvidia-smi
    log: str | None = None
    warnings: list[str] = field(default_factory=list)
    recent_losses: list[tuple[int, float]] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)  # the loss over the whole run, thinned out


def view(run_dir: Path) -> View:
    """The run that `run_dir` holds, as it is now."""
    status = _sound_status(read_object(run_dir / "status.json"))
    rows = _rows(run_dir / "metrics.jsonl")
    state, note = _state(run_dir, status, rows)
    age, epoch = _age(status), status.get("epoch")
    step, total, eta = (status.get(name) for name in ("step", "total_steps", "eta_s"))
    known = {name: status.get(name) for name in _COPIED}
    if known["memory_bytes"] is None:
        known["memory_bytes"] = rows.last.get("memory_bytes")  # a foreign program tells it there
    if eta is not None:
        eta = max(0.0, eta - (age or 0.0)) if state == RUNNING else None
    return View(
        str(run_dir),
        state,
        note,
        **known,
        percent=round(100 * step / total, 1) if step is not None and total else None,
        epoch=None if epoch is None else epoch + (state != DONE),
        eta_s=eta,
        heartbeat_s=age,
        outputs=status.get("outputs") or [],
        disk_free_bytes=_free(run_dir),
        warnings=warnings_of(status.get("log")),
        **_numbers(rows, status.get("last") or {}),
    )


# What a status says, by its types: a file that was damaged or written by hand may say anything.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("recipe", "state", "reason", "host", "log", "pid_born"), str),
    **dict.fromkeys(("started_at", "updated_at"), str),
    **dict.fromkeys(("pid", "exit_code", "world_size", "step", "total_steps", "epoch"), int),
    **dict.fromkeys(("eta_s", "memory_bytes"), (int, float)),
    **{"last": dict, "result": dict, "outputs": list, "pid_command": list},
}


def _sound_status(status: dict[str, Any]) -> dict[str, Any]:
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


_COPIED = (
    *("recipe", "exit_code", "reason", "pid", "host", "world_size", "step", "total_steps"),
    *("started_at", "updated_at", "result", "memory_bytes", "log"),
)


def warnings_of(log: str | None, number: int = 5) -> list[str]:
    """The last lines of a log that warn or tell of an error."""
    found = [line for line in log_lines(log) if _WARNING.search(line)]
    return found[-number:]


def log_lines(log: str | None, number: int | None = None) -> list[str]:
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


def _state(run_dir: Path, status: dict[str, Any], rows: _Rows) -> tuple[str, str]:
    """The state that the files and the machine agree on, and what is worth saying about it."""
    said, pid, host = status.get("state"), status.get("pid"), status.get("host")
    is_here = host in (None, socket.gethostname())
    is_there = is_here and processes.is_same(status)
    if is_here and not is_there and lock.is_held(run_dir):
        return STARTING, "a process holds the directory: a run begins, or its last one is ending"
    if said != RUNNING:
        known = said in (DONE, FAILED, STOPPED)
        return (str(said), "") if known else (STALE, "status.json is missing or not readable")
    if is_here and not is_there:
        return (
            STALE,
            f"process {pid} not found; --resume auto continues the run",
        )
    age = _age(status) or 0.0
    limit = max(_SILENCE, _STEPS_OF_SILENCE / (rows.last.get("steps_per_s") or 1.0))
    where = "" if is_here else f"on {host}, whose processes cannot be seen from here"
    if age > limit:
        return STALE, f"no sign of life for {age:.0f} s" + (f", {where}" if where else "")
    return RUNNING, where


@dataclass
class _Rows:
    """What metrics.jsonl holds: training rows thinned out, all of the others."""

    train: list[dict[str, Any]] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)  # the newest training values


def _rows(path: Path) -> _Rows:
    """Parse no more than is shown: a long run's file has a million lines."""
    try:
        lines = read_bytes(path).splitlines()
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
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and _is_number(row.get("step")):
                found.append({name: value for name, value in row.items() if _is_plain(value)})
    return found


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_number(value)


def _numbers(rows: _Rows, last: dict[str, Any]) -> dict[str, Any]:
    """The fields of a view that are numbers of the training."""
    values = {name.lower(): value for name, value in {**last, **rows.last}.items()}
    tag = _loss_tag(rows.last)
    losses = [(row["step"], row[tag]) for row in rows.train if _is_number(row.get(tag))]
    judged = [row for row in rows.others if row.get("split") in ("val", "epoch")]
    smoothed, weight = 0.0, 0.0
    for _, loss in losses[-_SHOWN_LOSSES:]:
        smoothed = _SMOOTHING * smoothed + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
    return {
        "loss": rows.last.get(tag),
        "loss_smoothed": smoothed / weight if weight else None,
        "lr": values.get("lr", values.get("learning_rate")),
        **{name: values.get(name) for name in ("grad_norm", "samples_per_s", "steps_per_s")},
        "skipped": _newest(rows, last, "skipped"),
        "best": _best(judged),
        "validation": {k: v for k, v in judged[-1].items() if k not in _ABOUT} if judged else {},
        "recent_losses": losses[-_SHOWN_LOSSES:],
        "curve": [loss for _, loss in losses],
    }


def _newest(rows: _Rows, last: dict[str, Any], name: str) -> Any:
    every = sorted([*rows.train, *rows.others], key=lambda row: row.get("time") or 0.0)
    return next((row[name] for row in reversed(every) if name in row), last.get(name))


def _loss_tag(row: dict[str, Any]) -> str:
    """The name under which a recipe logs its loss."""
    if "loss" in row:
        return "loss"
    return next((name for name in row if "loss" in name.lower()), "loss")


def _best(judged: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best validation by its loss, or by its first number where it has none."""
    if not judged:
        return None
    names = [name for name in judged[-1] if name not in _ABOUT]
    tag = next((name for name in names if "loss" in name.lower()), names[0] if names else "")
    found = [row for row in judged if _is_number(row.get(tag))]
    if not found:
        return None
    pick = min if _LOWER_IS_BETTER.search(tag) else max
    row = pick(found, key=lambda row: row[tag])
    step = row.get("step", 0)
    return {"name": tag, "value": row[tag], "epoch": row.get("epoch", 0) + (step > 0), "step": step}


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and abs(value) < 1e300  # NaN and infinity are not below it


def _free(directory: Path) -> int | None:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(directory).free
    return None


def _age(status: dict[str, Any]) -> float | None:
    updated = status.get("updated_at")
    return max(0.0, time.time() - _seconds(updated)) if updated else None


def _seconds(moment: str) -> float:
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return 0.0
