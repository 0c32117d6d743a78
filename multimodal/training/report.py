"""outputs/reports/report_*.json and .md: what a training was, from its start to its end.

    with Report(run_dir, facts) as report:
        report.update(stages=[…])       # after every epoch
        report.close(status, reason)    # or an exception does it

    add_section(newest(output_dir), "retrieval", rows)      # what evaluation found, later

The JSON holds everything, the Markdown is rendered from it. A run that fails or is stopped leaves
its report too. Content is plain JSON: texts, numbers, lists and dictionaries.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import math
import os
import platform
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from multimodal.training.schedule import Span
from shared import status
from shared.errors import UserError, one_line
from shared.files import read_json, write_json, write_text
from shared.stop import Stopped

log = logging.getLogger(__name__)

SCHEMA = 1
_PACKAGES = ("torch", "torchvision", "numpy", "open_clip_torch", "soundfile", "soxr", "tensorboard")


class Report:
    """The report of one start of training. `enabled` is False on all ranks but the first.

    facts: what is known at the start. The curves are in report.html.
    """

    def __init__(self, run_dir: Path, facts: dict[str, Any], *, enabled: bool = True) -> None:
        self.checkpoints = run_dir / "checkpoints"
        self._enabled, directory = enabled, run_dir / "reports"
        self._path = _free_name(directory) if enabled else directory
        self._content: dict[str, Any] = {
            "schema": SCHEMA,
            "name": self._path.stem,
            "status": "running",
            "reason": None,
            "started_at": status.now(),
            **facts,
        }

    def __enter__(self) -> Report:
        self._write()
        return self

    def update(self, **content: Any) -> None:
        """Put `content` into the report, and write it."""
        self._content |= content
        self._write()

    def close(self, state: str, reason: str) -> None:
        """Write the last version: state done or interrupted, the checkpoints' sums."""
        self._content |= {"status": state, "reason": reason}
        self._content["checkpoints"] = files_in(self.checkpoints, hashed=state == "done")
        self._finish()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        if isinstance(error, Stopped):
            self.close("interrupted", str(error))
            return
        notes = "".join(f", {note}" for note in getattr(error, "__notes__", []))
        text = f"{type(error).__name__}: {one_line(error)}{notes}"
        self._content |= {"status": "failed", "reason": text}
        with contextlib.suppress(OSError):  # a full disk may be what ended the run
            self._finish()

    def _finish(self) -> None:
        if self._enabled:
            self._write()
            log.info("report: %s", self._path.with_suffix(".md"))

    def _write(self) -> None:
        if not self._enabled:
            return
        self._content["updated_at"] = status.now()
        try:
            _write(self._path, self._content)
        except OSError as error:
            log.warning("%s was not written: %s", self._path, one_line(error))


def newest(output_dir: Path) -> Path | None:
    """The latest report_*.json below the output directory, if there is one."""
    return max((output_dir / "reports").glob("report_*.json"), default=None)


def add_section(path: Path, name: str, content: Any) -> None:
    """Put `content` into the report at `path` (its JSON) as `name`, and render it anew.

    A list of dictionaries becomes a table. Raises UserError for a file that is no report.
    """
    report = read_json(path)
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise UserError(f"{path} is no report of a training: give a reports/report_*.json")
    try:
        _write(path, report | {name: content, "updated_at": status.now()})
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is a damaged report: {one_line(error)}") from None


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the packages."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    found: dict[str, Any] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory_gb": round(gigabytes, 1),
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9)
        found["cuda"] = torch.version.cuda
    return found | {"packages": {name: _version(name) for name in _PACKAGES}}


def files_in(directory: Path, *, hashed: bool) -> list[dict[str, Any]]:
    """Name, bytes and SHA-256 of the checkpoints there; the sum only when `hashed`."""
    paths = [path for path in directory.glob("*.pt") if path.is_file()]
    paths.sort(key=lambda path: path.stat().st_mtime)
    return [
        {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": _sha256(path) if hashed else None,
        }
        for path in paths
    ]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _free_name(directory: Path) -> Path:
    """report_<time>.json, with a letter more when a run began in the same second."""
    directory.mkdir(parents=True, exist_ok=True)
    base = time.strftime("report_%Y%m%d_%H%M%S")
    for suffix in ("", *"bcdefghijklmnopqrstuvwxyz"):
        path = directory / f"{base}{suffix}.json"
        if not path.exists():
            return path
    raise FileExistsError(f"{directory / base}: 26 reports of one second")


def _write(path: Path, report: dict[str, Any]) -> None:
    write_json(path, report)
    write_text(path.with_suffix(".md"), render(report))


# --- what a run remembers -------------------------------------------------------------------------


