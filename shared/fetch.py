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
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx

from shared.errors import INTERRUPTED, UserError, one_line
from shared.fetched import File, Notes, checksum_of, part_of, size_of
from shared.progress import Meter, amount
from shared.transport import Advice, DownloadError, Line, TransientError, refusal

log = logging.getLogger(__name__)

WEB_ADVICE = Advice(
    unreachable="or fetch the file by hand and put it there",
    elsewhere="another source, or by hand",
    not_found="the address may have changed; fetch the file by hand and put it there",
    not_allowed="it is not public, or no longer; fetch the file by hand and put it there",
)


class DownloadInterrupted(UserError):  # noqa: N818, it is no error
    """Ctrl-C: what was fetched stays; exit code 130."""

    exit_code = INTERRUPTED


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
