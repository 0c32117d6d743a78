"""Files from web addresses in a directory: each whole, checked and in its place, or not there.

    line = Line(PATIENCE, {}, WEB_ADVICE)
    files = [WebFile("val2017.zip", 815_585_330, "md5:442b8da7…", "http://…/val2017.zip")]
    notes = Notes(directory)
    missing = [file for file in files if not is_there(file, directory, notes)]
    fetch_all(line, directory, missing, url_of=lambda file: file.url)

A file on its way is NAME.part and is continued by the next call; `.download.json` beside the files
remembers what was verified, so that 20 GB are not read again by every call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

from shared.errors import INTERRUPTED, UserError, one_line
from shared.files import read_json, write_json
from shared.progress import clock
from shared.transport import Advice, DownloadError, Line, TransientError, refusal

log = logging.getLogger(__name__)

NOTES = ".download.json"
PART = ".part"
WEB_ADVICE = Advice(
    unreachable="or fetch the file by hand and put it there",
    elsewhere="another source, or by hand",
    not_found="the address may have changed; fetch the file by hand and put it there",
    not_allowed="it is not public, or no longer; fetch the file by hand and put it there",
)

_LINE_EVERY = 10.0  # seconds between lines of progress in a log


class DownloadInterrupted(UserError):  # noqa: N818, it is no error
    """Ctrl-C: what was fetched stays; exit code 130."""

    exit_code = INTERRUPTED


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


@dataclass(frozen=True)
class WebFile:
    """A file at an address; see File."""

    name: str
    size: int | None
    checksum: str
    url: str


F = TypeVar("F", bound=File)


def fetch_all(
    line: Line,
    directory: Path,
    missing: Sequence[F],
    *,
    url_of: Callable[[F], str],
    present: Sequence[F] = (),
) -> None:
    """Fetch the `missing` files; note down that the `present` ones are known to be right.

    Raises UserError (no space, another download at work there), DownloadError (the network, the
    server, a wrong checksum) and DownloadInterrupted; what came until then is kept.
    """
    notes = Notes(directory)
    done = sum(map(notes.part_size, missing))
    total = sum(file.size or 0 for file in missing)
    meter = Meter(total, done)
    with owned(directory):
        check_space(directory, max(0, total - done))
        notes = Notes(directory)
        try:
            for file in present:
                notes.remember(file)
            for file in missing:
                fetch_one(line, directory, file, url_of(file), notes, meter)
            notes.save()
        except KeyboardInterrupt:
            raise DownloadInterrupted(
                f"interrupted with {meter}; the same command continues there"
            ) from None
        except OSError as error:
            raise unusable(directory, error) from None
        finally:
            meter.close()


def fetch_one(
    line: Line, directory: Path, file: File, url: str, notes: Notes, meter: Meter
) -> None:
    """Fetch, verify and put in place one file; DownloadError when its bytes are wrong."""
    path = directory / file.name
    part = part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    notes.begin_part(file)
    meter.name = file.name
    line.persist(lambda: _receive(line, file, url, part, meter), lambda: size_of(part))
    part.touch()  # of an empty file nothing is received
    if file.checksum and checksum_of(part, file.checksum) != file.checksum:
        part.unlink()
        raise DownloadError(
            f"{file.name} came from {_host(url)} with a wrong checksum and was removed: the same "
            f"command fetches it again; if that repeats, use {line.advice.elsewhere}"
        )
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    part.replace(path)
    notes.remember(file)
    notes.save()


def _receive(line: Line, file: File, url: str, part: Path, meter: Meter) -> None:
    """Add to `part` what one connection brings; without a checksum it begins anew each time."""
    position = size_of(part) if file.checksum else 0
    if file.size is not None and position == file.size:
        return
    with contextlib.closing(line.open(url, position, file.name)) as response:
        if response.status_code == 416 and _is_whole(response, position):
            return  # its size was not known, and all of it is there
        known = _check_answer(line, response, file, position)
        told = _told_size(response, position)
        with part.open("ab" if position else "wb") as stream:
            for chunk in line.body(response):
                new, known = chunk[known:], max(0, known - len(chunk))
                if file.size is not None and position + len(new) > file.size:
                    raise _wrong_length(line, response, file, f"more than {file.size:,}")
                stream.write(new)
                position += len(new)
                meter.add(len(new))
    if position < (file.size or told or 0):
        raise TransientError(response.url.host, "connection closed early")


def _check_answer(line: Line, response: httpx.Response, file: File, position: int) -> int:
    """How many bytes of the body are in the .part file already; raises for a wrong answer."""
    if response.status_code not in (200, 206):
        raise refusal(response, file.name, line.advice)
    if "text/html" in response.headers.get("Content-Type", "") and "html" not in file.name:
        raise DownloadError(
            f"{response.url.host} sent a web page in place of {file.name}: a login page of the "
            "network or a block stands before it; open the address in a browser, or use "
            f"{line.advice.elsewhere}"
        )
    if response.status_code == 206:
        expected = f"bytes {position}-{file.size - 1}/{file.size}" if file.size else None
        given = response.headers.get("Content-Range", "nothing")
        if given != expected and (expected or not given.startswith(f"bytes {position}-")):
            raise _wrong_length(line, response, file, given)
        return 0
    length = response.headers.get("Content-Length")
    is_plain = "Content-Encoding" not in response.headers
    if file.size is not None and is_plain and length is not None and length != str(file.size):
        raise _wrong_length(line, response, file, length)
    return position  # a server that ignored the Range sends everything again


def _told_size(response: httpx.Response, position: int) -> int | None:
    """The size of the whole file, as the answer's headers have it."""
    length = response.headers.get("Content-Length", "")
    if not length.isdecimal() or "Content-Encoding" in response.headers:
        return None
    return int(length) + (position if response.status_code == 206 else 0)


