"""--run-dir: what is no run's is never moved; a run that fails early is seen, too."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.harness import PROBE, ROOT, start, status_of, wait_for_step, wait_until

pytestmark = [pytest.mark.serial, pytest.mark.slow]
MONITOR = ROOT / "shared" / "tools" / "monitor.py"
SCRIPTS = {  # script → the flag of its run directory
    "face_distill/train_distill.py": "--run-dir",
    "face_distill/extract_teacher.py": "--out",
    "lavic/src/knowledge_distillation.py": "--output_dir",
    "lavic/src/prompt_tuning.py": "--finetune_output_dir",
    "vasevqa/filter/model.py": "--output_dir",
    "vasevqa/filter/clipfilter1.py": "--run-dir",
    "multimodal/run_training.py": "--output_dir",
    "arcface/run_scripts/run_arcface.py": "--work-dir",
}


def contents(directory: Path) -> dict[str, str]:
    """Path → text of every file below a directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_text() for path in files}


def train(run_dir: Path, *words: object) -> tuple[int, str]:
    with start([PROBE, "--epochs", 1, "--run-dir", run_dir, *words]) as running:
        outcome = running.finish()
    return outcome.code, outcome.text


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_empty_path_is_refused_and_moves_nothing(tmp_path, script):
    flag = SCRIPTS[script]
    words = [f"{flag}="] if script.startswith("arcface") else [flag, ""]
    here = tmp_path / "work"
    here.mkdir()
    (here / "thesis.tex").write_text("a year's work")
    command = [sys.executable, ROOT / script, *words]
    with start(["-c", 'cd "$1" && shift && exec "$@"', "-", here, *command], program=["bash"]) as r:
        outcome = r.finish()
    assert (outcome.code, outcome.text.count("\n")) == (2, 1)
    named = outcome.text.replace("_", "-")  # as typed, or as the setting's name
    assert flag.lstrip("-").replace("_", "-") in named and "empty" in outcome.text
    assert contents(tmp_path) == {"work/thesis.tex": "a year's work"}


def test_an_empty_output_dir_is_refused_by_swifts_stages(tmp_path):
    (tmp_path / "thesis.tex").write_text("a year's work")
    for script in ("sft.sh", "merge.sh"):
        path = ROOT / "vasevqa" / "model" / script
        line = f'cd "{tmp_path}" && exec bash "{path}" --output_dir "" --dry-run'
        with start(["-c", line], program=["bash"], PYTHON=sys.executable) as running:
            outcome = running.finish()
        assert outcome.code == 2, outcome.text
        assert "--output_dir is empty" in outcome.last_line
    assert contents(tmp_path) == {"thesis.tex": "a year's work"}


def test_a_directory_with_other_content_is_used_without_moving_anything(tmp_path):
    run_dir = tmp_path / "work"
    (run_dir / ".git").mkdir(parents=True)
    others = {"thesis.tex": "a year's work", ".git/HEAD": "ref: refs/heads/main"}
    for name, text in others.items():
        (run_dir / name).write_text(text)
    for _ in range(2):  # the second start moves the first one's run aside
        assert train(run_dir)[0] == 0
        assert {name: contents_of(run_dir / name) for name in others} == others
    (run_dir / "notes.txt").write_text("written after the run")
    assert train(run_dir, "--resume", "never")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"work", "work.1", "work.2"}
    for aside in ("work.1", "work.2"):
        names = {path.name for path in (tmp_path / aside).iterdir()}
        assert names >= {"status.json", "config.json", "metrics.jsonl", "last.pt", "tensorboard"}
        assert not names & {"thesis.tex", ".git", "notes.txt", "run.lock"}
    assert contents_of(run_dir / "notes.txt") == "written after the run"


def contents_of(path: Path) -> str:
    return path.read_text()


def test_a_models_folder_is_not_written_over(tmp_path):
    config = {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, text = train(tmp_path)
    assert code == 2
    assert f"{tmp_path} holds config.json and no run of this toolkit" in text
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_a_run_that_fails_before_its_first_step_is_seen(tmp_path):
    run_dir = tmp_path / "run"
    code, _ = train(run_dir, "--fault", "raise@0")
    status = status_of(run_dir)
    assert (code, status["state"], status["exit_code"], status["step"]) == (1, "failed", 1, 0)
    assert "broken on purpose" in status["reason"]
    assert "broken on purpose" in (run_dir / "report.html").read_text()
    with start([MONITOR, run_dir]) as watching:
        seen = watching.finish(timeout=60)
    assert (seen.code, seen.text.splitlines()[0]) == (1, "probe: FAILED (exit 1)")
    assert train(run_dir)[0] == 0  # in the same place: there was nothing worth keeping
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_while_models_are_loaded_ends_at_once(tmp_path, ranks, number, code):
    run_dir = tmp_path / "run"
    args = [PROBE, "--nproc", ranks, "--run-dir", run_dir, "--fault", "hang@0"]
    with start(args) as running:
        wait_until((run_dir / "status.json").exists, "the run to begin", running=running)
        with start([MONITOR, run_dir, "--json"]) as watching:
            seen = json.loads(watching.finish(timeout=60).text)
        running.signal(number)
        outcome = running.finish(timeout=60)
        assert running.leaves_nothing()
    assert (seen["state"], seen["reason"]) == ("running", "models and data are being loaded")
    assert outcome.code == code
    assert outcome.last_line.endswith(f"{number.name} before the first step (exit {code})")
    assert status_of(run_dir)["state"] == "stopped"


def test_what_a_stopped_run_says_continues_it(tmp_path):
    for flags, says in (([], "the same command continues it"),
                        (["--resume", "never"], "the same command with --resume auto continues it"),
                        ):  # fmt: skip
        run_dir = tmp_path / f"run{len(flags)}"
        args = [PROBE, "--epochs", 2, "--step-ms", 50, "--run-dir", run_dir, *flags]
        with start(args) as running:
            wait_for_step(run_dir, 2, running)
            running.signal(signal.SIGTERM)
            outcome = running.finish()
        assert says in outcome.last_line
        again = [*args, *(["--resume", "auto"] if flags else [])]
        with start(again) as running:
            assert "continuing from" in running.finish().text
