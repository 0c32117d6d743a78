"""What a run directory tells, read without trust: status, settings, curves, log, pictures.

    record = read(run_dir)

Nothing here raises for what the files hold: what cannot be read is named in `record.problems`.
Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import processes
from shared.errors import one_line
from shared.files import is_file, open_regular, read_text
from shared.run_view import log_lines

PAGES = "pages"  # of a run directory: the pictures and tables that a recipe adds to the report
EVALUATION = "evaluation"  # where its evaluate.py writes: of what lies there, the pages
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".html")
_LARGEST_JSON = 32_000_000  # bytes: no settings and no status are larger
_LARGEST_METRICS = 400_000_000
_LONGEST_LINE = 1_000_000
_PLACES = ("step", "epoch", "split", "time")  # of a row in metrics.jsonl; all else are numbers
_LOG_END = 60  # lines

Series = tuple[list[float], list[float]]  # steps, values; NaN where the run wrote null


@dataclass
class RunRecord:
    """One run as its files tell it. curves: tag → split → series. problems: what could not be read.

    state: done, stopped, failed, running, killed (running, says its status, but no process is) or
    unknown.
    """

    run_dir: Path
    state: str = "unknown"
    status: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, dict[str, Series]] = field(default_factory=dict)
    log: Path | None = None
    log_end: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The recipe, if known, and the directory's name."""
        own = self.run_dir.absolute().name
        return " · ".join(dict.fromkeys(part for part in (self.text("recipe"), own) if part))

    @property
    def settings(self) -> dict[str, Any]:
        """The flat {name: value} of the run's settings."""
        return flat(_mapping(self.config.get("settings")))

    @property
    def defaults(self) -> dict[str, Any]:
        """The same of the defaults that the run did not keep to; {} when none are on record."""
        return flat(_mapping(self.config.get("defaults")))

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, host and devices."""
        host = {"host": self.status.get("host"), "processes": self.status.get("world_size")}
        known = {name: value for name, value in host.items() if value is not None}
        stored = {"environment": self.config.get("environment") or {}}
        stored |= {"versions": self.config.get("versions") or {}}
        return known | flat(_mapping(stored["environment"])) | flat(_mapping(stored["versions"]))

    def text(self, name: str) -> str:
        """A field of status.json as one line of text; '' without it."""
        value = self.status.get(name)
        return "" if value is None else " ".join(str(value).split())[:2000]

    def mapping(self, name: str) -> dict[str, Any]:
        """A field of status.json that is a mapping; {} without it."""
        return _mapping(self.status.get(name))


def read(run_dir: Path) -> RunRecord:
    """What the files of `run_dir` tell, as far as they can be read."""
    record = RunRecord(run_dir)
    record.status = _object(run_dir / "status.json", record.problems)
    record.config = _object(run_dir / "config.json", record.problems)
    record.state = _state(record.status)
    record.curves = _curves(record)
    record.log = _log_of(record)
    record.log_end = log_lines(str(record.log), _LOG_END) if record.log else []
    record.pictures = _pictures(record)
    return record


def flat(values: dict[str, Any], prefix: str = "", depth: int = 20) -> dict[str, Any]:
    """`values` without nesting: {"a": {"b": 1}} → {"a.b": 1}; an empty mapping stays as it is."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value and depth:
            found |= flat(value, f"{prefix}{name}.", depth - 1)
        else:
            found[f"{prefix}{name}"] = value
    return found


def as_text(value: Any) -> str:
    """A value as the tables show it: texts as they are, all else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):
        return repr(type(value))


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


def _mapping(value: Any) -> dict[str, Any]:
    return {str(name): item for name, item in value.items()} if isinstance(value, dict) else {}


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
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
    return _mapping(value)


def _state(status: dict[str, Any]) -> str:
    """How the run stands, as its status says it and its process bears out."""
    state = status.get("state")
    if state not in ("done", "stopped", "failed", "running"):
        return "unknown"
    is_here = status.get("host") == socket.gethostname()
    if state == "running" and is_here and not processes.is_same(status):
        return "killed"
    return str(state)


def _curves(record: RunRecord) -> dict[str, dict[str, Series]]:
    path, problems = record.run_dir / "metrics.jsonl", record.problems
    curves: dict[str, dict[str, Series]] = {}
    refused = 0
    try:
        for row in _rows(path):
            step = number(row.get("step")) if row else None
            if row is None or step is None or not math.isfinite(step):
                refused += 1
                continue
            split = str(row.get("split", ""))[:40]
            for tag, value in row.items():
                found = None if tag in _PLACES else number(value)
                if found is not None:
                    steps, values = curves.setdefault(tag, {}).setdefault(split, ([], []))
                    steps.append(step)
                    values.append(found)
    except FileNotFoundError:
        # else it is a run that has no losses, as a filter's
        if any(number(value) is not None for value in record.mapping("last").values()):
            problems.append(f"{path.name} is missing")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {one_line(error)}")
    if refused:
        problems.append(f"{path.name}: {refused} line(s) are no rows and were passed over")
    return curves


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of metrics.jsonl; None for a line that is none."""
    with open_regular(path) as stream:
        while line := stream.readline(_LONGEST_LINE):
            if stream.tell() > _LARGEST_METRICS:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def _log_of(record: RunRecord) -> Path | None:
    """The run's log file: as status.json names it, else the newest in the run directory."""
    named = record.status.get("log")
    candidates = [Path(named)] if isinstance(named, str) and named else []
    with contextlib.suppress(OSError):
        candidates += sorted(record.run_dir.glob("*.log"), key=lambda p: p.stat().st_mtime)[::-1]
    return next((path for path in candidates if is_file(path)), None)


def _pictures(record: RunRecord) -> list[Path]:
    """Files of pages/ by their names, pages of an evaluation, pictures among the run's outputs."""
    found: list[Path] = []
    for pattern in (f"{PAGES}/*", f"{EVALUATION}/*.html"):
        with contextlib.suppress(OSError):
            found += sorted(record.run_dir.glob(pattern))
    outputs = record.status.get("outputs")
    for name in outputs if isinstance(outputs, list) else []:
        if isinstance(name, str):
            found.append(record.run_dir / name)  # an absolute one stays as it is
    inside = [path for path in found if path.suffix.lower() in PICTURES and is_file(path)]
    return [path for path in dict.fromkeys(inside) if path.name != "report.html"]
