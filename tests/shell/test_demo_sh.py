"""demo.sh and shared/tools/run_demos.py, with recipes that only pretend to train."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from shared.tools import run_demos
from shared.tools.run_demos import Recipe

TRAIN = """#!/usr/bin/env bash
echo "training with $*"
cd "$(dirname "$0")" && mkdir -p demo/runs/checkpoints
cat leaves.json > demo/runs/checkpoints/status.json
echo "<html>" > demo/runs/checkpoints/report.html
echo "interpreter $PYTHON"
exit @CODE@
"""
DONE = {
    "state": "done",
    "result": {
        "name": "accuracy",
        "before": 0.51234,
        "after": 0.875,
        "higher_is_better": True,
    },
}


def pretend(directory: Path, name: str, status: dict, code: int = 0) -> None:
    """A recipe whose train.sh leaves this status and exits so."""
    script = directory / name / "train.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.with_name("leaves.json").write_text(json.dumps(status), encoding="utf-8")
    script.write_text(TRAIN.replace("@CODE@", str(code)))
    script.chmod(0o755)


def rows_of(lines: list[str]) -> list[str]:
    """The table's rows, of what a demo printed."""
    rule = next(at for at, line in enumerate(lines) if set(line) == {"-", " "})
    return lines[rule + 1 : lines.index("", rule)]


@pytest.fixture
def site(house):
    """A house with demo.sh, a set-up that has nothing to do, and a pretended face_distill."""
    house.take("demo.sh", "shared/__init__.py", "shared/errors.py", "shared/files.py")
    house.take("shared/child.py", "shared/prctl.py", "shared/processes.py")
    house.take("shared/tools/run_demos.py")
    house.write("setup.sh", "#!/bin/sh\necho set up\n")
    house.python(".venv/bin/python", "root")
    pretend(house.root, "face_distill", DONE)
    return house


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A root with two pretended recipes, both in the table."""
    recipe = Recipe("something", "train.sh", ("--demo",), "checkpoints")
    monkeypatch.setattr(run_demos, "RECIPES", {"one": recipe, "two": recipe})
    for name in ("one", "two"):
        pretend(tmp_path, name, DONE)
    return tmp_path


@pytest.mark.parametrize("words", [[], ["face_distill"]])
def test_a_demo_ends_with_the_table_of_what_was_learned(site, words):
    result = site.run("sh", site.root / "demo.sh", *words, cwd="/")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "set up"
    assert "training with --demo" in lines
    head, rule, row, _, pages, report, _, further = lines[-8:]
    assert head.split() == ["recipe", "trained", "result", "time"]
    assert set(rule) == {"-", " "}
    assert row.startswith("face_distill  face adapters on a BLIP-2 vision tower  ")
    assert "accuracy 0.5123 -> 0.875" in row
    assert pages == "the runs as pages, for a browser"
    assert report == "  face_distill/demo/runs/checkpoints/report.html"
    assert further == "your own data: face_distill/README.md"


def test_a_demo_uses_the_environment_that_was_set_up_unless_one_is_named(site):
    out = site.run(site.root / "demo.sh", env={"VIRTUAL_ENV": "/other"}).stdout
    assert f"interpreter {site.root}/.venv/bin/python" in out
    assert "interpreter /mine" in site.run(site.root / "demo.sh", env={"PYTHON": "/mine"}).stdout


def test_a_failed_set_up_ends_the_demo_with_its_code(site):
    site.write("setup.sh", "#!/bin/sh\nexit 3\n")
    result = site.run(site.root / "demo.sh")
    assert (result.returncode, result.stdout) == (3, "")


def test_an_unknown_recipe_is_one_line_with_the_nearest_name(site):
    result = site.run(site.root / "demo.sh", "face_distil")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "face_distil; did you mean face_distill?" in line
    assert "training" not in result.stdout


def test_help_lists_the_recipes_and_trains_nothing(site):
    result = site.run(site.root / "demo.sh", "--help")
    assert result.returncode == 0
    assert "face_distill" in result.stdout
    assert "training" not in result.stdout


def test_one_failure_does_not_stop_the_others_and_shows_in_the_exit_code(two, capfd):
    pretend(two, "one", {"state": "failed", "reason": "the disk\nis full"}, code=1)
    assert run_demos.main([], two) == 1
    lines = capfd.readouterr().out.splitlines()
    first, second = rows_of(lines)
    assert "FAILED: the disk is full" in first
    assert "accuracy 0.5123 -> 0.875" in second


def test_every_recipe_ending_well_is_exit_code_0(two, capfd):
    assert run_demos.main([], two) == 0
    assert capfd.readouterr().out.count("training with --demo") == 2


@pytest.mark.parametrize(("after", "higher", "gained"), [(0.5, True, False), (0.5, False, True)])
def test_a_result_that_got_no_better_is_marked(two, capfd, after, higher, gained):
    result = {**DONE["result"], "after": after, "higher_is_better": higher}
    pretend(two, "one", {**DONE, "result": result})
    assert run_demos.main(["one"], two) == 0
    assert ("0.5123 -> 0.5 (no gain)" in capfd.readouterr().out) != gained


def test_a_recipe_named_twice_runs_once(two, capfd):
    assert run_demos.main(["two", "two"], two) == 0
    assert capfd.readouterr().out.count("training with") == 1


def test_a_recipe_whose_script_is_not_there_is_not_offered(two, capfd):
    (two / "two" / "train.sh").unlink()
    assert run_demos.main([], two) == 0
    assert run_demos.main(["two"], two) == 2
    assert "no recipe two" in capfd.readouterr().err


def test_success_without_a_status_is_a_failure(two, capfd):
    (two / "one" / "train.sh").write_text("#!/bin/sh\nexit 0\n")
    assert run_demos.main(["one"], two) == 1
    assert "FAILED: no status.json" in capfd.readouterr().out


def test_an_older_runs_status_is_not_taken_for_this_ones(two, capfd):
    run_demos.main(["one"], two)
    (old,) = (two / "one").rglob("status.json")
    os.utime(old, (time.time() - 60,) * 2)
    (two / "one" / "train.sh").write_text("#!/bin/sh\nexit 5\n")
    capfd.readouterr()
    assert run_demos.main(["one"], two) == 1
    assert "FAILED: exit code 5" in capfd.readouterr().out


def test_a_script_that_does_not_start_is_a_failure_of_its_own(two, capfd):
    (two / "one" / "train.sh").chmod(0o644)
    assert run_demos.main([], two) == 1
    captured = capfd.readouterr()
    assert "does not start" in captured.err
    assert "accuracy" in rows_of(captured.out.splitlines())[-1]


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
time.sleep(0.5)
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
    assert process.stdout
    while "at work" not in process.stdout.readline():
        assert process.poll() is None
    (os.killpg if to_group else os.kill)(process.pid, number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == code
    assert "times asked: 1" in out
    assert f"STOPPED: exit code {code}" in rows_of(out.splitlines())[-1]


def test_after_a_stop_the_next_recipe_does_not_start(two, capfd):
    (two / "one" / "train.sh").write_text("#!/bin/sh\nkill -INT $PPID\nsleep 0.2\nexit 130\n")
    assert run_demos.main([], two) == 130
    assert "=== two" not in capfd.readouterr().out


def test_the_real_table_names_scripts_that_exist():
    for name, recipe in run_demos.RECIPES.items():
        assert (run_demos.ROOT / name / recipe.script).is_file()
