"""Runs that several tests compare with or continue: made once, for all of pytest's workers."""

import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.files import read_json, write_json
from tests.faults import probe_recipe
from tests.harness import (
    PROBE,
    losses,
    run_here,
    shell_script,
    start,
    status_of,
    wait_for_step,
)

Build = Callable[[Path], Any]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Build], tuple[Path, Any]]:
    """`once(name, build)`: the directory that `build` filled, and what it returned, as JSON."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the workers' common directory

    def made(name: str, build: Build) -> tuple[Path, Any]:
        directory, note = base / name, base / f"{name}.json"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not note.exists():
                shutil.rmtree(directory, ignore_errors=True)
                write_json(note, build(directory))
        return directory, read_json(note)

    return made


@pytest.fixture(scope="session")
def undisturbed(once: Any) -> Callable[[int], dict[int, float]]:
    """`undisturbed(ranks)`: the losses of a run that nothing happened to, no loader workers."""

    def build(run_dir: Path, ranks: int) -> dict[int, float]:
        if ranks == 1:
            assert run_here(probe_recipe.main, ["--run-dir", run_dir]).code == 0
        else:
            with start([PROBE, "--nproc", ranks, "--run-dir", run_dir]) as running:
                assert running.finish().code == 0
        return losses(run_dir)

    def found(ranks: int) -> dict[int, float]:
        _, told = once(f"undisturbed-{ranks}", lambda run_dir: build(run_dir, ranks))
        return {int(step): loss for step, loss in told.items()}

    return found


@pytest.fixture(scope="session")
def stopped(once: Any) -> Callable[[int], tuple[Path, dict[str, Any]]]:
    """`stopped(ranks)`: the directory of a run that got SIGTERM in its second epoch, and
    {code, text, pids, left}: its exit code, its output, the process that was signalled and the one
    that status.json names, whether a process was left.

    Each rank has two loader workers. One process gets the signal with its whole group, as from a
    terminal. Two are started by a shell script, which gets it twice in a moment, as from SLURM.
    """

    def build(run_dir: Path, ranks: int) -> dict[str, Any]:
        args = ["--nproc", ranks, "--workers", 2, "--run-dir", run_dir, "--step-ms", 100]
        entry, program = PROBE, [sys.executable]
        if ranks == 2:
            entry, program = shell_script(run_dir.parent, PROBE), ["bash"]
        with start([entry, *args], program=program, PROBE_HURRIES="") as running:
            wait_for_step(run_dir, 20 // ranks, running)
            running.signal(signal.SIGTERM, group=ranks == 1)
            if ranks == 2:
                time.sleep(0.02)  # within one step
                running.signal(signal.SIGTERM)
            outcome = running.finish()
            left = not running.leaves_nothing()
        pids = [running.pid, status_of(run_dir)["pid"]]
        return {"code": outcome.code, "text": outcome.text, "pids": pids, "left": left}

    return lambda ranks: once(f"stopped-{ranks}", lambda run_dir: build(run_dir, ranks))
