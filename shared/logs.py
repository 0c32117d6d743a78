"""Log lines that survive: UTF-8 in any locale, line-buffered, no crash when stdout goes away.

Standard library only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys

_FORMAT = "%(asctime)s | %(message)s"
_FORMAT_OTHERS = "%(asctime)s | rank {rank} | %(message)s"


class _SafeHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Drops a line that cannot be written (closed terminal, full disk): training goes on."""

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
    """Make descriptors 0 to 2 usable and stdout and stderr UTF-8 and line-buffered.

    A closed descriptor would be given to the next file that is opened, and prints would land in it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)


def setup(rank: int = 0) -> None:
    """Send log lines to stdout: all of them from rank 0, warnings and errors from the others."""
    handler = _SafeHandler(sys.stdout)
    layout = _FORMAT if rank == 0 else _FORMAT_OTHERS.format(rank=rank)
    handler.setFormatter(_NamesLevel(layout, "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    if rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "PIL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def say(text: str) -> None:
    """One line on stderr for the user, also when stderr is gone."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
