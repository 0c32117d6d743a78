"""What every test gets: a time limit, a clean environment.

Tests run in two workers. The files that use the mark `serial` share one of them, one test after
another; the other worker goes on beside them, so a serial test must not need an idle machine.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

LIMIT = 120  # seconds a test may take
GRACE = 30  # seconds more until a test stuck in C, which hears no signal, ends its process
# a user's or a scheduler's settings must not decide what a test sees
FOREIGN = (
    *("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "NPROC_PER_NODE"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"),
    *("HF_ENDPOINT", "HF_TOKEN"),
    *("HF_HOME", "HF_HUB_CACHE", "TRANSFORMERS_CACHE", "MODELSCOPE_CACHE"),
    *("MODELSCOPE_DOMAIN", "MODELSCOPE_ENDPOINT", "USE_MODELSCOPE_HUB"),
)

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # tests started by a script with & ignore Ctrl-C, under nohup a hang-up, and so would every run
    # that they start; a handler of ours ends where a new program begins
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: lambda *_: None}
    for number, handler in handlers.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    config.stash[_stderr] = os.dup(2)  # the real one: during a test, 2 is pytest's capture


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # `-m gpu` reads tests/gpu alone: a machine with a GPU may lack what other files import
    elsewhere = collection_path.is_file() and collection_path.parent.name != "gpu"
    return True if config.option.markexpr == "gpu" and elsewhere else None


@cache
def has_serial_tests(path: Path) -> bool:
    return "mark.serial" in path.read_text(encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    # xdist's own groups (--dist loadgroup) have no effect under pytest 9.2, silently
    from xdist.scheduler import LoadScopeScheduling

    class SerialFilesTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = config.rootpath / nodeid.partition("::")[0]
            return "serial" if has_serial_tests(path) else nodeid

    return SerialFilesTogether(config, log)


@pytest.fixture(autouse=True)
def _time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that outlasts its limit; end the process when even that does not help."""
    mark = request.node.get_closest_marker("limit")
    seconds = mark.args[0] if mark else LIMIT
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_: object) -> None:
        pytest.fail(f"ran for more than {seconds} s (mark limit(seconds) to allow more)")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(
        seconds + GRACE, exit=True, file=request.config.stash[_stderr]
    )
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
