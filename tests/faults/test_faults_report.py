"""report.html of runs that end well, fail, are stopped or killed: there, true, and no burden."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shared import report, run_directory
from shared.files import read_json
from tests.faults.probe_recipe import main
from tests.harness import ROOT, run_here, run_to_end
from tests.unit.test_page import Reader
from tests.unit.test_report import Tables

pytestmark = pytest.mark.serial
SHORT = ["--epochs", 1, "--num-points", 32]  # four steps of one process


def page_of(run_dir: Path) -> str:
    return (run_dir / report.NAME).read_text(encoding="utf-8")


def first_words(run_dir: Path) -> str:
    """How the page of a run says that it ended."""
    return Reader(page_of(run_dir)).texts["p"][0]


def test_a_run_that_ends_well_leaves_its_page(tmp_path):
    words = [*SHORT, "--dropout", 0.25, "--run-dir", tmp_path]
    ended = run_here(main, words, with_page=True)
    assert ended.code == 0 and ended.last_line.endswith("done: 4 steps (exit 0)")
    page, config = page_of(tmp_path), read_json(tmp_path / "config.json")
    assert first_words(tmp_path) == "Finished: 4 steps"
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


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise", "Failed (exit code 1): ValueError: broken on purpose on rank 0, at step 2 of 4"),
        ("term", "Stopped (exit code 143): SIGTERM: saved at step 2 of 4"),
    ],
)
def test_a_run_that_breaks_or_is_stopped_leaves_its_page(tmp_path, fault, said):
    """Of several processes the launcher writes it: rows 4 and 6 in test_faults_processes.py."""
    words = [*SHORT, "--fault", f"{fault}@2", "--run-dir", tmp_path]
    assert run_here(main, words, with_page=True).code > 0
    assert first_words(tmp_path).startswith(said)


def test_a_foreign_program_gets_its_page(tmp_path):
    program = "import sys; print('trained'); sys.exit(3 if 'break' in sys.argv else 0)"
    launch = [ROOT / "shared" / "program.py", "--run-dir", tmp_path, "--recipe", "vasevqa", "--"]
    command = [sys.executable, "-c", program]
    assert run_to_end([*launch, *command]).code == 0
    assert first_words(tmp_path).startswith("Finished: ")
    assert f"vasevqa · {tmp_path.name}" in page_of(tmp_path)
    assert run_to_end([*launch, *command, "break"]).code == 3
    assert first_words(tmp_path).startswith("Failed (exit code 3): ")


def test_a_page_that_cannot_be_made_is_one_warning_and_the_run_ends_as_it_did(tmp_path):
    (tmp_path / "report.html").mkdir()
    ended = run_here(main, [*SHORT, "--run-dir", tmp_path], with_page=True)
    assert ended.code == 0 and ended.last_line.endswith("done: 4 steps (exit 0)")
    assert ended.text.count("no report.html in") == 1 == ended.text.count("WARNING")


def test_a_page_alone_is_no_run_worth_keeping(tmp_path):
    (tmp_path / "status.json").write_text('{"schema": 1, "state": "failed"}')
    (tmp_path / "report.html").write_text("<html>")
    assert not run_directory.decide(tmp_path, "last.pt", "auto", {}, False).move_aside
