"""Where fetched pictures go, which of them are known to be whole, and what could not be had."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavic.src.catalogue import Picture
from shared.errors import UserError, one_line
from shared.files import (
    cut_json_lines,
    read_json_lines,
    remove_stale_temporaries,
    write_atomic,
)
from shared.images import problem
from shared.lock import try_to_lock

VERIFIED = ".verified.jsonl"
FAILURES = "crawl_failures.jsonl"
FOLDERS = {"train": "train_images", "valid": "valid_images"}


class Folder:
    """A directory of pictures. What was found whole once is known by its size and time of change.

    Several threads may use it.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            remove_stale_temporaries(directory)
            notes = list(read_json_lines(directory / VERIFIED))
            self._notes = (directory / VERIFIED).open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UserError(
                f"{directory} cannot be written ({one_line(error)}): choose another --data-root"
            ) from None
        self._directory, self._lock = directory, threading.Lock()
        self._known = {
            row["name"]: (row["size"], row["time"])
            for row in notes
            if row.keys() == {"name", "size", "time"} and isinstance(row["name"], str)
        }

    def holds(self, name: str) -> bool:
        """Whether a whole picture of this name is there; one not known yet is decoded."""
        path = self._directory / name
        try:
            found = path.stat()
        except OSError:
            return False
        if self._known.get(name) == (found.st_size, found.st_mtime_ns):
            return True
        if problem(path) is not None:
            return False
        self._note(name, found)
        return True

    def put(self, name: str, content: bytes) -> None:
        """Write a picture that is known to be whole, in one step. Raises OSError (disk full)."""

        def write(stream: Any) -> None:
            stream.write(content)

        path = self._directory / name
        write_atomic(path, write, durable=False)
        self._note(name, path.stat())

    def close(self) -> None:
        """Close the notes."""
        self._notes.close()

    def _note(self, name: str, found: os.stat_result) -> None:
        row = {"name": name, "size": found.st_size, "time": found.st_mtime_ns}
        with self._lock:
            self._known[name] = (found.st_size, found.st_mtime_ns)
            self._notes.write(json.dumps(row, ensure_ascii=False) + "\n")


class Failures:
    """crawl_failures.jsonl: a line for each picture that this crawl could not have.

    Lines of splits that are not crawled this time stay.
    """

    def __init__(self, path: Path, splits: set[str]) -> None:
        cut_json_lines(path, lambda row: row.get("split") not in splits)
        self._lines = path.open("a", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()

    def add(self, picture: Picture, reason: str, tries: int, *, is_final: bool) -> None:
        """Note a failure. is_final: another crawl will most likely not get it either."""
        row = {
            "split": picture.split,
            "name": picture.name,
            "url": picture.url,
            "reason": reason,
            "tries": tries,
            "final": is_final,
        }
        with self._lock:
            self._lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def take_lock(data_root: Path) -> Callable[[], None]:
    """Make `data_root` this crawl's own; the result gives it back.

    Raises UserError when another crawl is at work there, or it cannot be written.
    """
    try:
        handle = os.open(data_root / ".crawl.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{data_root} cannot be written ({one_line(error)}): choose another --data-root"
        ) from None
    if not try_to_lock(handle):
        os.close(handle)
        raise UserError(f"another crawl is at work in {data_root}: wait for it, or stop it")
    return lambda: os.close(handle)
