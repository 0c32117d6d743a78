"""status.json: where a run is and how it ended, for people, monitors and the launcher.

Fields: schema recipe state(running|done|stopped|failed) exit_code reason pid host pid_born
pid_command[] world_size step total_steps epoch eta_s doing (a part without steps, how far)
started_at updated_at last{} best{} result{} outputs[] log memory_bytes data{} files[] (what the run
wrote into its directory) found[] (what was there before it). Standard library only.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from shared import files, processes
from shared.files import read_object, write_json

log = logging.getLogger(__name__)

SILENCE = 300.0  # seconds without an update after which nobody relies on a run's status
_EVERY = 2.0  # seconds between updates while training
_LOCK = "run.lock"  # belongs to the directory: every run there takes it
# of a run whatever it lists: written last, or after its end
_ALWAYS = ("status.json", "config.json", "metrics.jsonl", "report.html", "pages", "evaluation")


class Status:
    """The status of one run, kept in `run_dir/status.json` by rank 0.

    pid: the process to signal in order to stop the run; by default this one.
    """

    def __init__(self, run_dir: Path, *, pid: int | None = None, **fields: Any) -> None:
        self._dir = run_dir
        self._written_at = -math.inf
        self.fields: dict[str, Any] = {
            "schema": 1,
            "state": "running",
            "exit_code": None,
            "reason": None,
            **processes.describe(pid or os.getpid()),
            "started_at": now(),
            "last": {},
            "best": {},
            "result": None,
            "outputs": [],
            "found": _found(run_dir),
            **fields,
        }

    @property
    def is_due(self) -> bool:
        """Whether the file is old enough to be written again."""
        return time.monotonic() - self._written_at > _EVERY

    def write(self, **changes: Any) -> None:
        """Apply `changes` and write the file; a full disk costs a warning, not the run."""
        written = _names(self._dir) - set(self.fields["found"])
        self.fields |= changes | {"updated_at": now(), "files": sorted(written)}
        self._written_at = time.monotonic()
        _write(self._dir / "status.json", self.fields)


def close(run_dir: Path | None, code: int, reason: str, state: str = "failed") -> None:
    """Mark a run as failed when it could not do so itself; one that ended stays as it is."""
    fields = read_object(run_dir / "status.json") if run_dir else {}
    if run_dir and fields.get("state") == "running":
        fields |= {"state": state, "exit_code": code, "reason": reason, "updated_at": now()}
        _write(run_dir / "status.json", fields)


def heartbeat_age(fields: dict[str, Any]) -> float | None:
    """Seconds since a status was written; None where it does not say when."""
    updated = _seconds(fields.get("updated_at"))
    return max(0.0, time.time() - updated) if math.isfinite(updated) else None


def loss_tag(row: dict[str, Any]) -> str:
    """The name under which a recipe logs its loss."""
    if "loss" in row:
        return "loss"
    return next((name for name in row if "loss" in name.lower()), "loss")


def files_of(run_dir: Path) -> set[str]:
    """Names of what a run of this toolkit wrote into the directory; none when it holds no run."""
    fields, config = read_object(run_dir / "status.json"), read_object(run_dir / "config.json")
    if "schema" not in fields and not {"settings", "identity"} & config.keys():
        return set()
    there = _names(run_dir)
    listed = fields.get("files")
    if not isinstance(listed, list):  # a run of before this list, or a damaged status
        began = _seconds(fields.get("started_at"))
        listed = [name for name in there if _changed_at(run_dir / name) >= began]
    checkpoints = {name for name in there if name.startswith(("last.", "checkpoint-"))}
    return there & ({*_ALWAYS, *map(str, listed)} | checkpoints)


def move_aside(run_dir: Path) -> Path | None:
    """Move the run in the directory to the first free `run_dir.1`, `run_dir.2`, …; the new place.

    What no run wrote stays. None when there is no run.
    """
    names = files_of(run_dir)
    return files.move_aside(run_dir, names) if names else None


def _found(run_dir: Path) -> list[str]:
    """What is in the directory and not a run's; of a run that is continued, what it noted."""
    noted = read_object(run_dir / "status.json").get("found")
    there = _names(run_dir)
    return sorted(there & set(map(str, noted)) if isinstance(noted, list) else
                  there - files_of(run_dir))  # fmt: skip


def _names(directory: Path) -> set[str]:
    """What is in the directory, without its lock and half-written files."""
    with contextlib.suppress(OSError):
        names = {entry.name for entry in directory.iterdir()}
        return {name for name in names if name != _LOCK and not files.is_temporary(name)}
    return set()


def _changed_at(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return math.inf


def _seconds(moment: Any) -> float:
    """A moment of status.json in seconds since 1970; minus infinity for anything else."""
    with contextlib.suppress(TypeError, ValueError):
        return datetime.fromisoformat(moment).timestamp()
    return -math.inf


def _without_nan(value: Any) -> Any:
    """`value` with None for NaN and infinities at any depth."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """`numbers` with None for NaN and infinities, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def now() -> str:
    """The wall-clock time as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _write(path: Path, fields: dict[str, Any]) -> None:
    try:
        write_json(path, _without_nan(fields), durable=False)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
