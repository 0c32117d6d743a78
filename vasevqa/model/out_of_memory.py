"""After swift has run out of memory: the plan of its run, and the three settings that help most.

Standard library only, until there is something to explain.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shared.lock import try_to_lock
from vasevqa.model import swift_flags
from vasevqa.model.plan import COMMANDS, Plan, max_pixels


def explain(words: Sequence[str], environ: Mapping[str, str]) -> None:
    """Write plan and advice for the swift command `words` to stderr; of several processes once."""
    # torchrun ends the others as soon as one has ended; this one ends by itself in two seconds
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        plan = _plan(words, int(environ.get("WORLD_SIZE") or 1))
        with _first(plan.output_dir) as is_first:
            if is_first:
                from vasevqa.model import memory

                said = memory.text(plan, max_pixels(environ))
                sys.stderr.write(f"out of memory; what --estimate says of this run:\n{said}\n")
    except Exception as problem:  # the error before it is the one that counts
        sys.stderr.write(f"no memory plan: {problem}\n")


def _plan(words: Sequence[str], world_size: int) -> Plan:
    script = next(script for script, command in COMMANDS.items() if command == words[0])
    return Plan(script, swift_flags.read(words[1:]), world_size=world_size)


@contextlib.contextmanager
def _first(directory: Path) -> Iterator[bool]:
    """Whether no other process is at the same here; all of a run fail at the same step."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        yield try_to_lock(handle)
    finally:
        os.close(handle)
