"""Ids of processes in files: nothing is signalled that is not proven to be the run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import processes, supervisor
from tests.faults import probe_recipe
from tests.harness import ROOT, run_here, run_to_end, start, wait_until

pytestmark = [pytest.mark.serial, pytest.mark.slow]
MONITOR = ROOT / "shared" / "tools" / "monitor.py"
FUTURE, PAST = "2999-01-01T00:00:00Z", "2001-01-01T00:00:00Z"


@contextlib.contextmanager
def decoy() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any run and would die of a SIGTERM."""
    words = ["sleep", "600"]
    process = subprocess.Popen(words, start_new_session=True)
    # its command line appears a moment after Popen has returned
    wait_until(lambda: processes.command(process.pid) == words, "the decoy's command line")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def forged(run_dir: Path, **fields: Any) -> Path:
    """A run directory whose status.json says that a run is at work."""
    run_dir.mkdir(exist_ok=True)
    known = {"schema": 1, "recipe": "probe", "state": "running", "host": socket.gethostname()}
    known |= {"step": 3, "total_steps": 9, "started_at": PAST, "updated_at": PAST}
    (run_dir / "status.json").write_text(json.dumps(known | fields))
    return run_dir


def stop(run_dir: Path) -> tuple[int, str]:
    outcome = run_to_end([MONITOR, run_dir, "--stop"])
    return outcome.code, outcome.text


def proof_of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    return processes.describe(process.pid)


@pytest.mark.parametrize("began", [PAST, FUTURE])
def test_a_foreign_process_is_never_signalled(tmp_path, began):
    with decoy() as other:
        code, text = stop(forged(tmp_path / "run", pid=other.pid, started_at=began))
        assert (code, text.count("\n")) == (2, 1)
        assert f"process {other.pid} is not known to be the run" in text
        assert other.poll() is None


@pytest.mark.parametrize(
    ("changes", "has_lock_file"),
    [
        ({"pid_born": "another-boot 1"}, True),
        ({"pid_command": ["python", "train_distill.py"]}, True),
        ({"host": None}, True),
        ({}, True),  # all of it is true, but it does not hold the run's lock
        ({}, False),
    ],
)
def test_a_process_that_is_not_proven_in_every_point_is_left_alone(
    tmp_path, changes, has_lock_file
):
    with decoy() as other:
        run_dir = forged(tmp_path / "run", **proof_of(other) | changes)
        if has_lock_file:
            (run_dir / "run.lock").touch()
        assert stop(run_dir)[0] == 2
        assert other.poll() is None


@pytest.mark.parametrize("pid", [0, -1, 1, 2**70, "12", True])
def test_numbers_that_are_no_process_are_refused(tmp_path, pid):
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root and unshare: there a signal to every process reaches no one else")
    run_dir = forged(tmp_path / "run", pid=pid, pid_born="", pid_command=[])
    inside = tmp_path / "inside.sh"
    inside.write_text(
        'sleep 600 & decoy=$!\n"$@"; echo "code $?"\nkill -0 "$decoy" && echo "decoy lives"\n'
        'kill "$decoy"\n'
    )
    words = ["bash", str(inside), sys.executable, str(MONITOR), str(run_dir), "--stop"]
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    done = subprocess.run([*alone, *words], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["code 2", "decoy lives"], done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_new_run_does_not_wait_for_a_forged_one(tmp_path):
    with decoy() as other:
        run_dir = forged(tmp_path / "run", pid=other.pid, started_at=FUTURE)
        assert run_here(probe_recipe.main, ["--epochs", 1, "--run-dir", run_dir]).code == 0
        assert other.poll() is None


def test_a_process_runs_below_the_directory_of_its_script(tmp_path):
    script = tmp_path / "lavic" / "script.py"
    script.parent.mkdir()
    script.write_text("import time; print('at work', flush=True); time.sleep(60)")
    with start([script]) as running:
        running.wait_for_text("at work")
        assert processes.runs_below(running.pid, tmp_path)
        assert not processes.runs_below(running.pid, tmp_path / "vasevqa")


@pytest.mark.parametrize(
    ("born", "survives"), [({"pid_born": "another-boot 1"}, True), ({}, False)]
)
def test_a_worker_whose_number_was_given_out_again_is_not_killed(tmp_path, born, survives):
    with decoy() as other:
        (tmp_path / "pid.0").write_text(json.dumps(proof_of(other) | born))
        supervisor.Stops(tmp_path, lambda *_: RuntimeError()).kill_workers()
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(timeout=0.5 if survives else 10)
        assert (other.poll() is None) == survives


def test_temporaries_with_absurd_numbers_are_left_or_removed_without_a_word(tmp_path):
    for number in ("0", "1", "99999999999999999999999"):
        (tmp_path / f"last.pt.tmp.{number}").touch()
    assert run_here(probe_recipe.main, ["--epochs", 1, "--run-dir", tmp_path]).code == 0
