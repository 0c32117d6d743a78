"""demo.sh and shared/tools/run_demos.py, with recipes that only pretend to train."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from shared import report
from shared.status import now
from shared.tools import run_demos
from tests.harness import wait_until

TRAIN = """#!/usr/bin/env bash
echo "training with $*"
cd "$(dirname "$0")" && mkdir -p demo/runs/checkpoints
cat leaves.json > demo/runs/checkpoints/status.json
echo "<html>" > demo/runs/checkpoints/report.html
echo "interpreter $PYTHON"
exit @CODE@
"""
SHARED = (
    *("__init__", "child", "errors", "files", "config", "device", "gone", "launched", "lock"),
    *("logs", "outcome"),
    *("processes", "progress", "run_status", "run_text", "settings", "status", "stop"),
    *("terminal", "tools/about", "tools/run_demos"),
)
RUN = {"command": "train.sh --demo", "run": "demo/runs/checkpoints"}
RESULT = {"name": "accuracy", "before": 0.51234, "after": 0.875, "higher_is_better": True}
DONE = {"state": "done", "result": RESULT}


def pretend(directory: Path, name: str, status: dict, code: int = 0) -> None:
    """A recipe whose train.sh leaves this status and exits so."""
    script = directory / name / "train.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.with_name("leaves.json").write_text(json.dumps(status), encoding="utf-8")
    script.write_text(TRAIN.replace("@CODE@", str(code)))
    script.chmod(0o755)


def on_one_line(text: str) -> str:
    """`text` without the breaks that fit it to 80 columns."""
    return " ".join(text.split())


def log_of(root: Path, name: str) -> str:
    return (root / name / run_demos.LOG).read_text()


@pytest.fixture
def site(house):
    """A house with demo.sh, a set-up that has nothing to do, and a pretended face_distill."""
    house.take("demo.sh", "face_distill/about.json", *(f"shared/{name}.py" for name in SHARED))
    house.write("setup.sh", "#!/bin/sh\necho set up\n")
    house.python(".venv/bin/python", "root")
    pretend(house.root, "face_distill", DONE)
    return house


@pytest.fixture
def two(tmp_path):
    """A root with two pretended recipes."""
    facts = {"trains": "something", "runs": [], "demo": RUN}
    for name in ("one", "two"):
        pretend(tmp_path, name, DONE)
        (tmp_path / name / "about.json").write_text(json.dumps({"name": name, **facts}))
    return tmp_path


def test_a_demo_ends_with_the_table_of_what_was_learned(site):
    result = site.run("sh", site.root / "demo.sh", cwd="/", env={"VIRTUAL_ENV": "/other"})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "set up"
    assert lines[1:] == [
        "face_distill: face adapters on a BLIP-2 vision tower",
        "  face_distill/train.sh --demo > face_distill/demo/runs/logs/demo.log",
        "recipe        time  result",
        "------------  ----  ------------------------",
        lines[5],
        "report: face_distill/demo/runs/checkpoints/report.html",
        "your own data: face_distill/README.md",
    ]
    assert lines[5].endswith("s   accuracy 0.5123 -> 0.875")
    log = log_of(site.root, "face_distill")
    assert "training with --demo\n" in log
    assert f"interpreter {site.root}/.venv/bin/python" in log  # which was set up
    site.run(site.root / "demo.sh", "face_distill", env={"PYTHON": "/mine"})
    assert "interpreter /mine" in log_of(site.root, "face_distill")


def test_a_failed_set_up_ends_the_demo_with_its_code(site):
    site.write("setup.sh", "#!/bin/sh\nexit 3\n")
    result = site.run(site.root / "demo.sh")
    assert (result.returncode, result.stdout) == (3, "")


def test_an_unknown_recipe_and_help_train_nothing(site):
    result = site.run(site.root / "demo.sh", "face_distil")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "face_distil; did you mean face_distill?" in line
    result = site.run(site.root / "demo.sh", "--help")
    assert result.returncode == 0
    assert "face_distill" in result.stdout
    assert not (site.root / "face_distill/demo").exists()


def test_one_failure_does_not_stop_the_others_and_shows_in_the_exit_code(two, capfd):
    pretend(two, "one", {"state": "failed", "exit_code": 1, "reason": "the disk\nis full"}, code=1)
    assert run_demos.main([], two) == 1
    text = capfd.readouterr().out
    assert re.search(r"one +\d s +FAILED \(exit 1\): the disk is full\n", text)
    assert re.search(r"two +\d s +accuracy 0.5123 -> 0.875\n", text)


LOUD = """#!/bin/sh
for n in $(seq 2000); do echo "line $n, a long one: ======================================"; done
exit 4
"""


def test_a_recipe_takes_at_most_15_lines_of_80_columns_and_its_log_the_rest(
    two, capfd, monkeypatch
):
    """Also one that is long at work and fails: the end of its log is shown, and its place."""
    monkeypatch.setattr(run_demos, "_TOLD_AT", (0.1, 1.5))
    (two / "one" / "train.sh").write_text(LOUD.replace("exit 4", "sleep 2.5; exit 4"))
    assert run_demos.main(["one"], two) == 1
    captured = capfd.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) <= 80, lines
    assert "  one/train.sh --demo > one/demo/runs/logs/demo.log" in lines
    assert sum(line.startswith("  0:00:0") and "line 2000" in line for line in lines) >= 2
    at = lines.index("  exit code 4; the log ends with:")
    assert lines[at + 4].startswith("  | line 2000, a long one: ==")
    assert log_of(two, "one").count("\n") == 2000


def test_on_a_terminal_one_line_tells_how_far_it_is(site):
    site.write("face_distill/train.sh", "#!/bin/sh\necho step 7\nsleep 1.5\nexit 1\n")
    ours, theirs = pty.openpty()
    process = site.start(site.root / "demo.sh", stdout=theirs, stderr=theirs, env={"TERM": "xterm"})
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # EIO: the writer has left
        while chunk := os.read(ours, 65536):
            text += chunk
    os.close(ours)
    assert process.wait(20) == 1
    assert b"\r\x1b[2K  0:00:01  step 7\r\x1b[2K" in text
    assert text.count(b"\n") <= 15


def test_a_killed_demo_is_stale(two, capfd):
    status = {"state": "running", "pid": 2**22 + 1, "step": 3, "total_steps": 9}
    pretend(two, "one", {**status, "updated_at": now()}, code=137)
    assert run_demos.main(["one"], two) == 1
    row = on_one_line(capfd.readouterr().out)
    assert "STALE: process 4194305 not found, last heartbeat" in row


@pytest.mark.parametrize(("after", "higher", "gained"), [(0.5, True, False), (0.5, False, True)])
def test_a_result_that_got_no_better_is_marked(two, capfd, after, higher, gained):
    result = {**RESULT, "after": after, "higher_is_better": higher}
    pretend(two, "one", {**DONE, "result": result})
    assert run_demos.main(["one"], two) == 0
    assert ("0.5123 -> 0.5 (no gain)" in capfd.readouterr().out) != gained


def test_shares_are_told_in_percent(two, capfd):
    result = {"name": "R@1", "before": 0.01, "after": 0.184, "unit": "share", "n": 100}
    pretend(two, "one", {**DONE, "result": {**result, "chance": 0.01}})
    assert run_demos.main(["one"], two) == 0
    assert "R@1 1.0 % -> 18.4 % (chance 1.0 %, N 100)" in on_one_line(capfd.readouterr().out)
    page = report.write(two / "one" / "demo" / "runs" / "checkpoints").read_text()
    assert "18.4 %" in page and "0.184" not in page


def test_every_recipe_ending_well_is_exit_code_0_and_one_named_twice_runs_once(two, capfd):
    assert run_demos.main(["one", "two", "two"], two) == 0
    assert capfd.readouterr().out.count("two: something") == 1


def test_success_needs_a_status_that_is_not_of_an_older_run(two, capfd):
    run_demos.main(["one"], two)
    (old,) = (two / "one").rglob("status.json")
    os.utime(old, (time.time() - 60,) * 2)
    for code, said in ((5, "FAILED: exit code 5"), (0, "FAILED: no status.json")):
        (two / "one" / "train.sh").write_text(f"#!/bin/sh\nexit {code}\n")
        assert run_demos.main(["one"], two) == 1
        assert said in capfd.readouterr().out


def test_a_script_that_does_not_start_is_a_failure_of_its_own(two, capfd):
    (two / "one" / "train.sh").chmod(0o644)
    assert run_demos.main([], two) == 1
    captured = capfd.readouterr()
    assert "does not start" in captured.err
    assert "accuracy" in on_one_line(captured.out)


SLOW = """#!/bin/sh
exec "@PYTHON@" -c '
import signal, sys, time
seen = []
def note(number, frame):
    seen.append(number)
signal.signal(signal.SIGINT, note); signal.signal(signal.SIGTERM, note)
print("at work", flush=True)
while not seen:
    time.sleep(0.02)
time.sleep(0.3)
print("times asked:", len(seen), flush=True)
sys.exit(130 if seen[0] == 2 else 143)'
"""


@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 143)],
)
def test_a_stop_reaches_the_recipe_once_and_it_may_save(site, number, to_group, code):
    site.write("face_distill/train.sh", SLOW.replace("@PYTHON@", sys.executable))
    process = site.start(site.root / "demo.sh")
    log = site.root / "face_distill" / run_demos.LOG
    wait_until(lambda: log.is_file() and "at work" in log.read_text(), "the recipe's work")
    (os.killpg if to_group else os.kill)(process.pid, number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == code
    assert "times asked: 1" in log.read_text()
    assert f"STOPPED: exit code {code}" in on_one_line(out)


def test_after_a_stop_the_next_recipe_does_not_start(two, capfd):
    (two / "one" / "train.sh").write_text("#!/bin/sh\nkill -INT $PPID\nsleep 0.2\nexit 130\n")
    assert run_demos.main([], two) == 130
    assert "two: " not in capfd.readouterr().out
