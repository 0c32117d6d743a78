"""Something that is made once and then kept, as a demo is: whole, or made anew.

    build_once(root / "demo.json", {"version": 1, "seed": seed}, [root / "data"], make)

The marker says of what version and seed the parts are and which files they have; it is written
last. One process makes at a time, others wait for it and take over what it has made. Standard
library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import UserError, one_line
from shared.files import read_object, write_json

log = logging.getLogger(__name__)

_FILES = "files"  # of the marker: names of all that was made, from the marker's directory


def build_once(
    marker: Path, made: Mapping[str, Any], parts: Sequence[Path], make: Callable[[], object]
) -> None:
    """Call `make` unless `marker` says that it made just this and every file is still there.

    marker: a .json file, outside the parts; the lock lies beside it.
    made: version and seed: what decides the content. parts: the files and directories that `make`
    writes; it finds them away or empty. Files that came there later do no harm.
    Raises UserError where nothing can be written, and what `make` raises.
    """
    if _is_whole(marker, made):  # before the lock: a finished one may lie where nobody may write
        return
    with _alone(marker):
        if _is_whole(marker, made):
            return
        marker.unlink(missing_ok=True)
        for part in parts:
            _empty(part)
        make()
        write_json(marker, {**made, _FILES: sorted(_names(parts, marker.parent))})


def _is_whole(marker: Path, made: Mapping[str, Any]) -> bool:
    written = read_object(marker)
    names = written.pop(_FILES, None)
    if written != made or not isinstance(names, list):
        return False
    return all((marker.parent / name).is_file() for name in names)


@contextlib.contextmanager
def _alone(marker: Path) -> Iterator[None]:
    """Wait until no other process makes the same; the kernel frees the lock of one that dies."""
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(marker.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{marker.parent} cannot be written: {one_line(error)}; make it writable, or work in a "
            "copy that is"
        ) from None
    try:
        with contextlib.suppress(OSError):  # a network file system without locks
            _wait_for(handle, marker.parent)
        yield
    finally:
        os.close(handle)


def _wait_for(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("another process is at work on %s: waiting for it", directory)
        fcntl.flock(handle, fcntl.LOCK_EX)


def _empty(part: Path) -> None:
    """Take away what an unfinished make, or one of another version, has left."""
    if not part.is_dir():
        part.unlink(missing_ok=True)
        return
    for entry in part.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _names(parts: Sequence[Path], directory: Path) -> Iterator[str]:
    for part in parts:
        for path in (part, *part.rglob("*")):
            if path.is_file():
                yield os.path.relpath(path, directory)
