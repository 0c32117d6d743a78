"""run.lock: one live run a directory. Standard library only.

The kernel lets go of the lock when the last process that shares its descriptor ends. On a file
system without locks (NFS without lockd, some Lustre and FUSE mounts) status.json has to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared import processes
from shared.errors import UserError
from shared.files import open_lock, read_object, remove_stale_temporaries
from shared.status import SILENCE, heartbeat_age

log = logging.getLogger(__name__)

NAME = "run.lock"
_DYING = 2.0  # seconds that workers, which share the lock, may take to follow their process
_warned = False


def take(run_dir: Path, flag: str = "--run-dir") -> int:
    """Make `run_dir` this process's own, for as long as it lives; the lock's descriptor.

    Removes what a killed process left half written. flag: which names the directory. Raises
    UserError when a live run holds the directory, or when it cannot be written.
    """
    handle = open_lock(run_dir, flag)
    status = read_object(run_dir / "status.json")
    if not _is_free(handle, status):
        os.close(handle)
        raise UserError(_in_use(run_dir, status, flag))
    remove_stale_temporaries(run_dir)
    return handle


def is_held(run_dir: Path) -> bool:
    """Whether a live run holds the directory; nothing is written. False where locks do not work."""
    with _opened(run_dir) as handle:
        return handle is not None and _lock(handle, fcntl.LOCK_SH) is False


def is_held_by(run_dir: Path, pid: int) -> bool:
    """Whether the process or a descendant of it holds the directory; True where locks do not work.

    Nothing is written.
    """
    with _opened(run_dir) as handle:
        is_free = handle is None or _lock(handle, fcntl.LOCK_SH)
    return is_free is None or (not is_free and processes.has_open(pid, run_dir / NAME))


def try_to_lock(handle: int) -> bool:
    """Whether the lock could be had at once; True, after one warning, where locks do not work."""
    is_free = _lock(handle, fcntl.LOCK_EX)
    if is_free is None:
        _warn()
    return is_free is not False


def _lock(handle: int, kind: int) -> bool | None:
    """Whether the lock could be had at once; None where the file system has no locks."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_free(handle: int, status: dict[str, Any]) -> bool:
    """Whether the directory could be had; waits a moment for workers of a run that was killed."""
    deadline = time.monotonic() + _DYING
    while (is_free := _lock(handle, fcntl.LOCK_EX)) is False:
        if time.monotonic() > deadline or processes.is_same(status):
            return False
        time.sleep(0.05)
    if is_free is None:
        _warn()
        return not _says_it_runs(status)
    return True


def _says_it_runs(status: dict[str, Any]) -> bool:
    """Whether status.json alone tells of a live run, on this host or another."""
    if status.get("state") != "running":
        return False
    if status.get("host") == socket.gethostname():
        return processes.is_same(status)
    age = heartbeat_age(status)
    return age is not None and age < SILENCE


def _in_use(run_dir: Path, status: dict[str, Any], flag: str) -> str:
    """The message for a directory that another run holds."""
    if not processes.is_same(status):
        where = status.get("host")
        by = f"a live run on {where}" if where not in (None, socket.gethostname()) else "a live run"
        return f"{run_dir} is in use by {by}; wait for it, or type another {flag}"
    pid = status["pid"]
    return (
        f"{run_dir} is in use by a live run (pid {pid}); wait for it, stop it with "
        f"kill -TERM {pid}, or type another {flag}"
    )


def _warn() -> None:
    global _warned
    if not _warned:
        log.warning(
            "this file system has no locks: two runs in one directory are told apart by "
            "status.json alone"
        )
    _warned = True


@contextlib.contextmanager
def _opened(run_dir: Path) -> Iterator[int | None]:
    """The descriptor of run.lock for reading; None when it is not there."""
    try:
        handle = os.open(run_dir / NAME, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)
