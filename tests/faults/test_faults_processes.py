"""Rows 1 to 9 of the fault matrix: signals, killed, hanging, failing processes (see README.md)."""

import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from shared import stop, supervisor
from tests.faults import probe_recipe
from tests.faults.test_faults_report import first_words
from tests.harness import (
    PROBE,
    ROOT,
    Running,
    children_of,
    environment,
    free_port,
    losses,
    ranks_of,
    run_here,
    run_to_end,
    start,
    status_of,
    wait_for_step,
)

pytestmark = pytest.mark.limit(240)


def position(path: Path) -> int:
    """The step that a checkpoint was written at."""
    return torch.load(path, weights_only=True)["position"]["step"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_fault_01_sigterm_saves_and_leaves(stopped, ranks):
    run_dir, outcome = stopped(ranks)
    assert outcome["code"] == 143, outcome["text"]
    assert not outcome["left"]
    status = status_of(run_dir)
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    assert position(run_dir / "last.pt") == status["step"] == max(losses(run_dir))
    last_line = outcome["text"].splitlines()[-1]
    assert f"stopped: SIGTERM: saved at step {status['step']}" in last_line
    assert "(exit 143)" in last_line
    assert "Traceback" not in outcome["text"]


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [("int@7", 130, "interrupted: SIGINT"), ("term@7,term@7", 143, "stopped: SIGTERM")],
    ids=["Ctrl-C", "SIGTERM twice in a moment"],  # twice as SLURM sends it; two ranks: `stopped`
)
def test_fault_02_a_first_request_saves_and_leaves(tmp_path, fault, code, said):
    run_dir = tmp_path / "run"
    outcome = run_here(probe_recipe.main, ["--fault", fault, "--run-dir", run_dir])
    assert outcome.code == code
    assert position(run_dir / "last.pt") == 7
    assert status_of(run_dir)["exit_code"] == code
    assert f"{said}: saved at step 7" in outcome.last_line


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_fault_02_second_signal_ends_at_once(tmp_path, ranks, number):
    run_dir = tmp_path / "run"
    # the seventh step never ends, so that the first signal finds no moment to save
    args = ["--fault", "hang@7", "--nproc", ranks, "--run-dir", run_dir]
    with start([PROBE, *args]) as running:
        wait_for_step(run_dir, 6, running)
        running.signal(number, group=True)
        time.sleep(stop.SAME_REQUEST + 0.2)
        assert running.process.poll() is None
        running.signal(number, group=True)
        asked = time.monotonic()
        outcome = running.finish()
        assert time.monotonic() - asked < 10
        assert running.leaves_nothing()
    # nothing was saved at the end, so neither 143 nor 130, which promise that
    assert outcome.code == 1, outcome.text
    assert (status_of(run_dir)["state"], status_of(run_dir)["exit_code"]) == ("failed", 1)
    assert "(exit 1)" in outcome.last_line
    assert number.name in outcome.last_line
    assert position(run_dir / "last.pt") == 5


def test_fault_03_run_under_nohup_survives_a_hang_up(tmp_path):
    run_dir = tmp_path / "run"
    args = [PROBE, "--nproc", 2, "--step-ms", 50, "--run-dir", run_dir]
    with start(args, program=["nohup", sys.executable]) as running:
        wait_for_step(run_dir, 3, running)
        running.signal(signal.SIGHUP, group=True)
        for pid in ranks_of(running).values():  # a terminal's hang-up reaches their groups too
            os.killpg(pid, signal.SIGHUP)
        outcome = running.finish()
        assert outcome.code == 0, outcome.text
    assert max(losses(run_dir)) == 24


def test_fault_03_lost_terminal_saves_and_leaves(tmp_path):
    run_dir = tmp_path / "run"
    ours, theirs = pty.openpty()
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": False}
    command = ["setsid", "--ctty", "--wait", sys.executable, str(PROBE), "--run-dir", str(run_dir)]
    with Running([*command, "--step-ms", "100"], environment(), **terminal) as running:
        os.close(theirs)
        wait_for_step(run_dir, 3, running)
        os.close(ours)  # the kernel sends SIGHUP, and every further write to the terminal fails
        assert running.finish().code == 143
        assert running.leaves_nothing()
    assert status_of(run_dir)["state"] == "stopped"
    assert position(run_dir / "last.pt") == status_of(run_dir)["step"]


def test_fault_04_sigterm_to_the_shell_script_reaches_the_run(stopped):
    run_dir, outcome = stopped(2)
    script, run = outcome["pids"]
    assert script == run and outcome["code"] == 143
    assert first_words(run_dir).startswith("Stopped (exit code 143): SIGTERM: saved at")


