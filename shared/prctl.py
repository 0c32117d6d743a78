"""What Linux does for related processes: a signal when the parent dies, and orphans adopted.

Elsewhere both do nothing. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal

from shared.errors import USER_ERROR

_SET_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h


def die_with_parent(parent: int | None = None, number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process `number` when its parent dies, however it dies.

    parent: the parent's id, when known: this process leaves at once where it is gone already.
    The signal follows the thread that forked: start children on the main thread.
    """
    if _prctl(_SET_DEATH_SIGNAL, int(number)) and parent is not None and os.getppid() != parent:
        os._exit(USER_ERROR)  # it died before the line above


def adopt_orphans() -> bool:
    """Become the parent of every descendant whose own parent ends; whether that is possible."""
    return _prctl(_SET_CHILD_SUBREAPER, 1)


def _prctl(what: int, value: int) -> bool:
    try:
        return ctypes.CDLL(None).prctl(what, value, 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False  # not Linux
