"""Log lines that survive: UTF-8 in any locale, line-buffered, no crash when stdout goes away.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_FORMAT = "%(asctime)s | %(message)s"
_DATE = "%Y-%m-%d %H:%M:%S"
_FORMAT_OTHERS = "%(asctime)s | rank {rank} | %(message)s"


class _SafeHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Drops a line that cannot be written (closed terminal, full disk): training continues."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, above the progress bar when there is one on the terminal."""
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None:
            super().emit(record)
            return
        with contextlib.suppress(OSError, ValueError), tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the base class's name
        """Pass over what the stream refused."""


@contextlib.contextmanager
def copied_to(path: Path) -> Iterator[None]:
    """Append the log's lines to a file as well; lines that cannot be written there are dropped."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        logging.getLogger(__name__).warning("no log file %s: %s", path, error.strerror)
        yield
        return
    handler = _SafeHandler(stream)
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with contextlib.suppress(OSError):  # what a full disk has not taken
            stream.close()


class _Output(io.FileIO):
    """A standard stream that lets its reader go (`| head`, a closed terminal): the rest is dropped.

    Unbuffered, so that no bytes that a full disk refused are left to change the exit code.
    """

    reader_left = False

    def write(self, content: Any) -> int:
        """Hand all bytes on, or count them as written when nobody can read them any more."""
        left = memoryview(content).cast("B")
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.reader_left = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        return len(content)


class _NamesLevel(logging.Formatter):
    """Puts WARNING or ERROR before the message, and nothing before the usual line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for `record`."""
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        head, _, rest = text.partition(" | ")
        return f"{head} | {record.levelname}: {rest}"


def open_streams() -> None:
    """Make descriptors 0 to 2 usable; stdout and stderr UTF-8, unbuffered, none the less lasting.

    A closed descriptor would be given to the next file that is opened, and prints would land in it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: this one
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
            continue
        with contextlib.suppress(OSError, ValueError):  # not the process's own, as in a notebook
            if stream.fileno() == number:
                stream.flush()
                setattr(sys, name, _lasting(number))


def _lasting(descriptor: int) -> io.TextIOWrapper:
    output: Any = _Output(descriptor, "w", closefd=False)
    return io.TextIOWrapper(output, "utf-8", "backslashreplace", write_through=True)


def has_reader() -> bool:
    """Whether somebody may still read stdout: False when a write has found its reader gone."""
    return not getattr(getattr(sys.stdout, "buffer", None), "reader_left", False)


def setup(rank: int = 0) -> None:
    """Send log lines to stdout: all of them from rank 0, warnings and errors from the others."""
    handler = _SafeHandler(sys.stdout)
    layout = _FORMAT if rank == 0 else _FORMAT_OTHERS.format(rank=rank)
    handler.setFormatter(_NamesLevel(layout, _DATE))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    if rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
    threading.excepthook = _say_of_thread
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "PIL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _say_of_thread(ended: threading.ExceptHookArgs) -> None:
    """One line for a thread that could not write (TensorBoard's); a traceback for other errors."""
    if isinstance(ended.exc_value, OSError):
        log.warning("a thread that writes files has ended: %s", ended.exc_value)
    else:
        threading.__excepthook__(ended)


def say(text: str) -> None:
    """One line on stderr for the user, also when stderr is gone."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
