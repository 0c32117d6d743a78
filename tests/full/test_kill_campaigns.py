"""Kills at seeded random moments: what rows 3, 5, 6, 10 and 19 promise, in numbers."""

import os
import pty
import random
import shutil
import signal
import sys
import time
from collections import Counter

import pytest

from tests.harness import (
    PROBE,
    Running,
    environment,
    killed_saves,
    losses,
    ranks_of,
    start,
    status_of,
    wait_for_step,
    wait_until,
)

pytestmark = pytest.mark.full
EPOCHS = 12  # 192 steps of one process, 96 of two


@pytest.mark.limit(600)
def test_fifty_kills_during_saves_leave_a_whole_checkpoint_each_time(tmp_path):
    found = killed_saves(tmp_path, kills=50, megabytes=32, seed=0)
    print(f"{found.loadable} of {found.kills} loadable, {found.half_written} met a save half-way")
    assert found.loadable == found.kills == 50
    assert found.half_written >= 10, "too few kills met a save for this to show anything"


def kill_someone(running, generator):
    """SIGKILL to a process of the run; what it was."""
    ranks = ranks_of(running)
    victims = {"launcher": running.pid} | {f"rank {rank}": pid for rank, pid in ranks.items()}
    name = generator.choice(sorted(victims))
    os.kill(victims[name], signal.SIGKILL)
    return name


def disturb(run_dir, ranks, generator):
    """Start or continue a run and kill it at a random moment; who was killed, None: it was done."""
    before = max(losses(run_dir), default=0)
    args = [PROBE, "--epochs", EPOCHS, "--nproc", ranks, "--step-ms", 20, "--workers", ranks]
    with start([*args, "--run-dir", run_dir]) as running:
        if generator.random() < 0.75:  # else somewhere in the start
            wait_until(
                lambda: (
                    running.process.poll() is not None
                    or max(losses(run_dir), default=0) > before + 1
                ),
                f"a step after {before}",
            )
            time.sleep(generator.uniform(0.0, 0.6))  # the moment of the kill is the experiment
        else:
            time.sleep(generator.uniform(0.0, 5.0))
        if running.process.poll() == 0:
            return None
        victim = kill_someone(running, generator)
        running.finish()
        assert running.leaves_nothing(), f"{victim} was killed, and {running.processes} live on"
        return victim


@pytest.mark.limit(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills_change_no_loss(tmp_path, ranks):
    args = ["--epochs", EPOCHS, "--nproc", ranks]
    with start([PROBE, *args, "--run-dir", tmp_path / "undisturbed"]) as running:
        assert running.finish().code == 0
    expected = losses(tmp_path / "undisturbed")
    run_dir, generator, victims, compared = tmp_path / "run", random.Random(0), Counter(), 0
    run_dir.mkdir()
    while victims.total() < 20:
        victim = disturb(run_dir, ranks, generator)
        if victim:
            victims[victim] += 1
            continue
        assert losses(run_dir) == expected
        compared += 1
        shutil.rmtree(run_dir)
        run_dir.mkdir()
    with start([PROBE, *args, "--run-dir", run_dir]) as running:
        outcome = running.finish()
    assert outcome.code == 0, outcome.text
    assert losses(run_dir) == expected
    assert status_of(run_dir)["state"] == "done"
    print(f"{ranks} process(es): killed {dict(victims)}; {compared + 1} runs to the end, all equal")


@pytest.mark.limit(300)
def test_hang_ups_under_nohup_leave_two_processes_running(tmp_path):
    run_dir, generator = tmp_path / "run", random.Random(0)
    args = [PROBE, "--nproc", 2, "--epochs", 12, "--step-ms", 50, "--run-dir", run_dir]
    with start(args, program=["nohup", sys.executable]) as running:
        wait_for_step(run_dir, 1, running)
        for _ in range(10):
            time.sleep(generator.uniform(0.0, 0.3))
            for group in (running.pid, *ranks_of(running).values()):
                os.killpg(group, signal.SIGHUP)
        outcome = running.finish()
    assert outcome.code == 0, outcome.text
    assert max(losses(run_dir)) == 96


@pytest.mark.limit(300)
def test_closed_terminal_leaves_the_job_of_an_interactive_shell_running(tmp_path):
    run_dir = tmp_path / "run"
    ours, theirs = pty.openpty()
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": False}
    shell = ["setsid", "--ctty", "--wait", "bash", "--norc", "-i"]
    with Running(shell, environment(HISTFILE="/dev/null"), **terminal) as running:
        os.close(theirs)
        command = f"nohup {sys.executable} {PROBE} --nproc 2 --step-ms 100 --run-dir {run_dir}"
        os.write(ours, f"{command} > {tmp_path}/log 2>&1 &\n".encode())
        wait_for_step(run_dir, 3)
        os.close(ours)  # the shell gets SIGHUP and sends it on to its jobs
        running.finish()
        wait_until(lambda: status_of(run_dir)["state"] != "running", "the end of the run")
        assert status_of(run_dir)["state"] == "done"
        assert running.leaves_nothing()
    assert max(losses(run_dir)) == 24
