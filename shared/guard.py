"""Own the processes of a foreign program: none of them outlives this one.

    python shared/guard.py PARENT SECONDS PROGRAM [ARGUMENT…]

shared/program.py, whose id PARENT is, starts it. The first signal, and the parent's death, send
SIGTERM to the program's process group, once. Later signals, and SECONDS without an end, kill every
process that is left, those in sessions of their own too (torchrun's workers): the orphans among
them become this one's children. Leaves when none is left, with the program's exit code as a shell
has it, and with 137 when something had to be killed after a signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # imported, it leaves the importer's path as it is
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared.errors import FAILED
from shared.processes import adopt_orphans, children, die_with_parent, kill_children, send
from shared.stop import SAME_REQUEST

KILLED = 128 + signal.SIGKILL
PARENT_DIED = signal.SIGUSR1
_LEFT_BEHIND = 10.0  # seconds for what a program that has ended by itself has left running
_UNKILLABLE = 30.0  # seconds after which a process that the kernel does not end is given up


def main(argv: list[str] | None = None) -> int:
    """The program's exit code, after its last process has ended."""
    parent, seconds, *command = sys.argv[1:] if argv is None else argv
    stops = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    stops = [number for number in stops if signal.getsignal(number) is not signal.SIG_IGN]
    heard = {*stops, PARENT_DIED, signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how the program ended
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    die_with_parent(int(parent), PARENT_DIED)
    adopt_orphans()
    family = Family(command, float(seconds))
    while family.reap():
        caught = signal.sigtimedwait(heard, family.patience())
        if caught is None:
            family.kill()
        elif caught.si_signo == PARENT_DIED:
            family.ask()
        elif caught.si_signo != signal.SIGCHLD:
            family.ask_or_kill()
    return family.exit_code


class Family:
    """A program in a session of its own, and all that descends from it."""

    def __init__(self, command: Sequence[str], seconds: float) -> None:
        self._seconds = seconds
        self._code: int | None = None  # the program's own, once it has ended
        self._asked_at = self._kill_at = self._killed_at = 0.0
        us = os.getpid()
        program = subprocess.Popen(
            command, start_new_session=True, preexec_fn=lambda: _settle(us), text=False
        )
        self._pid = program.pid
        program.returncode = 0  # it is collected here

    @property
    def exit_code(self) -> int:
        """The program's, as a shell has it, or KILLED."""
        return KILLED if self._asked_at and self._killed_at else self._code or 0

    def reap(self) -> bool:
        """Collect the processes that have ended; False when none is left, or none can be ended."""
        while True:
            try:
                pid, ending = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                break
            if pid == self._pid:
                code = os.waitstatus_to_exitcode(ending)
                self._code = code if code >= 0 else 128 - code
                self._tell_the_others()
        return not (self._killed_at and time.monotonic() - self._killed_at > _UNKILLABLE)

    def patience(self) -> float:
        """Seconds until everything is killed."""
        if self._killed_at:
            return 0.1  # orphans of those just killed come to us one generation after another
        return max(0.0, self._kill_at - time.monotonic()) if self._kill_at else 3600.0

    def ask(self) -> None:
        """Send SIGTERM to the program's process group; only the first time."""
        if not self._asked_at:
            self._asked_at = time.monotonic()
            self._kill_at = self._asked_at + self._seconds
            # also after Ctrl-C: Python's subprocess.run, which launchers use, kills its child then
            if self._code is not None:  # it is collected, and its number may be another's
                send(children(), signal.SIGTERM)
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGTERM)

    def ask_or_kill(self) -> None:
        """What a signal means: the first asks, a later one kills."""
        if not self._asked_at:
            self.ask()
        elif time.monotonic() - self._asked_at > SAME_REQUEST:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to all that is left, when its time is up or nobody waits for it any longer."""
        if self._kill_at or self._asked_at:
            self._killed_at = self._killed_at or time.monotonic()
            kill_children()

    def _tell_the_others(self) -> None:
        """The program has ended: those it has left behind have no reason to continue."""
        if not self._asked_at:
            self._kill_at = time.monotonic() + _LEFT_BEHIND
            send(children(), signal.SIGTERM)


def _settle(parent: int) -> None:
    """Between fork and exec."""
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        sys.stderr.write(f"error: the program does not start: {error}\n")
        sys.exit(FAILED)