def _is_whole(response: httpx.Response, position: int) -> bool:
    """Whether the server refuses the range because the file ends where it begins."""
    return position > 0 and response.headers.get("Content-Range") == f"bytes */{position}"


def _wrong_length(line: Line, response: httpx.Response, file: File, given: str) -> DownloadError:
    size = "another size" if file.size is None else f"{file.size:,}"
    return DownloadError(
        f"{response.url.host} sends {given} bytes for {file.name}, which has {size}: it holds "
        f"another version or a damaged copy; use {line.advice.elsewhere}"
    )


def _host(url: str) -> str:
    return httpx.URL(url).host


# --- files ----------------------------------------------------------------------------------------


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
        stored = read_json(directory / NOTES)
        stored = stored if isinstance(stored, dict) else {}
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


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Make `directory`, and let no other download write there until the block is left.

    Raises UserError when it cannot be used, or another download is at work there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{directory} cannot be used: {one_line(error)}; give another") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"another download is at work in {directory}: wait for it, or stop it first"
        ) from None
    except OSError:
        pass  # a network file system without locks
    try:
        yield
    finally:
        os.close(handle)


def check_space(directory: Path, needed: int) -> None:
    """Raise UserError when the disk of `directory` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"the disk of {directory} has {amount(free)} free and {amount(needed)} are to be "
            f"fetched, {needed - free:,} bytes too many: free some space or give another directory"
        )


def unusable(directory: Path, error: OSError) -> DownloadError:
    """What a disk's refusal means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(
            f"the disk of {directory} is full: free some space; the same command continues"
        )
    return DownloadError(f"{directory} cannot be used: {one_line(error)}")


def amount(size: float) -> str:
    """9985123456 → '9.99 GB'."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


class Meter:
    """How far a fetch is: a bar on a terminal, in a log a line every ten seconds."""

    def __init__(self, total: int, done: int) -> None:
        self.name = ""
        self._total, self._done, self._start = total, done, done
        self._began = self._line_at = time.monotonic()
        self._bar = None
        if total > done and sys.stderr.isatty() and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, unit="B", unit_scale=True, dynamic_ncols=True
            )

    def __str__(self) -> str:
        return f"{amount(self._done)} of {amount(self._total)}"

    def add(self, count: int) -> None:
        """So many bytes more."""
        self._done += count
        if self._bar is not None:
            self._bar.set_description(self.name, refresh=False)
            self._bar.update(count)
        elif self._total and time.monotonic() - self._line_at >= _LINE_EVERY:
            self._line_at = time.monotonic()
            speed = (self._done - self._start) / (self._line_at - self._began)
            left = clock((self._total - self._done) / max(speed, 1.0))
            log.info("%s: %s, %s/s, %s left", self.name, self, amount(speed), left)

    def close(self) -> None:
        """Leave the bar's last state on the terminal."""
        if self._bar is not None:
            self._bar.close()
