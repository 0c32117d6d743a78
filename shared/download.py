"""Files from web addresses in a directory: each whole, checked and in its place, or not there.

    files = [File("val2017.zip", 815_585_330, "md5:442b8da7…", ("http://…/val2017.zip",))]
    fetch(Client("take another source"), plan_of(files, directory))

A file on its way is NAME.part and is continued by the next call, which asks for the missing bytes
alone; `.download.json` beside the files remembers what was verified, so that 20 GB are not read
again by every call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from shared import stop
from shared.errors import UserError, one_line
from shared.files import read_object, write_json
from shared.progress import Meter, amount
from shared.web import LOST, Client, DownloadError, TransientError, why_lost

log = logging.getLogger(__name__)

PART, NOTES = ".part", ".download.json"


@dataclass(frozen=True)
class File:
    """A file to fetch.

    name: its path below the directory. size: bytes, None where nobody says.
    checksum: `md5:…`, `sha256:…` (or its first digits) or `git:…` (of a git blob); '' where nobody
    says: then the content is held against the name, and a table against `header`, its first line.
    urls: tried in this order.
    """

    name: str
    size: int | None
    checksum: str
    urls: tuple[str, ...]
    header: str = ""


@dataclass(frozen=True)
class Plan:
    """What a directory holds of some files and what it lacks. remaining: bytes still to fetch."""

    directory: Path
    present: list[File]
    missing: list[File]
    remaining: int


def plan_of(files: Iterable[File], directory: Path, *, read_again: bool = False) -> Plan:
    """Which of `files` are in `directory`, with the right content; writes nothing.

    read_again: compute checksums although an earlier call did. Raises DownloadError.
    """
    notes = Notes(directory)
    present, missing = [], []
    try:
        for file in files:
            (present if _is_there(file, notes, read_again=read_again) else missing).append(file)
        left = [(file.size or 0) - notes.part_size(file) for file in missing]
        return Plan(directory, present, missing, sum(max(0, size) for size in left))
    except OSError as error:
        raise _unusable(directory, error) from None


def fetch(client: Client, plan: Plan) -> None:
    """Fetch what the plan misses, and note down that the rest is verified.

    Where another process fetches into the directory, waits for it. Raises UserError (no space) and
    DownloadError (the network, the server, wrong content); what came until then is kept.
    """
    total = sum(file.size or 0 for file in plan.missing)
    with (
        _owned(plan.directory),
        stop.keeping("what came is kept, and the same command continues there"),
        contextlib.closing(Meter(total, total - plan.remaining)) as meter,
    ):
        notes = Notes(plan.directory)
        missing = [file for file in plan.missing if not _is_there(file, notes)]  # another may have
        check_space(plan.directory, plan.remaining if missing else 0)
        try:
            for file in plan.present:
                notes.remember(file)
            for file in missing:
                _fetch_from_first(client, file, notes, meter)
            notes.save()
        except OSError as error:
            raise _unusable(plan.directory, error) from None


def _fetch_from_first(client: Client, file: File, notes: Notes, meter: Meter) -> None:
    """Fetch a file from the first of its addresses that gives it."""
    for url in file.urls:
        try:
            return _fetch_one(client, file, url, notes, meter)
        except UserError as error:
            if url == file.urls[-1]:
                raise
            log.warning("%s; trying the next address", error)
    raise ValueError(f"{file.name} has no address")


def _fetch_one(client: Client, file: File, url: str, notes: Notes, meter: Meter) -> None:
    """Fetch, verify and put in place one file."""
    path = notes.directory / file.name
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    notes.begin_part(file)
    meter.name = file.name
    client.persist(lambda: _receive(client, file, url, part, meter), lambda: size_of(part))
    part.touch()  # of an empty file nothing is received
    if wrong := _wrong_content(part, file):
        part.unlink()
        raise DownloadError(
            f"{file.name} came from {httpx.URL(url).host} with {wrong} and was removed: the same "
            f"command fetches it again; if that repeats, {client.otherwise}"
        )
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(path)
    notes.remember(file)
    notes.save()


def _receive(client: Client, file: File, url: str, part: Path, meter: Meter) -> None:
    """Add to `part` what one connection brings; without a checksum it begins anew each time."""
    there = size_of(part) if file.checksum else 0
    if there and there == file.size:
        return
    with contextlib.closing(client.open(url, there, file.name)) as response:
        place = response.headers.get("Content-Range")
        if response.status_code == 416 and place == f"bytes */{there}":
            return  # its size was not known, and all of it is there
        start, total = _check_answer(client, response, file, there)
        if start < there:  # a server that knows no Range sends everything again
            meter.add(start - there)
        position = start
        with part.open("r+b" if start else "wb") as stream:
            stream.seek(start)
            for chunk in _body(response):
                position += stream.write(chunk)
                meter.add(len(chunk))
                if file.size is not None and position > file.size:
                    raise _wrong_length(client, response, file, f"more than {file.size:,}")
    if position < total:
        raise TransientError(response.url.host, "connection closed early")


def _check_answer(
    client: Client, response: httpx.Response, file: File, there: int
) -> tuple[int, int]:
    """Where in the file the body begins, and the file's size (0: unknown); raises for no file."""
    headers = response.headers
    if response.status_code not in (200, 206):
        raise client.refusal(response.url.host, response.status_code, headers, file.name)
    if "text/html" in headers.get("Content-Type", "") and "html" not in file.name:
        raise DownloadError(
            f"{response.url.host} sent a web page in place of {file.name}: a login page of the "
            "network or a block stands before it; open the address in a browser, or "
            f"{client.otherwise}"
        )
    is_plain = "Content-Encoding" not in headers and headers.get("Content-Length", "").isdecimal()
    start = there if response.status_code == 206 else 0
    total = start + int(headers["Content-Length"]) if is_plain else 0
    place = headers.get("Content-Range", "nothing")
    if response.status_code == 206 and not place.startswith(f"bytes {start}-"):
        raise _wrong_length(client, response, file, place)
    if file.size is not None and total not in (0, file.size):
        raise _wrong_length(client, response, file, str(total))
    return start, file.size or total


