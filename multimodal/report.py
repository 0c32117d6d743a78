"""outputs/reports/report_*.json and .md: what a training was, from its start to its end.

    with Report(directory, facts, metrics) as report:
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
import os
import platform
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from multimodal import report_curves, report_text
from shared import status
from shared.errors import UserError, one_line
from shared.files import read_json, write_json, write_text

log = logging.getLogger(__name__)

SCHEMA = 1
_PACKAGES = ("torch", "torchvision", "numpy", "open_clip_torch", "soundfile", "soxr", "tensorboard")


class Report:
    """The report of one start of training. `enabled` is False on all ranks but the first.

    facts: what is known at the start. metrics: the run's metrics.jsonl, of which curves are drawn.
    """

    def __init__(
        self, directory: Path, facts: dict[str, Any], metrics: Path, *, enabled: bool = True
    ) -> None:
        self._metrics, self._enabled = metrics, enabled
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

    def close(self, state: str, reason: str, checkpoints: Path) -> None:
        """Write the last version: state done or stopped, curves, and the files in `checkpoints`."""
        self._content |= {"status": state, "reason": reason}
        self._content["checkpoints"] = files_in(checkpoints, hashed=state == "done")
        self._finish()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        notes = "".join(f", {note}" for note in getattr(error, "__notes__", []))
        failed = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        text = f"{type(error).__name__}: {one_line(error)}{notes}"
        self._content |= {"status": failed, "reason": text}
        with contextlib.suppress(OSError):  # a full disk may be what ended the run
            self._finish()

    def _finish(self) -> None:
        if self._enabled:
            self._content["curves"] = report_curves.draw(self._metrics, self._path)
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
    write_text(path.with_suffix(".md"), report_text.render(report))
