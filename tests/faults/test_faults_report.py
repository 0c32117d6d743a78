"""report.html of runs that end well, fail, are stopped or killed: there, true, and no burden."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from shared import report, run_directory
from shared.files import read_json
from tests.faults.probe_recipe import main
from tests.harness import PROBE, ROOT, run_here, start, wait_for_step
from tests.unit.test_page import Reader
from tests.unit.test_report import Tables

pytestmark = pytest.mark.serial
SHORT = ["--epochs", 1, "--num-points", 32]  # four steps of one process


def page_of(run_dir: Path) -> str:
    return (run_dir / report.NAME).read_text(encoding="utf-8")


def first_words(page: str) -> str:
    return Reader(page).texts["p"][0]


def test_a_run_that_ends_well_leaves_its_page(tmp_path):
    ended = run_here(main, [*SHORT, "--dropout", 0.25, "--run-dir", tmp_path])
    assert ended.code == 0 and ended.last_line.endswith("done: 4 steps (exit 0)")
    page, config = page_of(tmp_path), read_json(tmp_path / "config.json")
    assert first_words(page) == "Finished: 4 steps"
    tables = Tables(page)
    differing = tables.named("differs from the default", "value", "default")
    assert differing["dropout"] == ["0.25", "0.1"] and differing["epochs"] == ["1", "3"]
    assert (
        set(config["defaults"])
        == set(differing)
        == {*("dropout", "epochs", "num_points", "run_dir")}
    )
    assert tables.named("setting", "value")["dropout"] == [str(config["settings"]["dropout"])]
    assert tables.named("environment", "")["torch"] == [config["versions"]["torch"]]
    assert tables.named("environment", "")["cpu_cores"] == [str(config["environment"]["cpu_cores"])]


def test_a_run_that_breaks_leaves_its_page(tmp_path):
    ended = run_here(main, [*SHORT, "--fault", "raise@2", "--run-dir", tmp_path])
    assert ended.code == 1
    words = "Failed (exit code 1): ValueError: broken on purpose on rank 0, at step 2 of 4"
    assert first_words(page_of(tmp_path)) == words
    assert ended.last_line.endswith("at step 2 of 4 (exit 1)")


def test_a_stopped_run_leaves_its_page(tmp_path):
    ended = run_here(main, [*SHORT, "--fault", "term@2", "--run-dir", tmp_path])
    assert ended.code == 143
    assert first_words(page_of(tmp_path)).startswith("Stopped (exit code 143): SIGTERM: saved at")


@pytest.mark.slow
def test_of_several_processes_the_launcher_writes_the_page(tmp_path):
    words = [PROBE, *SHORT, "--nproc", 2, "--run-dir", tmp_path / "run"]
    with start(words) as running:
        assert running.finish().code == 0
    assert first_words(page_of(tmp_path / "run")) == "Finished: 2 steps"
    with start([*words, "--fault", "kill@2@1"]) as running:
        assert running.finish().code == 1
    words = "Failed (exit code 1): rank 1 was killed by SIGKILL"
    assert first_words(page_of(tmp_path / "run")).startswith(words)


@pytest.mark.slow
def test_a_stop_of_several_processes_leaves_the_page(tmp_path):
    words = [PROBE, "--epochs", 50, "--step-ms", 20, "--nproc", 2, "--run-dir", tmp_path]
    with start(words) as running:
        wait_for_step(tmp_path, 3, running)
        running.signal(signal.SIGTERM)
        assert running.finish().code == 143
    assert first_words(page_of(tmp_path)).startswith("Stopped (exit code 143): SIGTERM: saved at")


def test_a_foreign_program_gets_its_page(tmp_path):
    program = "import sys; print('trained'); sys.exit(3 if 'break' in sys.argv else 0)"
    launch = [ROOT / "shared" / "program.py", "--run-dir", tmp_path, "--recipe", "vasevqa", "--"]
    command = [sys.executable, "-c", program]
    with start([*launch, *command]) as running:
        assert running.finish().code == 0
    page = page_of(tmp_path)
    assert first_words(page).startswith("Finished: ") and f"vasevqa · {tmp_path.name}" in page
    with start([*launch, *command, "break"]) as running:
        assert running.finish().code == 3
    assert first_words(page_of(tmp_path)).startswith("Failed (exit code 3): ")


def test_a_page_that_cannot_be_made_is_one_warning_and_the_run_ends_as_it_did(tmp_path):
    (tmp_path / "report.html").mkdir()
    ended = run_here(main, [*SHORT, "--run-dir", tmp_path])
    assert ended.code == 0 and ended.last_line.endswith("done: 4 steps (exit 0)")
    assert ended.text.count("no report.html in") == 1 == ended.text.count("WARNING")


def test_a_mistake_before_the_run_leaves_no_page(tmp_path):
    assert run_here(main, ["--epochs", "many", "--run-dir", tmp_path / "run"]).code == 2
    assert not (tmp_path / "run").exists()


def test_a_page_alone_is_no_run_worth_keeping(tmp_path):
    (tmp_path / "status.json").write_text('{"schema": 1, "state": "failed"}')
    (tmp_path / "report.html").write_text("<html>")
    assert not run_directory.decide(tmp_path, "last.pt", "auto", {}, False).move_aside
