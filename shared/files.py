"""Files that are never half written: atomic bytes, text and JSON; JSON lines; stale temporaries.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from shared.errors import UserError, one_line
from shared.processes import is_alive

_TEMPORARY = re.compile(r"\.tmp\.(\d+)$")


def write_atomic(
    path: Path,
    write: Callable[[IO[bytes]], None],
    *,
    durable: bool = True,
    before_replacing: Callable[[], None] = lambda: None,
) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    A reader sees the old file or the new one, never a part; a failure leaves the old one and
    removes the temporary. `durable` waits for the disk (fsync of file and directory).
    `before_replacing` is called when the new bytes are whole and the old file is still in place.
    Raises OSError (28 when the disk is full).
    """
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        before_replacing()
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_directory(path.parent)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` as UTF-8, atomically; what UTF-8 cannot hold (halves of signs) escaped."""
    content = text.encode(errors="backslashreplace")
    write_atomic(path, lambda stream: _discard(stream.write(content)), durable=durable)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write `value` as indented UTF-8 JSON, atomically. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text, durable=durable)


def check_regular(path: str | Path) -> None:
    """Raise OSError for what is no regular file: a pipe or a device may be read without end."""
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def open_regular(path: Path) -> io.BufferedReader:
    """The file, to read its bytes. Raises OSError as `check_regular`, and for one not to be had."""
    check_regular(path)
    return path.open("rb")


def read_bytes(path: Path) -> bytes:
    """The content of the file. Raises OSError as `open_regular`."""
    with open_regular(path) as stream:
        return stream.read()


def read_text(path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text in the file. Raises OSError as `open_regular`, and UnicodeDecodeError."""
    with io.TextIOWrapper(open_regular(path), encoding, errors) as stream:
        return stream.read()


def read_json(path: Path) -> Any:
    """The JSON value in `path`, or None when the file is missing or not JSON."""
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):  # the last: nested without end
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} when the file is missing or holds none."""
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; any other line, as a killed writer's, is passed over.

    Nothing for a file that is missing. Raises UserError for one that cannot be read.
    """
    try:
        stream = open_regular(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; move it away") from None
    with io.TextIOWrapper(stream, "utf-8", "replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def cut_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file, atomically, with the objects for which `keep` is true."""
    if path.exists():
        kept = [json.dumps(row, ensure_ascii=False) for row in read_json_lines(path) if keep(row)]
        write_text(path, "".join(line + "\n" for line in kept))


def open_lock(run_dir: Path, flag: str = "--run-dir") -> int:
    """The descriptor of run.lock in `run_dir`; both are made. Raises UserError if they cannot be.

    Entry scripts call it (and close it) before they load anything slow.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return os.open(run_dir / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"the run directory {run_dir} cannot be written: {one_line(error)}; choose another "
            f"{flag}"
        ) from None


def make_output(directory: Path, flag: str = "--out") -> None:
    """Make the directory that `flag` names, before the work whose results it will hold.

    Raises UserError when it cannot be made, or nothing written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {directory} cannot be made: {error.strerror}") from None
    if not os.access(directory, os.W_OK):
        raise UserError(f"{flag} {directory} cannot be written: choose another directory")


def remove_stale_temporaries(directory: Path) -> list[Path]:
    """Delete what `write_atomic` left in `directory` when its process was killed.

    Files of processes that still live stay. Returns what was deleted.
    """
    stale = []
    for path in directory.iterdir() if directory.is_dir() else ():
        found = _TEMPORARY.search(path.name)
        if found and not is_alive(int(found.group(1))):
            path.unlink(missing_ok=True)
            stale.append(path)
    return stale


def is_temporary(name: str) -> bool:
    """Whether `write_atomic` gives such a name to a file that it has not put in place yet."""
    return _TEMPORARY.search(name) is not None


def is_file(path: Path) -> bool:
    """Whether there is such a file; False also for what no file can be called."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def move_aside(path: Path, names: Iterable[str]) -> Path:
    """Move the entries `names` of the directory `path` to the first free `path.1`, `path.2`, …

    What else is in `path` stays. Returns the new directory.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    aside.mkdir()
    for name in sorted(names):
        (path / name).rename(aside / name)
    return aside


def _discard(_: object) -> None:
    """Turn the byte count of a write into nothing."""


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems refuse to sync directories
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
