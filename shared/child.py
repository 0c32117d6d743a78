"""One child process in a group of its own, which a signal to this program reaches exactly once.

    with Child() as child:
        code = child.run(["./train.sh", "--demo"])

Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.processes import die_with_parent

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BETWEEN_TICKS = 1.0  # seconds
_LAST_WORDS = 5.0  # seconds that output may take to arrive after the child has ended


class Child:
    """The running child, one at a time; `stopped_by` is the last signal received, 0 for none.

    Ctrl-C at a terminal would otherwise come twice, from the terminal and from here, and the
    second one ends a run without saving. When this program dies the child gets SIGTERM.
    """

    def __init__(self) -> None:
        self.stopped_by = 0
        self._process: subprocess.Popen[Any] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Child:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's stays as it is
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        tick: Callable[[], None] | None = None,
        output: int = 1,
    ) -> int:
        """Run `command`, its output passed through to the end; its exit code, as a shell has it.

        tick: called every second. output: the descriptor that its output goes to. Raises OSError
        when it does not start.
        """
        ours, its = os.pipe()
        # the pipe ends after the script's own tee, so what is written next cannot overtake it
        reader = threading.Thread(target=_pass_through, args=(ours, os.dup(output)), daemon=True)
        try:
            self._start(command, env, stdout=its, stderr=its)
        finally:
            os.close(its)
            reader.start()
        code = self._wait(tick)
        reader.join(timeout=_LAST_WORDS)
        return code

    def run_attached(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        tick: Callable[[], None] | None = None,
        keep: Sequence[int] = (),
    ) -> int:
        """Like `run`, on our own stdout and stderr: what it writes outlives this program.

        tick: called every second. keep: descriptors that the child shares.
        """
        self._start(command, env, pass_fds=keep)
        return self._wait(tick)

    def _start(
        self, command: Sequence[str | Path], env: Mapping[str, str] | None, **options: Any
    ) -> None:
        """Start it with our signals held back: one that comes meanwhile finds the process."""
        us = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            stopped_before = self.stopped_by
            process = subprocess.Popen(
                [os.fspath(word) for word in command],
                env=None if env is None else dict(env),
                process_group=0,
                preexec_fn=lambda: _settle(us),
                **options,
            )
            self._process = process
            if stopped_before:
                process.send_signal(stopped_before)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _wait(self, tick: Callable[[], None] | None = None) -> int:
        process = self._process
        assert process is not None
        while tick:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_BETWEEN_TICKS)
                break
            tick()
        code = process.wait()
        self._process = None
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, _: object) -> None:
        self.stopped_by = number
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def _settle(parent: int) -> None:
    """Between fork and exec."""
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _pass_through(descriptor: int, output: int) -> None:
    while chunk := os.read(descriptor, 65536):
        with contextlib.suppress(OSError):  # our own stdout may be gone; the run continues
            os.write(output, chunk)
    os.close(descriptor)
    os.close(output)
