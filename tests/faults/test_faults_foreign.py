"""A foreign program under `shared/program.py`: it ends well, breaks, is stopped, or outlives us."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from shared import lock
from tests.harness import (
    ROOT,
    Running,
    children_of,
    run_to_end,
    shell_script,
    start,
    status_of,
    wait_until,
)

pytestmark = pytest.mark.serial
LAUNCH = ROOT / "shared" / "program.py"

# like `swift`: waits in subprocess.run for an agent, hears no signal itself
SWIFT = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", *sys.argv[1:]]).returncode)
"""
# like torchrun: its worker lives in a session of its own and gets the signals from here
AGENT = """
import signal, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: worker.send_signal(number))
sys.exit(worker.wait() and 1)
"""
# like a trainer: writes its log, saves for half a second after the first signal; SAVES or DEAF
WORKER = """
import json, signal, sys, time
heard = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: heard.append(int(number)))
directory, kind = sys.argv[1:3]
for step in range(1, 10_000):
    with open(directory + "/logging.jsonl", "a") as log:
        log.write(json.dumps({"loss": 1 / step, "global_step/max_steps": f"{step}/9999"}) + "\\n")
    if step == 3:
        print("\\nat work", flush=True)
    time.sleep(0.05)
    if heard and kind == "SAVES":
        time.sleep(0.6)
        print("saved after", heard, flush=True)
        sys.exit(0)
"""


def launch(run_dir: Path, *command: object, flags: tuple[object, ...] = (), **env: str) -> Running:
    return start([LAUNCH, "--run-dir", run_dir, *flags, "--", *command], **env)


def python(text: str, *words: object) -> tuple[object, ...]:
    return (sys.executable, "-c", text, *words)


def swift(run_dir: Path, kind: str = "SAVES", *flags: object, **env: str) -> Running:
    """A run of three generations, like swift's, with its worker at step 3."""
    run_dir.mkdir(parents=True, exist_ok=True)
    running = launch(run_dir, *python(SWIFT, AGENT, WORKER, run_dir, kind), flags=flags, **env)
    running.wait_for_text("\nat work")
    return running


def guard_of(running: Running) -> int:
    (pid,) = children_of(running.pid)
    return pid


def test_a_program_that_ends_well_is_done(tmp_path):
    line = {"loss": 0.5, "epoch": 3.0, "global_step/max_steps": "6/6"}
    text = f"import pathlib; pathlib.Path(r'{tmp_path}', 'v0').mkdir();" + (
        f"pathlib.Path(r'{tmp_path}', 'v0', 'logging.jsonl').write_text('{json.dumps(line)}\\n')"
    )
    with launch(tmp_path, *python(text), flags=("--recipe", "vasevqa")) as running:
        outcome = running.finish()
    assert outcome.code == 0
    assert outcome.last_line.endswith("done: 6 steps (exit 0)")
    status = status_of(tmp_path)
    assert (status["state"], status["exit_code"], status["recipe"]) == ("done", 0, "vasevqa")
    assert (status["step"], status["total_steps"], status["last"]) == (6, 6, {"loss": 0.5})
    assert (status["pid"], status["epoch"]) == (running.pid, 3)
    assert '"loss": 0.5' in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("sys.exit(3)", 3, "left with exit code 3"),
        ("sys.exit(7)", 1, "left with exit code 7"),
        ("sys.exit(143)", 1, "SIGTERM"),
        ("os.kill(os.getpid(), 9)", 1, "was ended by SIGKILL (by the kernel when RAM ran out"),
    ],
)
def test_a_program_that_breaks_is_failed(tmp_path, ends, code, said):
    with launch(tmp_path, *python(f"import os, sys; {ends}")) as running:
        outcome = running.finish()
    assert outcome.code == code
    assert said in outcome.last_line
    assert outcome.last_line.endswith(f"(exit {code})")
    status = status_of(tmp_path)
    assert (status["state"], status["exit_code"]) == ("failed", code)
    assert said in status["reason"]


def test_arguments_arrive_as_they_are_and_no_shell_sees_them(tmp_path):
    words = ["a b", "$(touch pwned)", "数据", "--run-dir", "--", "it's"]
    text = "import json, sys; print(json.dumps(sys.argv[1:]))"
    with launch(tmp_path, *python(text, *words)) as running:
        assert json.dumps(words) in running.finish().text


@pytest.mark.parametrize(
    ("number", "is_again", "code"), [(signal.SIGTERM, True, 143), (signal.SIGINT, False, 130)]
)
def test_a_stop_lets_the_program_save_once_and_leaves_nothing(tmp_path, number, is_again, code):
    """SIGTERM twice in a moment to the launcher, as SLURM sends it; Ctrl-C to the group."""
    with swift(tmp_path) as running:
        running.signal(number, group=not is_again)
        if is_again:
            time.sleep(0.02)
            running.signal(number)
        outcome = running.finish()
        assert running.processes == []
    assert outcome.code == code
    assert outcome.text.count("saved after [15]") == 1
    assert outcome.last_line.endswith(f"(exit {code})")
    status = status_of(tmp_path)
    assert (status["state"], status["exit_code"]) == ("stopped", code)
    assert f"{number.name}: the program has ended, at step" in status["reason"]
    assert "of 9999" in status["reason"]


def test_a_second_signal_ends_everything_at_once(tmp_path):
    with swift(tmp_path, "DEAF") as running:
        running.signal(signal.SIGTERM)
        time.sleep(0.7)
        running.signal(signal.SIGTERM)
        outcome = running.finish(timeout=20)
        assert running.processes == []
    assert outcome.code == 1
    assert "killed after SIGTERM, before it had ended by itself, at step" in outcome.last_line
    assert status_of(tmp_path)["state"] == "failed"