class History:
    """Rows of the report's table of stages, and the recalls before training. Plain values alone."""

    def __init__(self) -> None:
        self.before: dict[str, dict[str, float]] = {}
        self._stages: dict[str, dict[str, Any]] = {}
        self._best_recall = -1.0
        self._first: dict[str, dict[str, float]] = {}  # losses after a stage's first epoch
        self._since = time.monotonic()

    @property
    def stages(self) -> list[dict[str, Any]]:
        """One row a stage."""
        return list(self._stages.values())

    @property
    def best_loss(self) -> float:
        """The validation loss at the best epoch of the latest stage; NaN before there is one."""
        latest = next(reversed(self._stages.values()), {})
        return latest.get("best_val_loss", math.nan)

    def is_best_recall(self, recall: float) -> bool:
        """Whether it is the highest so far."""
        improved = recall > self._best_recall
        self._best_recall = max(recall, self._best_recall)
        return improved

    def relative(self, span: Span, losses: dict[str, float]) -> float:
        """The mean of the losses, each divided by its value after the stage's first epoch.

        Losses of classes, pairs and spectrograms have other units: undivided, the mean would be
        about those with the largest numbers alone.
        """
        first = self._first.setdefault(span.name, losses)
        shares = [loss / first[name] for name, loss in losses.items() if first.get(name)]
        return sum(shares) / len(shares) if shares else math.nan

    def add_epoch(
        self,
        span: Span,
        steps: int,
        rows: int,
        train_loss: float,
        val_loss: float,
        chance: float,
        *,
        is_best: bool,
    ) -> None:
        """Add an epoch of `steps` steps of `rows` samples each, the seconds since the last one."""
        seconds = time.monotonic() - self._since
        self._since = time.monotonic()
        row = self._stages.setdefault(
            span.name, {"stage": span.name, "epochs": 0, "steps": 0, "seconds": 0.0}
        )
        row["epochs"] += 1
        row["steps"] += steps
        row["seconds"] = round(row["seconds"] + seconds, 2)
        row["samples_per_s"] = round(rows * row["steps"] / max(row["seconds"], 1e-9), 2)
        row["peak_memory_gb"] = round(_peak_memory() / 1e9, 3)
        row["train_loss"], row["val_loss"] = _finite(train_loss), _finite(val_loss)
        row["contrast_at_chance"] = _finite(chance)
        if is_best:
            row |= {"best_val_loss": row["val_loss"], "best_epoch": span.first + row["epochs"]}

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "before": self.before,
            "stages": self._stages,
            "first": self._first,
            "best_recall": self._best_recall,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; the time in between does not count."""
        self.before, self._stages = state["before"], state["stages"]
        self._first = state.get("first", {})
        self._best_recall = state.get("best_recall", -1.0)
        self._since = time.monotonic()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- the page -------------------------------------------------------------------------------------

_TEMPLATE = "report.md.jinja"
_SECTIONS = {  # in their order: key → heading
    "summary": "Result",
    "stages": "Stages",
    "data": "Data",
    "retrieval": "Retrieval",
    "evaluation": "Evaluation",
    "model": "Model",
    "pretrained": "Start",
    "checkpoints": "Checkpoints",
    "environment": "Environment",
    "config": "Settings",
}
_SHARES = ("R@", "mAP", "chance", "share")  # values in [0, 1] of the JSON, percent on the page
_HEAD = {"schema", "name", "status", "reason", "started_at", "updated_at", "command"}


def render(report: Mapping[str, Any]) -> str:
    """The whole page, from a report's JSON; sections that nobody named come last."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    others = [key for key in report if key not in _SECTIONS and key not in _HEAD]
    headings = _SECTIONS | {key: key.replace("_", " ").capitalize() for key in others}
    sections = [
        (heading, _body(_shown(key, report[key])))
        for key, heading in headings.items()
        if report.get(key) not in (None, [], {})
    ]
    data = sorted({row["data_set"] for row in report.get("data", []) if "left_out" not in row})
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    known = dict.fromkeys(_HEAD) | dict(report)
    return pages.get_template(_TEMPLATE).render(report=known, sections=sections, data_sets=data)


def _shown(name: str, value: Any) -> Any:
    """`value` with the shares in it as percent."""
    if isinstance(value, Mapping):
        return {key: _shown(str(key), item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(name, item) for item in value]
    is_share = isinstance(value, float) and name.rpartition("/")[2].startswith(_SHARES)
    return f"{100 * value:.3g} %" if is_share else value


def _body(content: Any) -> str:
    if isinstance(content, Mapping):
        return _pairs(content)
    if isinstance(content, Sequence) and not isinstance(content, str):
        if content and all(isinstance(row, Mapping) for row in content):
            return _table(content)
        return "\n".join(f"- {_cell(item)}" for item in content)
    return str(content)


def _pairs(content: Mapping[str, Any]) -> str:
    """Plain values as a table of two columns; lists of rows below, each with its name."""
    plain = [(name, value) for name, value in content.items() if not _is_rows(value)]
    parts = []
    if plain:
        rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in plain]
        parts.append("\n".join(["| | |", "| :--- | :--- |", *rows]))
    for name, value in content.items():
        if _is_rows(value):
            parts += [f"### {name.replace('_', ' ')}", _table(value)]
    return "\n\n".join(parts)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [_line(columns), _line(":---" for _ in columns)]
    lines += [_line(_cell(row.get(name)) for name in columns) for row in rows]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    """One value in few characters, safe inside a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_cell(item)}" for name, item in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value) or "–"
    return " ".join(str(value).split()).replace("|", "\\|")
