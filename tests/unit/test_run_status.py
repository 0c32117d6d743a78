import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shared import processes
from shared.run_status import View, view, warnings_of
from tests.harness import wait_until


def write(run_dir: Path, age: float = 0.0, **fields: Any) -> Path:
    """A status.json as a running run has it, `age` seconds old, with changes."""
    stamp = lambda seconds: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))  # noqa: E731
    status = {
        **{"schema": 1, "recipe": "probe", "state": "running", "exit_code": None, "reason": None},
        **processes.describe(os.getpid()),
        **{"world_size": 2, "step": 30},
        **{"total_steps": 120, "epoch": 1, "eta_s": 90.0, "last": {}, "best": {}, "outputs": []},
        **{"started_at": stamp(time.time() - age), "updated_at": stamp(time.time() - age)},
        **{"memory_bytes": 7 << 20, "log": None},
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "status.json").write_text(json.dumps(status | fields))
    return run_dir


def log(run_dir: Path, *rows: dict[str, Any]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def train(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "split": "train", "time": float(step), **values}


@pytest.fixture
def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# the state


def test_a_live_run_with_a_fresh_status_is_running(tmp_path):
    seen = view(write(tmp_path))
    assert (seen.state, seen.note, seen.percent, seen.epoch) == ("running", "", 25.0, 2)
    assert (seen.world_size, seen.memory_bytes, seen.pid) == (2, 7 << 20, os.getpid())
    assert seen.disk_free_bytes


def test_a_run_whose_process_is_gone_or_another_is_stale(tmp_path, gone):
    seen = view(write(tmp_path, pid=gone))
    assert seen.state == "stale"
    assert f"process {gone} not found" in seen.note
    assert view(write(tmp_path, pid_born="an earlier boot 17")).state == "stale"
    assert view(write(tmp_path, pid_command=["python", "another.py"])).state == "stale"


def run_of(process: subprocess.Popen[bytes], run_dir: Path, age: float) -> View:
    write(run_dir, age, **processes.describe(process.pid))
    return view(run_dir)


@pytest.mark.serial
def test_of_a_silent_run_the_processor_time_of_its_processes_decides(tmp_path):
    """The one that works is a child of the process that status.json names."""
    busy = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with subprocess.Popen([sys.executable, "-c", busy]) as working:
        wait_until(lambda: processes.descendants(working.pid), "the child")
        seen = run_of(working, tmp_path, 700)
        assert (seen.state, seen.note) == (
            "silent",
            "last heartbeat 11 min ago; its processes use the processor",
        )
        (child,) = processes.descendants(working.pid)
        os.kill(child, signal.SIGSTOP)
        seen = run_of(working, tmp_path, 700)
        assert (seen.state, seen.heartbeat_s) == ("stale", pytest.approx(700, abs=5))
        assert "last heartbeat 11 min ago; its processes use no processor time" in seen.note
        assert run_of(working, tmp_path, 200).state == "running"
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(("age", "state"), [(0, "running"), (700, "stale")])
def test_another_hosts_process_is_not_looked_for_and_that_is_said(tmp_path, gone, age, state):
    seen = view(write(tmp_path, age, host="elsewhere", pid=gone))
    assert seen.state == state
    assert "on elsewhere, whose processes cannot be seen from here" in seen.note


def test_a_held_directory_whose_run_is_over_has_one_that_starts(tmp_path, gone):
    write(tmp_path, 100, state="done", pid=gone)
    with (tmp_path / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert view(tmp_path).state == "starting"
    assert view(tmp_path).state == "done"


@pytest.mark.parametrize("text", ["{", "null"])
def test_a_status_that_cannot_be_read_is_stale(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert view(tmp_path).state == "stale"


def test_the_time_left_runs_on_between_heartbeats(tmp_path):
    assert view(write(tmp_path, 40)).eta_s == pytest.approx(50, abs=2)
    assert view(write(tmp_path, 100)).eta_s == 0.0
    assert view(write(tmp_path, eta_s=None)).eta_s is None


# the numbers


def test_training_numbers_are_the_newest_ones(tmp_path):
    write(tmp_path, last={"skipped": 3})
    log(tmp_path, train(1, loss=4.0, lr=1.0), train(2, loss=2.0, lr=0.5, grad_norm=7.0))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "split": "train", "los')  # the writer was killed
    seen = view(tmp_path)
    assert (seen.loss, seen.lr, seen.grad_norm, seen.skipped) == (2.0, 0.5, 7.0, 3)
    assert seen.recent_losses == [(1, 4.0), (2, 2.0)]
    # weights 0.9 and 1, normed
    assert seen.loss_smoothed == pytest.approx((0.9 * 4.0 + 2.0) / 1.9)


@pytest.mark.parametrize(
    ("values", "name", "best"),
    [
        ({"val_perplexity": [3, 1, 2], "val_loss": [5, 6, 7]}, "val_loss", 5),
        ({"Recall@1": [50.0, 70.0, 60.0]}, "Recall@1", 70.0),
        ({"word_error": [0.5, 0.2, 0.3]}, "word_error", 0.2),
    ],
)
def test_the_best_validation_and_its_epoch(tmp_path, values, name, best):
    write(tmp_path)
    for epoch in range(3):
        row = {tag: numbers[epoch] for tag, numbers in values.items()}
        log(tmp_path, {"step": 10 * epoch + 10, "epoch": epoch, "split": "val", "time": 1.0, **row})
    at = values[name].index(best)
    seen = view(tmp_path)
    assert seen.best == {"name": name, "value": best, "epoch": at + 1, "step": 10 * at + 10}
    assert seen.validation == {tag: numbers[-1] for tag, numbers in values.items()}


def test_what_is_null_is_no_loss_and_a_foreign_programs_memory_is_in_its_metrics(tmp_path):
    seen = view(write(tmp_path, memory_bytes=None))
    assert (seen.loss, seen.best, seen.curve) == (None, None, [])
    rows = train(1, loss=None, memory_bytes=3 << 30), {"step": 1, "split": "val", "loss": None}
    log(tmp_path, *rows)
    seen = view(tmp_path)
    assert (seen.loss, seen.loss_smoothed, seen.curve, seen.best) == (None, None, [], None)
    assert seen.memory_bytes == 3 << 30


def test_a_long_runs_file_is_thinned_out_and_read_quickly(tmp_path):
    write(tmp_path)
    log(tmp_path, *(train(step, loss=math.exp(-step / 1e4)) for step in range(20_000)))
    began = time.process_time()
    seen = view(tmp_path)
    assert time.process_time() - began < 1.0
    assert 600 <= len(seen.curve) <= 1300
    assert seen.curve[0] == 1.0
    assert [step for step, _ in seen.recent_losses] == list(range(19_980, 20_000))


# the log


def test_warnings_are_the_last_five_lines_that_warn(tmp_path):
    path = tmp_path / "a.log"
    lines = [f"2026 | WARNING: number {at}" for at in range(4)]
    path.write_text(
        "\n".join([*lines, "2026 | all is well", "ValueError: x", "2026 | ERROR: y", ""])
    )
    assert warnings_of(str(path)) == [*lines[1:], "ValueError: x", "2026 | ERROR: y"]
    assert warnings_of(None) == warnings_of(str(tmp_path / "no.log")) == []


def test_of_a_huge_log_the_end_alone_is_read(tmp_path):
    path = tmp_path / "a.log"
    with path.open("wb") as stream:
        stream.seek(1 << 33)  # eight gigabytes of nothing
        stream.write(b"\nERROR: the end\n")
    assert warnings_of(str(path)) == ["ERROR: the end"]
