"""The first SIGTERM, SIGINT or SIGHUP asks the loop to save and leave; the second ends at once.

Before a loop looks for requests (`has_loop`) there is nothing to save: the first ends at once.
Standard library only. A signal that is ignored when the run starts (SIGHUP under nohup) stays so.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from shared.errors import INTERRUPTED, STOPPED
from shared.files import read_object
from shared.outcome import NOTES, StopNow

_SAME_REQUEST = 0.5  # seconds in which a repeated signal is the same one (SLURM sends two)


class StopRequest:
    """Whether this process was asked to stop; `install` in the main thread, `remove` at the end."""

    def __init__(self) -> None:
        self.number = 0  # the signal received, 0 for none: ranks exchange it as an integer
        self.has_loop = True
        self._at = 0.0
        self._previous: dict[int, object] = {}

    def install(self) -> None:
        """Take over the stop signals, but for those that are ignored."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)

    def remove(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if _a_peer_failed():
            os._exit(
                1
            )  # the others are being torn down: there is nothing to save and none to wait for
        if self.number == 0:
            self.number, self._at = number, time.monotonic()
            if not self.has_loop:
                raise StopNow(f"{name_of(number)} before the first step", exit_code_for(number))
        elif time.monotonic() - self._at > _SAME_REQUEST:
            raise StopNow(f"second {name_of(number)}: ended without saving")


def name_of(number: int) -> str:
    """SIGTERM for 15, and so on."""
    return signal.Signals(number).name


def exit_code_for(number: int) -> int:
    """130 after Ctrl-C, 143 after every other stop signal."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


def _a_peer_failed() -> bool:
    """Whether a process of this run left word of a failure; one that was stopped did not fail."""
    notes = os.environ.get(NOTES)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    told = Path(notes).glob(f"failure.{restart}.*.json") if notes else ()
    return any(read_object(path).get("kind") != "stopped" for path in told)
