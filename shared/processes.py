"""Which process a number in a file means: ids are given out again, and a file may hold any number.

A run notes its process with `describe`; nobody signals a process before `is_same` has found that it
is that one. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

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


_PROC = Path("/proc")
_HIGHEST = 2**22  # the largest id that Linux gives out


def describe(pid: int) -> dict[str, Any]:
    """Id, host, birth and command of a process of this host, as status.json keeps them."""
    found: dict[str, Any] = {"pid": pid, "host": socket.gethostname()}
    return found | {"pid_born": _born(pid), "pid_command": command(pid)}


def is_same(noted: Mapping[str, Any]) -> bool:
    """Whether the process that `describe` noted runs on this host, by its birth and its command.

    False for anything else that a file may hold, and where the system has no /proc to ask.
    """
    pid = noted.get("pid")
    if type(pid) is not int or not is_alive(pid):
        return False
    return noted.get("pid_born") is not None and describe(pid).items() <= noted.items()


def is_alive(pid: int) -> bool:
    """Whether a process with this id runs on this host (a zombie does not)."""
    if not 1 <= pid <= _HIGHEST:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _stat(pid)[:1] != ["Z"]


def are_working(pid: int, seconds: float = 1.0) -> bool:
    """Whether the process or a descendant uses the processor, or waits for a disk, for `seconds`.

    What waiting threads use, below two hundredths of the time, does not count.
    """
    members = [pid, *descendants(pid)]
    before = sum(map(_processor_time, members))
    time.sleep(seconds)
    if any(_stat(member)[:1] == ["D"] for member in members):
        return True
    return sum(map(_processor_time, members)) - before >= 0.02 * seconds


def _processor_time(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    with contextlib.suppress(LookupError, ValueError):
        user, system = _stat(pid)[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def has_open(pid: int, path: Path) -> bool:
    """Whether the process or one of its descendants has the file `path` open."""
    return any(_has_open(member, path) for member in [pid, *descendants(pid)])


def children() -> list[int]:
    """This process's children."""
    return [pid for pid, parent in _parents().items() if parent == os.getpid()]


def kill_children() -> None:
    """SIGKILL to every child of this process, adopted ones too."""
    send(children(), signal.SIGKILL)


def end_children(patience: float = 30.0, spare: Collection[int] = ()) -> None:
    """Kill every descendant of this process, which adopts orphans, and wait for their ends.

    spare: children that stay, such as the tee that a shell script has left us.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and (left := set(children()) - set(spare)):
        send(sorted(left), signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """The signal to each of these processes that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """The children of a process, their children, and so on."""
    parents = _parents()
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found[1:]


def born_at(pid: int) -> float | None:
    """When the process was started, in seconds since 1970; None where that cannot be asked."""
    with contextlib.suppress(OSError, LookupError, ValueError):
        booted = re.search(r"^btime (\d+)", (_PROC / "stat").read_text(), re.M)
        ticks = int(_stat(pid)[19])
        return int(booted[1]) + ticks / os.sysconf("SC_CLK_TCK") if booted else None
    return None


def command(pid: int) -> list[str]:
    """The command line of a process; [] where it cannot be read."""
    with contextlib.suppress(OSError):
        line = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="backslashreplace")
        return line.removesuffix("\0").split("\0")
    return []


def runs_below(pid: int, directory: Path) -> bool:
    """Whether a word of the process's command line is a file below `directory`."""
    with contextlib.suppress(OSError, ValueError):
        begun_in = (_PROC / str(pid) / "cwd").readlink()
        paths = [(begun_in / word).resolve() for word in command(pid)]
        return any(path.is_relative_to(directory.resolve()) and path.is_file() for path in paths)
    return False


def _parents() -> dict[int, int]:
    """The parent of each process that can be seen."""
    pids = [int(entry.name) for entry in _PROC.glob("[0-9]*")]
    stats = {pid: _stat(pid) for pid in pids}
    return {pid: int(stat[1]) for pid, stat in stats.items() if len(stat) > 1}


def _born(pid: int) -> str | None:
    """The boot and the clock tick at which the process was started."""
    stat = _stat(pid)
    with contextlib.suppress(OSError, LookupError):
        return f"{(_PROC / 'sys/kernel/random/boot_id').read_text().strip()} {stat[19]}"
    return None


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on (index 0; the parent is 1, the start time 19)."""
    with contextlib.suppress(OSError):
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return []


def _has_open(pid: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        wanted = path.stat()
        for entry in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(entry.stat(), wanted):
                    return True
    return False
