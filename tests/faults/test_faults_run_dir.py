"""--run-dir: what is no run's is never moved; a run that fails early is seen, too."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from pathlib import Path

import pytest

from tests.faults import probe_recipe
from tests.harness import PROBE, ROOT, Outcome, run_here, run_to_end, start, status_of, wait_until

pytestmark = [pytest.mark.serial, pytest.mark.slow]
MONITOR = ROOT / "shared" / "tools" / "monitor.py"
SCRIPTS = {  # script → the flag of its run directory
    "face_distill.train_distill": "--run-dir",
    "face_distill.extract_teacher": "--out",
    "lavic.src.knowledge_distillation": "--output_dir",
    "lavic.src.prompt_tuning": "--finetune_output_dir",
    "vasevqa.filter.model": "--output_dir",
    "vasevqa.filter.clipfilter1": "--run-dir",
    "multimodal.run_training": "--output_dir",
    "arcface.run_scripts.run_arcface": "--work-dir",
}


def contents(directory: Path) -> dict[str, str]:
    """Path → text of every file below a directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_text() for path in files}


def train(run_dir: Path, *words: object) -> Outcome:
    return run_here(probe_recipe.main, ["--epochs", 1, "--run-dir", run_dir, *words])


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_empty_path_is_refused_and_moves_nothing(tmp_path, monkeypatch, script):
    flag = SCRIPTS[script]
    words = [f"{flag}="] if script.startswith("arcface") else [flag, ""]
    (tmp_path / "thesis.tex").write_text("a year's work")
    monkeypatch.chdir(tmp_path)
    outcome = run_here(importlib.import_module(script).main, words)
    assert (outcome.code, outcome.text.count("\n")) == (2, 1)
    named = outcome.text.replace("_", "-")  # as typed, or as the setting's name
    assert flag.lstrip("-").replace("_", "-") in named and "empty" in outcome.text
    assert contents(tmp_path) == {"thesis.tex": "a year's work"}


def test_an_empty_output_dir_is_refused_by_swifts_stages(tmp_path):
    (tmp_path / "thesis.tex").write_text("a year's work")
    for script in ("sft.sh", "merge.sh"):
        path = ROOT / "vasevqa" / "model" / script
        line = f'cd "{tmp_path}" && exec bash "{path}" --output_dir "" --dry-run'
        outcome = run_to_end(["-c", line], program=["bash"], PYTHON=sys.executable)
        assert outcome.code == 2, outcome.text
        assert "--output_dir is empty" in outcome.last_line
    assert contents(tmp_path) == {"thesis.tex": "a year's work"}


def test_a_directory_with_other_content_is_used_without_moving_anything(tmp_path):
    run_dir = tmp_path / "work"
    (run_dir / ".git").mkdir(parents=True)
    others = {"thesis.tex": "a year's work", ".git/HEAD": "ref: refs/heads/main"}
    for name, text in others.items():
        (run_dir / name).write_text(text)
    for words in ([], [], ["--resume", "never"]):  # each moves the run before it aside
        assert train(run_dir, *words).code == 0
        assert {name: (run_dir / name).read_text() for name in others} == others
        (run_dir / "notes.txt").write_text("written after the run")
    assert {path.name for path in tmp_path.iterdir()} == {"work", "work.1", "work.2"}
    for aside in ("work.1", "work.2"):
        names = {path.name for path in (tmp_path / aside).iterdir()}
        assert names >= {"status.json", "config.json", "metrics.jsonl", "last.pt", "tensorboard"}
        assert not names & {"thesis.tex", ".git", "notes.txt", "run.lock"}


def test_a_models_folder_is_not_written_over(tmp_path):
    config = {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = train(tmp_path)
    assert outcome.code == 2
    assert f"{tmp_path} holds config.json and no run of this toolkit" in outcome.text
    assert json.loads((tmp_path / "config.json").read_text()) == config


def seen(run_dir: Path, *words: object) -> Outcome:
    return run_to_end([MONITOR, run_dir, *words])


def test_a_run_that_fails_before_its_first_step_is_seen(tmp_path):
    run_dir = tmp_path / "run"
    outcome, status = train(run_dir, "--fault", "raise@0"), status_of(run_dir)
    assert (outcome.code, status["state"], status["exit_code"]) == (1, "failed", 1)
    assert status["step"] == 0 and "broken on purpose" in status["reason"]
    watched = seen(run_dir)
    assert (watched.code, watched.text.splitlines()[0]) == (1, "probe: FAILED (exit 1)")
    assert train(run_dir).code == 0  # in the same place: there was nothing worth keeping
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("ranks", "number", "code"), [(1, signal.SIGINT, 130), (2, signal.SIGTERM, 143)]
)
def test_a_stop_while_models_are_loaded_ends_at_once(tmp_path, ranks, number, code):
    run_dir = tmp_path / "run"
    args = [PROBE, "--nproc", ranks, "--run-dir", run_dir, "--fault", "hang@0"]
    with start(args) as running:
        wait_until((run_dir / "status.json").exists, "the run to begin", running=running)
        view = json.loads(seen(run_dir, "--json").text)
        running.signal(number)
        outcome = running.finish(timeout=60)
        assert running.leaves_nothing()
    assert (view["state"], view["reason"]) == ("running", "models and data are being loaded")
    assert outcome.code == code
    assert outcome.last_line.endswith(f"{number.name} before the first step (exit {code})")
    assert status_of(run_dir)["state"] == "stopped"


@pytest.mark.parametrize(
    ("flags", "again", "says"),
    [
        ([], [], "the same command continues it"),
        (
            ["--resume", "never"],
            ["--resume", "auto"],
            "the same command with --resume auto continues it",
        ),
    ],
)
def test_what_a_stopped_run_says_continues_it(tmp_path, flags, again, says):
    assert says in train(tmp_path, *flags, "--fault", "term@2").last_line
    assert "continuing from" in train(tmp_path, *again).text