def _wrong_length(client: Client, response: httpx.Response, file: File, given: str) -> Exception:
    size = "another size" if file.size is None else f"{file.size:,}"
    return DownloadError(
        f"{response.url.host} sends {given} bytes for {file.name}, which has {size}: it holds "
        f"another version or a damaged copy; {client.otherwise}"
    )


def _body(response: httpx.Response) -> Iterator[bytes]:
    """The bytes of the answer as they arrive. Raises TransientError when they cease."""
    try:
        yield from response.iter_bytes()
    except LOST as error:
        raise TransientError(response.url.host, why_lost(error)) from None


# --- a directory ----------------------------------------------------------------------------------


class Notes:
    """What an earlier call has verified in a directory, and which file each .part belongs to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        stored = read_object(directory / NOTES)
        self._files, self._parts = (
            dict(stored[key]) if isinstance(stored.get(key), dict) else {}
            for key in ("files", "parts")
        )

    def save(self) -> None:
        """Write down what is known, if anything is."""
        if self._files or self._parts:
            write_json(self.directory / NOTES, {"files": self._files, "parts": self._parts})

    def knows(self, file: File) -> bool:
        """Whether the file was verified and has not been touched since."""
        return self._files.get(file.name) == self._entry(file)

    def remember(self, file: File) -> None:
        """The file is there and right."""
        self._files[file.name] = self._entry(file)
        self._parts.pop(file.name, None)

    def part_size(self, file: File) -> int:
        """Bytes of the file that an earlier call has left; 0 when they are of another version."""
        size = size_of(part_of(self.directory / file.name))
        is_same = file.checksum and self._parts.get(file.name) == file.checksum
        return size if is_same and (file.size is None or size <= file.size) else 0

    def begin_part(self, file: File) -> None:
        """Say whose bytes the .part will hold, before the first; drops those of another version."""
        if not self.part_size(file):
            part_of(self.directory / file.name).unlink(missing_ok=True)
        if self._parts.get(file.name) != file.checksum:
            self._parts[file.name] = file.checksum
            self.save()

    def _entry(self, file: File) -> list[Any]:
        status = (self.directory / file.name).stat()
        return [file.checksum, status.st_size, status.st_mtime_ns]


def part_of(path: Path) -> Path:
    """Where the bytes of `path` are until it is whole."""
    return path.with_name(path.name + PART)


def size_of(path: Path) -> int:
    """Bytes of the file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


@contextlib.contextmanager
def _owned(directory: Path) -> Iterator[None]:
    """Make `directory`; of several processes one is in the block, the others wait.

    Raises UserError when the directory cannot be used.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{directory} cannot be used: {one_line(error)}; give another") from None
    try:
        with contextlib.suppress(OSError):  # a network file system may have no locks
            _wait_for_lock(handle, directory)
        yield
    finally:
        os.close(handle)


def _wait_for_lock(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("another download is at work in %s: waiting for it", directory)
        fcntl.flock(handle, fcntl.LOCK_EX)


def check_space(directory: Path, needed: int) -> None:
    """Raise UserError when the disk of `directory` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"the disk of {directory} has {amount(free)} free and {amount(needed)} are to be "
            f"fetched, {needed - free:,} bytes too many: free some space or give another directory"
        )


def _unusable(directory: Path, error: OSError) -> DownloadError:
    """What a disk's refusal means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(
            f"the disk of {directory} is full: free some space; the same command continues"
        )
    return DownloadError(f"{directory} cannot be used: {one_line(error)}")


# --- content --------------------------------------------------------------------------------------

_MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b"<script")


def _is_there(file: File, notes: Notes, *, read_again: bool = False) -> bool:
    path = notes.directory / file.name
    if not path.is_file() or file.size not in (None, path.stat().st_size):
        return False
    if file.checksum and not read_again and notes.knows(file):
        return True
    if file.checksum:
        log.info("checking %s (%s)", path, amount(path.stat().st_size))
    if wrong := _wrong_content(path, file):
        log.warning("%s has %s; it is fetched again", path, wrong)
        return False
    notes.remember(file)
    return True


def _wrong_content(path: Path, file: File) -> str:
    """What is wrong with the file's content, '' for nothing."""
    if file.checksum:
        kind = file.checksum.partition(":")[0]
        is_same = f"{kind}:{_digest(path, kind)}".startswith(file.checksum)
        return "" if is_same else "a wrong checksum"
    with path.open("rb") as stream:
        start = stream.read(4096)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_MARKUP) and "html" not in file.name:
        return "a web page in place of its content"
    if not text.startswith(file.header.encode()):
        return f"a first line other than {file.header}"
    suffix = Path(file.name).suffix.lower()
    return "" if _is_of_kind(path, suffix, start) else f"content that is no {suffix[1:]}"


def _is_of_kind(path: Path, suffix: str, start: bytes) -> bool:
    """Whether the content is what the suffix says, for those that come without a checksum."""
    if suffix == ".csv":
        return bool(start) and b"\0" not in start
    if suffix == ".json":
        return _is_json(path.read_bytes())
    if suffix == ".safetensors":
        length = int.from_bytes(start[:8], "little")
        return 8 + length <= path.stat().st_size and start[8:9] == b"{"
    return True


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    if kind == "git":  # the name that git gives to a file's content
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: digest).hexdigest()
