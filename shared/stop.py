"""Stop signals, from an entry script's first line on: a handler notes, a loop answers.

    from shared import stop
    stop.listen()       # before the other imports: torch, interrupted in its import, breaks
    ...
    stop.hold()         # from here on there is something to save: a loop asks stop.number()

Until `hold` the first signal ends the process at once, with one closing line and exit code 143 (130
after Ctrl-C). After it the first one is noted, and a second one ends the process without saving. In
a worker of our launcher, which says the last words and kills who does not leave, both are silent. A
signal that is ignored at the start (SIGHUP under nohup) stays so. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import NoReturn

from shared.errors import FAILED, INTERRUPTED, STOPPED
from shared.launched import NOTES
from shared.processes import children, end_children

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HELD = "held"  # the note of a host's first rank: there is something to save
SAME_REQUEST = 0.5  # seconds in which a repeated signal is the same one (SLURM sends two)

_state = SimpleNamespace(
    number=0,  # the first signal received
    at=0.0,
    is_held=False,
    is_launched=False,
    kept="",  # what a closing line adds
    before={},  # signal → its handler before ours
    older=frozenset(),  # children from before, such as the log's tee of a script
)


def listen() -> bool:
    """Take over the stop signals, but for those that are ignored; False where that was done."""
    if _state.before:
        return False
    _state.older = frozenset(children())
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            _state.before[number] = signal.signal(number, _receive)
    return True


def launched() -> None:
    """From here on shared.outcome is imported, and says how the process ended."""
    _state.is_launched = True


def hold() -> None:
    """From here on the first signal is only noted."""
    _state.is_held = True


def all_hold() -> None:
    """Every rank holds: our launcher lets them save from now on."""
    if NOTES in os.environ and os.environ.get("LOCAL_RANK") == "0":
        Path(os.environ[NOTES], HELD).touch()


def release() -> None:
    """Give the signals back, and forget what was noted."""
    for number, handler in _state.before.items():
        signal.signal(number, handler)
    _state.before = {}
    _state.is_held, _state.number = False, 0


def number() -> int:
    """The signal that asked this process to stop; 0 for none: ranks exchange it as an integer."""
    return _state.number


@contextlib.contextmanager
def keeping(words: str) -> Iterator[None]:
    """Within, the closing line of a process that a signal ends at once says this too."""
    _state.kept = words
    try:
        yield
    finally:
        _state.kept = ""


class Stopped(BaseException):
    """The way out of what was asked to stop."""


def check() -> None:
    """Raise Stopped when this process has noted a signal."""
    if _state.number:
        raise Stopped


def name_of(number: int) -> str:
    """SIGTERM for 15, and so on."""
    return signal.Signals(number).name


def exit_code_for(number: int) -> int:
    """130 after Ctrl-C, 143 after every other stop signal."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


def end_now(code: int, reason: str) -> NoReturn:
    """End this process from within a handler: the closing line, no child left, no destructor."""
    try:
        if _state.is_launched:
            from shared import outcome

            outcome.end_now(code, reason, _state.kept)
        else:
            word = "interrupted" if code == INTERRUPTED else "stopped"
            sys.stdout.write(f"{time.strftime('%F %T')} | {word}: {reason} (exit {code})\n")
            sys.stdout.flush()
        end_children(spare=_state.older)
    finally:
        os._exit(code)


def _receive(number: int, _frame: FrameType | None) -> None:
    is_first, now = _state.number == 0, time.monotonic()
    if is_first:
        _state.number, _state.at = number, now
    if NOTES in os.environ and "RANK" in os.environ:
        if not _state.is_held:
            os._exit(exit_code_for(number))
        if any(Path(os.environ[NOTES]).glob(f"failure.{_restart()}.*.json")):
            os._exit(FAILED)  # the others are being torn down: nothing can be saved any more
    elif is_first and not _state.is_held:
        end_now(exit_code_for(number), name_of(number))
    elif not is_first and now - _state.at > SAME_REQUEST:
        end_now(FAILED, f"second {name_of(number)}: ended without saving")


def _restart() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
