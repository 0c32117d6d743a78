"""run.lock: one live run a directory. Standard library only.

The kernel lets go of the lock when the last process that shares its descriptor ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from shared.errors import UserError
from shared.files import is_alive, open_lock, read_json, remove_stale_temporaries

_DYING = 2.0  # seconds that workers, which share the lock, may take to follow their process


def take(run_dir: Path) -> int:
    """Make `run_dir` this process's own, for as long as it lives; the lock's descriptor.

    Removes what a killed process left half written. Raises UserError when a live run holds the
    directory, or when it cannot be written.
    """
    handle = open_lock(run_dir)
    holder = (read_json(run_dir / "status.json") or {}).get("pid")
    if not _locked(handle, holder):
        os.close(handle)
        raise UserError(
            f"{run_dir} is in use by a live run (pid {holder}); wait for it, stop it with "
            f"kill -TERM {holder}, or give this run another --run-dir"
        )
    remove_stale_temporaries(run_dir)
    return handle


def is_held(run_dir: Path) -> bool:
    """Whether a live run holds the directory; nothing is written."""
    try:
        handle = os.open(run_dir / "run.lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        return not try_to_lock(handle, shared=True)
    finally:
        os.close(handle)


def try_to_lock(handle: int, *, shared: bool = False) -> bool:
    """Whether the lock could be had at once. Shared ones bar the exclusive one, not each other."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _locked(handle: int, holder: int | None) -> bool:
    """Whether the lock could be had; waits a moment for the workers of a holder that was killed."""
    deadline = time.monotonic() + _DYING
    while not try_to_lock(handle):
        if time.monotonic() > deadline or (holder and is_alive(holder)):
            return False
        time.sleep(0.05)
    return True
