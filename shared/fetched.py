"""What a directory holds of the files that were fetched there, and what is known of each.

`.download.json` beside the files remembers what was verified, so that 20 GB are not read again by
every call; a file on its way is NAME.part.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, Protocol

from shared.files import read_object, write_json
from shared.progress import amount

log = logging.getLogger(__name__)

NOTES = ".download.json"
PART = ".part"


class File(Protocol):
    """What is to be fetched. size: bytes, None where nobody says.

    checksum: `md5:…`, `sha256:…` or `git:…` (of a git blob), '' where nobody says.
    """

    @property
    def name(self) -> str:
        """Its path below the directory."""
        ...

    @property
    def size(self) -> int | None:
        """Bytes."""
        ...

    @property
    def checksum(self) -> str:
        """What its content has to give."""
        ...


def checksum_of(path: Path, like: str) -> str:
    """The checksum of a file, of the kind of `like`: `md5:…`, `sha256:…` or `git:…`, a blob's."""
    kind = like.partition(":")[0]
    if kind == "git":
        header = b"blob %d\0" % path.stat().st_size
        digest = hashlib.sha1(header, usedforsecurity=False)
    else:
        digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as stream:
        return f"{kind}:{hashlib.file_digest(stream, lambda: digest).hexdigest()}"


def is_there(file: File, directory: Path, notes: Notes, *, read_again: bool = False) -> bool:
    """Whether the file is in the directory, as it should be.

    read_again: compute its checksum although an earlier call did.
    """
    path = directory / file.name
    if not path.is_file() or file.size not in (None, path.stat().st_size):
        return False
    if notes.knows(file) and not read_again:
        return True
    if file.checksum:
        log.info("checking %s (%s)", path, amount(path.stat().st_size))
        if checksum_of(path, file.checksum) != file.checksum:
            log.warning("%s has another content than it should; it is fetched again", path)
            return False
    notes.remember(file)
    return True


class Notes:
    """What an earlier call has verified, and which file each .part belongs to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        stored = read_object(directory / NOTES)
        self._files, self._parts = (
            dict(stored[key]) if isinstance(stored.get(key), dict) else {}
            for key in ("files", "parts")
        )

    def save(self) -> None:
        """Write down what is known, if anything is."""
        if self._files or self._parts:
            write_json(self._directory / NOTES, {"files": self._files, "parts": self._parts})

    def knows(self, file: File) -> bool:
        """Whether the file was verified and has not been touched since."""
        return self._files.get(file.name) == self._entry(file)

    def remember(self, file: File) -> None:
        """The file is there and right."""
        self._files[file.name] = self._entry(file)
        self._parts.pop(file.name, None)

    def part_size(self, file: File) -> int:
        """Bytes of the file that an earlier call has left; 0 when they are of another version."""
        size = size_of(part_of(self._directory / file.name))
        is_same = file.checksum and self._parts.get(file.name) == file.checksum
        return size if is_same and (file.size is None or size <= file.size) else 0

    def begin_part(self, file: File) -> None:
        """Say whose bytes the .part will hold, before the first; drops those of another version."""
        if not self.part_size(file):
            part_of(self._directory / file.name).unlink(missing_ok=True)
        if self._parts.get(file.name) != file.checksum:
            self._parts[file.name] = file.checksum
            self.save()

    def _entry(self, file: File) -> list[Any]:
        status = (self._directory / file.name).stat()
        return [file.checksum, status.st_size, status.st_mtime_ns]


def part_of(path: Path) -> Path:
    """Where the file's bytes lie until it is whole."""
    return path.with_name(path.name + PART)


def size_of(path: Path) -> int:
    """Bytes of the file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0
