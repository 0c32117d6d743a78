"""The monitor beside real runs: watched, finished, failed, stopped by it, killed; under nohup."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared import processes
from shared.config import ProcessOptions
from shared.tools import monitor
from tests.harness import (
    PROBE,
    ROOT,
    Outcome,
    Running,
    environment,
    losses,
    run_to_end,
    shell_script,
    start,
    status_of,
    wait_for_step,
    wait_until,
)

pytestmark = [pytest.mark.serial, pytest.mark.slow]
REDRAWN = "\x1b[H\x1b[2J"
MONITOR = ROOT / "shared" / "tools" / "monitor.py"


def watch(*words: object) -> Outcome:
    return run_to_end([MONITOR, *words])


def seen(run_dir: Path) -> dict[str, Any]:
    return json.loads(watch(run_dir, "--json").text)


def test_a_run_under_nohup_is_watched_to_its_end(tmp_path):
    run_dir, script = tmp_path / "run", shell_script(tmp_path, PROBE)
    args = ["bash", script, "--step-ms", 80, "--run-dir", run_dir]
    with start(args, program=["nohup"]) as running:
        wait_for_step(run_dir, 3, running)
        with start([MONITOR, run_dir, "--follow", "--every", 0.2]) as watching:
            running.signal(signal.SIGHUP, group=True)  # the terminal is closed
            wait_until(lambda: status_of(run_dir).get("step"), "a step", running=running)
            running.signal(signal.SIGSTOP)  # so that it is met on its way
            watching.wait_for_text("probe: RUNNING  step")
            view = seen(run_dir)
            assert (view["state"], view["recipe"], view["pid"]) == ("running", "probe", running.pid)
            assert view["total_steps"] == 48
            assert view["memory_bytes"] > 50 << 20  # torch alone is more
            assert view["grad_norm"] > 0
            assert view["loss"] == pytest.approx(
                losses(run_dir)[view["recent_losses"][-1][0]], rel=1
            )
            assert Path(view["log"]).read_text().startswith("20")
            assert watch(run_dir).text.startswith("probe: RUNNING\n")
            running.signal(signal.SIGCONT)
            assert running.finish().code == 0
            followed = watching.finish(timeout=20)
    assert followed.code == 0
    assert "probe: RUNNING  step" in followed.text
    assert followed.last_line.partition(" | ")[2].startswith("probe: DONE  step 48/48 (100.0 %)")
    view = seen(run_dir)
    assert (view["state"], view["exit_code"], view["eta_s"], view["epoch"]) == ("done", 0, None, 3)
    assert view["loss"] == losses(run_dir)[48]


def test_stop_lets_the_run_save_and_tells_how_it_ended(tmp_path):
    run_dir = tmp_path / "run"
    args = ["--epochs", 100, "--step-ms", 100, "--nproc", 2, "--run-dir", run_dir]
    with start([PROBE, *args]) as running:
        wait_for_step(run_dir, 3, running)
        noted = status_of(run_dir)
        assert processes.is_same(noted) and noted["pid"] == running.pid
        stopped = watch(run_dir, "--stop")
        assert running.finish().code == 143
    assert not processes.is_same(noted)
    assert stopped.code == 0
    assert stopped.text.splitlines()[0] == f"SIGTERM to process {running.pid}: it saves and leaves"
    assert stopped.last_line.startswith("probe: STOPPED: SIGTERM: saved at step")
    assert (run_dir / "last.pt").exists()
    again = watch(run_dir, "--stop")
    assert (again.code, again.text.count("\n")) == (2, 1)
    assert "nothing to stop: probe: STOPPED" in again.text
    assert watch(run_dir).code == 0


def test_a_run_that_breaks_is_failed_with_its_last_errors(tmp_path):
    run_dir, script = tmp_path / "run", shell_script(tmp_path, PROBE)
    words = [script, "--fault", "raise@5", "--run-dir", run_dir]
    assert run_to_end(words, program=["bash"]).code == 1
    found = watch(run_dir)
    assert found.code == 1
    assert found.text.startswith("probe: FAILED (exit 1)\n")
    assert "ERROR: failed: ValueError: broken on purpose" in found.text


def test_ctrl_c_leaves_the_run_and_a_killed_run_is_stale(tmp_path):
    run_dir = tmp_path / "run"
    with start([PROBE, "--epochs", 100, "--step-ms", 100, "--run-dir", run_dir]) as running:
        wait_for_step(run_dir, 2, running)
        with start([MONITOR, run_dir, "--follow", "--every", 0.2]) as watching:
            watching.wait_for_text("RUNNING")
            watching.signal(signal.SIGINT)
            left = watching.finish(timeout=10)
        assert (left.code, left.last_line) == (0, "the run is left as it was")
        wait_for_step(run_dir, max(losses(run_dir)) + 2, running)
        running.signal(signal.SIGKILL)
        running.finish()
    found = watch(run_dir)
    assert (found.code, found.text.splitlines()[0]) == (1, "probe: STALE")
    assert f"process {running.pid} not found" in found.text
    assert watch(run_dir, "--stop").code == 2
    assert status_of(run_dir)["state"] == "running"  # looking changes nothing


def test_a_live_terminal_is_redrawn_until_the_run_ends(tmp_path):
    run_dir = tmp_path / "run"
    with start([PROBE, "--step-ms", 30, "--run-dir", run_dir]) as running:
        wait_for_step(run_dir, 2, running)
        running.signal(signal.SIGSTOP)  # so that it is met on its way
        ours, theirs = pty.openpty()
        command = [sys.executable, str(MONITOR), str(run_dir), "--every", "0.2"]
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        with Running(command, environment(), **streams) as watching:
            os.close(theirs)
            text = read_until(ours, lambda text: text.count(REDRAWN) > 2)
            running.signal(signal.SIGCONT)
            text += read_until(ours)
            os.close(ours)
            assert watching.finish(timeout=10).code == 0
        assert running.finish().code == 0
    assert "Ctrl-C leaves; the run continues" in text
    assert text.rindex("probe: DONE") > text.rindex("probe: RUNNING")


def read_until(terminal: int, is_enough: Callable[[str], bool] = lambda _: False) -> str:
    """What is written to a terminal until it is enough, or until its last writer has left."""
    text = ""
    with contextlib.suppress(OSError):  # EIO: nobody is left
        while not is_enough(text) and (chunk := os.read(terminal, 65536)):
            text += chunk.decode(errors="replace")
    return text


def test_the_stop_waits_longer_than_the_launcher():
    assert ProcessOptions().shutdown_timeout < monitor.PATIENCE