def test_a_program_that_hears_no_signal_is_killed_when_its_time_is_up(tmp_path):
    with swift(tmp_path, "DEAF", "--shutdown-timeout", 1) as running:
        began = time.monotonic()
        running.signal(signal.SIGTERM)
        outcome = running.finish(timeout=20)
        assert 1.0 < time.monotonic() - began < 10.0
        assert running.processes == []
    assert outcome.code == 1
    assert "killed after SIGTERM" in status_of(tmp_path)["reason"]


@pytest.mark.parametrize(
    ("kind", "is_saving"), [("SAVES", False), ("SAVES", True), ("DEAF", False)]
)
def test_kill_9_of_the_launcher_lets_the_program_save_and_leaves_nothing(tmp_path, kind, is_saving):
    """A program that saves already is not hurried; a deaf one is killed when its time is up."""
    with swift(tmp_path, kind, "--shutdown-timeout", 2 if kind == "DEAF" else 30) as running:
        assert len(running.processes) == 5  # launcher, guard, swift, agent, worker
        if is_saving:
            running.signal(signal.SIGTERM)
            time.sleep(0.1)
        running.signal(signal.SIGKILL)
        assert lock.is_held(tmp_path)  # the guard keeps it until all is over
        assert running.leaves_nothing()
        assert ("saved after [15]" in running.text) == (kind == "SAVES")
    assert status_of(tmp_path)["state"] == "running"  # a monitor sees that the pid is gone
    assert not lock.is_held(tmp_path)


def test_kill_9_of_the_guard_leaves_nothing_and_is_a_failure(tmp_path):
    with swift(tmp_path, "DEAF") as running:
        os.kill(guard_of(running), signal.SIGKILL)
        outcome = running.finish(timeout=20)
        assert running.processes == []
    assert outcome.code == 1
    assert status_of(tmp_path)["state"] == "failed"


def test_kill_9_of_the_program_ends_what_it_had_started(tmp_path):
    with swift(tmp_path) as running:
        (program,) = children_of(guard_of(running))
        os.kill(program, signal.SIGKILL)
        outcome = running.finish(timeout=20)
        assert running.processes == []
    assert outcome.code == 1
    assert "saved after [15]" in outcome.text
    assert "was ended by SIGKILL" in outcome.last_line


def test_what_a_program_leaves_behind_ends_with_it(tmp_path):
    daemon = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    with launch(tmp_path, *python(daemon)) as running:
        assert running.finish(timeout=20).code == 0
        assert running.processes == []


def test_nohup_holds_for_the_program_and_its_children(tmp_path):
    words = [LAUNCH, "--run-dir", tmp_path, "--", *python(SWIFT, AGENT, WORKER, tmp_path, "SAVES")]
    with start(words, program=["nohup", sys.executable]) as running:
        wait_until(lambda: status_of(tmp_path).get("step", 0) > 3, "steps", running=running)
        running.signal(signal.SIGHUP, group=True)
        (program,) = children_of(guard_of(running))
        ignored = Path(f"/proc/{program}/status").read_text().partition("SigIgn:\t")[2].split()[0]
        assert int(ignored, 16) & 1 << (signal.SIGHUP - 1)
        reached = status_of(tmp_path)["step"]
        wait_until(lambda: status_of(tmp_path)["step"] > reached, "more steps", running=running)
        running.signal(signal.SIGTERM)
        assert running.finish().code == 143


def test_a_scripts_log_has_the_closing_line_too(tmp_path):
    script = shell_script(tmp_path, LAUNCH)
    words = [script, "--run-dir", tmp_path / "run", "--", *python("print('its words')")]
    outcome = run_to_end(words, program=["bash"])
    log = tmp_path / "logs" / "latest.log"
    assert "its words\n" in log.read_text()
    assert log.read_text().splitlines()[-1].endswith("done: the program has ended (exit 0)")
    assert outcome.last_line == log.read_text().splitlines()[-1]
    assert status_of(tmp_path / "run")["log"] == str(log.resolve())


def test_a_second_live_run_in_the_directory_is_refused(tmp_path):
    with swift(tmp_path) as first:
        outcome = run_to_end([LAUNCH, "--run-dir", tmp_path, "--", "true"])
        assert outcome.code == 2
        assert f"in use by a live run (pid {first.pid})" in outcome.text
        assert status_of(tmp_path)["state"] == "running"


def test_the_heartbeat_goes_on_while_the_program_says_nothing(tmp_path):
    silent = python("import time; time.sleep(60)")
    with launch(tmp_path, *silent, flags=("--total-steps", 7)) as running:
        wait_until(lambda: status_of(tmp_path), "a status", running=running)
        before = status_of(tmp_path)
        wait_until(lambda: status_of(tmp_path)["updated_at"] > before["updated_at"], "a heartbeat")
        assert (before["step"], before["total_steps"], before["pid"]) == (0, 7, running.pid)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--run-dir", "r", "--", "no-such-program"], 3, "no-such-program is not a program"),
        (["--run-dir", "r"], 2, "a program after -- is missing"),
        (["--", "true"], 2, "--run-dir is missing"),
        (["--run-dri", "r", "--", "true"], 2, "did you mean --run-dir?"),
        (["--run-dir", "/proc/r", "--", "true"], 2, "cannot be written"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path, words, code, said):
    outcome = run_to_end([LAUNCH, *words])
    assert outcome.code == code
    (line,) = outcome.text.splitlines()
    assert said in line
