"""status.json: where a run is and how it ended, for people, monitors and the launcher.

Fields: schema recipe state(running|done|stopped|failed) exit_code reason pid host pid_born
pid_command[] world_size step total_steps epoch eta_s started_at updated_at last{} best{} result{}
outputs[] log memory_bytes data{}. Standard library only.
"""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from shared import processes
from shared.files import read_json, write_json

log = logging.getLogger(__name__)

_EVERY = 2.0  # seconds between updates while training


class Status:
    """The status of one run, kept in `run_dir/status.json` by rank 0.

    pid: the process to signal in order to stop the run; by default this one.
    """

    def __init__(self, run_dir: Path, *, pid: int | None = None, **fields: Any) -> None:
        self._path = run_dir / "status.json"
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
            **fields,
        }

    @property
    def is_due(self) -> bool:
        """Whether the file is old enough to be written again."""
        return time.monotonic() - self._written_at > _EVERY

    def write(self, **changes: Any) -> None:
        """Apply `changes` and write the file; a full disk costs a warning, not the run."""
        self.fields |= changes | {"updated_at": now()}
        self._written_at = time.monotonic()
        _write(self._path, self.fields)


def close(run_dir: Path | None, code: int, reason: str) -> None:
    """Mark a run as failed when it could not do so itself; one that ended stays as it is."""
    fields = read_json(run_dir / "status.json") if run_dir else None
    if run_dir and isinstance(fields, dict) and fields.get("state") == "running":
        fields |= {"state": "failed", "exit_code": code, "reason": reason, "updated_at": now()}
        _write(run_dir / "status.json", fields)


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