@pytest.mark.parametrize("ranks", [1, 2])
def test_fault_05_nothing_outlives_a_killed_launcher(tmp_path, ranks):
    run_dir = tmp_path / "run"
    args = ["--nproc", ranks, "--workers", 2, "--step-ms", 100, "--run-dir", run_dir]
    with start([PROBE, *args]) as running:
        wait_for_step(run_dir, 3, running)
        running.signal(signal.SIGKILL)
        assert running.finish().code == -signal.SIGKILL
        assert running.leaves_nothing()
    if ranks > 1:  # its processes get SIGTERM from the kernel, and save
        assert status_of(run_dir)["state"] == "stopped"
        assert position(run_dir / "last.pt") == status_of(run_dir)["step"]
    # neither lock nor half-written file stands in the way of the next run
    assert run_here(probe_recipe.main, ["--run-dir", run_dir]).code == 0


ORPHAN = """
import multiprocessing, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from shared import loader

def worker():
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.01)
    loader.settle_worker(0)
    time.sleep(3600)

multiprocessing.get_context("fork").Process(target=worker).start()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_fault_05_loader_worker_that_was_just_started_does_not_outlive_its_process():
    # killed between the fork and the worker's own arrangements: nobody will signal the worker
    with start(["-c", ORPHAN, ROOT]) as running:
        assert running.finish().code == -signal.SIGKILL
        assert running.leaves_nothing()


def test_fault_06_killed_rank_ends_the_run_and_is_named(tmp_path):
    run_dir = tmp_path / "run"
    # rank 0, which can no longer say so in the status itself
    args = [PROBE, "--nproc", 2, "--fault", "kill@6@0", "--run-dir", run_dir]
    outcome = run_to_end(args, PROBE_HURRIES="")
    assert outcome.code == 1
    assert "rank 0 was killed by SIGKILL" in outcome.last_line
    assert (status_of(run_dir)["state"], status_of(run_dir)["exit_code"]) == ("failed", 1)
    assert "rank 0 was killed" in status_of(run_dir)["reason"]
    assert first_words(run_dir).startswith("Failed (exit code 1): rank 0 was killed by SIGKILL")
    assert position(run_dir / "last.pt") == 5


def test_fault_06_rank_that_is_killed_while_the_others_load_is_named(tmp_path):
    args = ["--nproc", 2, "--fault", "hang@0@0,kill@0@1", "--run-dir", tmp_path / "run"]
    outcome = run_to_end([PROBE, *args])
    assert outcome.code == 1
    assert "rank 1 was killed by SIGKILL" in outcome.last_line
    # without a handler yet, rank 0 dies of the agent's SIGTERM, which is not what went wrong
    both = supervisor.first_failure({0: -signal.SIGTERM, 1: -signal.SIGKILL}, tmp_path)
    assert both.message.startswith("rank 1 was killed by SIGKILL")


def test_fault_06_restarted_run_has_the_losses_of_an_undisturbed_one(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    args = ["--nproc", 2, "--max-restarts", 1, "--fault", "kill@12@1", "--run-dir", run_dir]
    outcome = run_to_end([PROBE, *args])
    assert outcome.code == 0, outcome.text
    assert "continuing from" in outcome.text
    assert losses(run_dir) == undisturbed(2)
    assert status_of(run_dir)["state"] == "done"


def test_fault_07_killed_loader_worker_ends_the_run_with_a_hint(tmp_path):
    run_dir = tmp_path / "run"
    args = ["--nproc", 2, "--workers", 2, "--step-ms", 100, "--run-dir", run_dir]
    with start([PROBE, *args]) as running:
        wait_for_step(run_dir, 3, running)
        os.kill(children_of(ranks_of(running)[1])[0], signal.SIGKILL)
        outcome = running.finish()
        assert running.leaves_nothing()
    assert outcome.code == 1
    assert "killed by signal: Killed" in outcome.last_line
    assert "RAM or /dev/shm" in outcome.last_line
    assert "--workers" in outcome.last_line
    assert status_of(run_dir)["state"] == "failed"


def test_fault_08_hanging_rank_is_named_after_the_timeout(tmp_path):
    run_dir = tmp_path / "run"
    args = ["--nproc", 2, "--timeout", 5, "--fault", "hang@6@1", "--run-dir", run_dir]
    with start([PROBE, *args]) as running:
        wait_for_step(run_dir, 5, running)
        began = time.monotonic()
        outcome = running.finish()
        assert time.monotonic() - began < 40
        assert running.leaves_nothing()
    assert outcome.code == 1
    assert "rank 1 did not answer within --timeout" in outcome.last_line
    assert "step 6 of 24" in outcome.last_line
    assert status_of(run_dir)["state"] == "failed"


def test_fault_09_traceback_of_the_rank_that_failed_comes_once_and_last(tmp_path):
    run_dir = tmp_path / "run"
    outcome = run_to_end([PROBE, "--nproc", 2, "--fault", "raise@6@1", "--run-dir", run_dir])
    assert outcome.code == 1
    assert outcome.text.count("Traceback (most recent call last)") == 1
    assert "rank 1: ValueError: broken on purpose on rank 1, at step 6 of 24" in outcome.last_line
    tail = outcome.text[outcome.text.index("Traceback") :]
    assert "ValueError: broken on purpose on rank 1" in tail
    assert "closed by peer" not in outcome.text
    assert "broken on purpose on rank 1" in status_of(run_dir)["reason"]


def torchrun(run_dir: Path, *args: object) -> list[object]:
    """What a user types who starts the processes with torchrun."""
    own = ["-m", "torch.distributed.run", "--nproc-per-node", 2]
    return [*own, PROBE, "--run-dir", run_dir, *args]


def test_torchrun_typed_by_the_user_restarts_after_a_killed_rank(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    command = torchrun(run_dir, "--fault", "kill@12@1", "--timeout", 30)
    command[2:2] = ["--standalone", "--max-restarts", 1]
    outcome = run_to_end(command)
    assert outcome.code == 0, outcome.text
    assert "continuing from" in outcome.text
    assert losses(run_dir) == undisturbed(2)


def test_torchrun_typed_by_the_user_trains_stops_and_continues(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    with start(torchrun(run_dir, "--step-ms", 100)) as running:
        wait_for_step(run_dir, 11, running)
        running.signal(signal.SIGTERM)
        outcome = running.finish()
        assert running.leaves_nothing()
    assert (status_of(run_dir)["state"], status_of(run_dir)["exit_code"]) == ("stopped", 143)
    assert "stopped: SIGTERM: saved at step" in outcome.text
    outcome = run_to_end(torchrun(run_dir))
    assert outcome.code == 0
    assert "done: 24 steps (exit 0)" in outcome.text
    assert status_of(run_dir)["state"] == "done"
    assert losses(run_dir) == undisturbed(2)


def test_torchrun_typed_by_the_user_tells_which_rank_failed(tmp_path):
    run_dir = tmp_path / "run"
    outcome = run_to_end(torchrun(run_dir, "--fault", "raise@6@1"))
    assert outcome.code == 1
    assert "ValueError: broken on purpose on rank 1" in outcome.text
    assert (status_of(run_dir)["state"], status_of(run_dir)["exit_code"]) == ("failed", 1)


def hosts(run_dir: Path, *args: object) -> list[Running]:
    """Two launchers with one process each that meet on the loopback, as on two hosts."""
    meeting = ["--nnodes", 2, "--master-addr", "127.0.0.1", "--master-port", free_port()]
    common = [PROBE, "--nproc", 1, *meeting, "--run-dir", run_dir, *args]
    return [start([*common, "--node-rank", number]) for number in (0, 1)]


def test_two_hosts_stop_together_and_continue_as_two_processes_of_one(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    first, second = hosts(run_dir, "--step-ms", 100)
    with first, second:
        wait_for_step(run_dir, 5, first)
        second.signal(signal.SIGTERM)
        outcomes = [running.finish() for running in (first, second)]
        assert first.leaves_nothing() and second.leaves_nothing()
    assert [outcome.code for outcome in outcomes] == [143, 143]
    assert all("before training began" not in outcome.text for outcome in outcomes)
    assert (status_of(run_dir)["state"], status_of(run_dir)["exit_code"]) == ("stopped", 143)
    first, second = hosts(run_dir)
    with first, second:
        assert [first.finish().code, second.finish().code] == [0, 0]
        assert "done: 24 steps (exit 0)" in first.text
    assert losses(run_dir) == undisturbed(2)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ([], 0),
        (["--fault", "raise@2"], 1),
        (["--no-such-flag"], 2),
        (["--fault", "package@2"], 3),
        (["--fault", "int@2"], 130),
        (["--fault", "term@2"], 143),
    ],
)
def test_exit_code_last_line_and_status_agree(tmp_path, args, code):
    outcome = run_here(probe_recipe.main, ["--run-dir", tmp_path / "run", "--epochs", 1, *args])
    assert outcome.code == code
    if code == 2:
        assert outcome.text.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return
    status = status_of(tmp_path / "run")
    assert status["exit_code"] == code
    assert status["state"] == {0: "done", 130: "stopped", 143: "stopped"}.get(code, "failed")
    assert f"(exit {code})" in outcome.last_line or code == 3
