"""--prove: what a training must keep, tried by real processes; planted faults are found."""

import json
import re
import shutil
import sys

import pytest

from shared import prove as proving
from shared.config import parse
from shared.files import read_json
from tests.faults import probe_recipe
from tests.harness import PROBE, ROOT, run_here, start, status_of
from tests.lavic_talks import nano
from tests.trainings import TRAININGS

pytestmark = [pytest.mark.slow, pytest.mark.limit(300)]

# (file, what stands there, what a fault makes of it, the case that finds it)
FAULTS = {
    "a loss scaled by rank": (
        "tests/faults/probe_training.py",
        "amp.backward(loss)",
        "amp.backward(loss * (1 + world.rank))",
        "one = 2 processes",
    ),
    "a generator that is not restored": (
        "shared/run_directory.py",
        'seed.set_state(state["generators"][rank])',
        "pass",
        "resumed = uninterrupted",
    ),
    "gradients that are not averaged": (
        "shared/distributed.py",
        "    if world.size == 1:\n        return model\n    ids",
        "    return model\n    ids",
        "one = 2 processes",
    ),
    "an optimizer that is not saved": (
        "tests/faults/probe_training.py",
        '"optimizer": optimizer, ',
        "",
        "resumed = uninterrupted",
    ),
}
OFTEN = ("a loss scaled by rank", "a generator that is not restored")


def prove(script, *args, patience=280.0):
    """(exit code, text) of the script with --prove."""
    with start([script, *args, "--prove"]) as running:
        outcome = running.finish(patience)
        assert running.leaves_nothing()
    return outcome


def rows(run_dir):
    proof = read_json(run_dir / "proof.json")
    return proof["holds"], {row["case"]: row for row in proof["cases"]}


def test_a_sound_training_holds_and_leaves_the_run_that_is_there_alone(tmp_path):
    assert run_here(probe_recipe.main, ["--run-dir", tmp_path, "--stop-after", 2]).code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    outcome = prove(PROBE, "--run-dir", tmp_path)
    assert outcome.code == 0, outcome.text
    assert "every case holds; the figures are in" in outcome.last_line
    holds, found = rows(tmp_path)
    assert holds and list(found) == ["one = 2 processes", "resumed = uninterrupted"]
    assert 0 < found["one = 2 processes"]["losses"] < 1e-5  # other sums: not the same run twice
    assert found["resumed = uninterrupted"]["optimizer"] == 0
    assert {path: path.read_bytes() for path in before} == before
    assert status_of(tmp_path)["state"] == "stopped" and not (tmp_path / "prove").exists()


@pytest.mark.parametrize(
    "planted",
    [OFTEN, pytest.param([name for name in FAULTS if name not in OFTEN], marks=pytest.mark.full)],
)
def test_planted_faults_are_found_each_by_its_case(tmp_path, planted):
    left_out = shutil.ignore_patterns("__pycache__", "docs", "ddp_series", "shell")
    shutil.copytree(ROOT / "shared", tmp_path / "shared", ignore=left_out)
    (tmp_path / "tests" / "faults").mkdir(parents=True)
    for name in ("probe_recipe.py", "probe_training.py"):
        shutil.copy(PROBE.with_name(name), tmp_path / "tests" / "faults" / name)
    for file, there, instead, _ in (FAULTS[name] for name in planted):
        text = (tmp_path / file).read_text()
        assert text.count(there) == 1
        (tmp_path / file).write_text(text.replace(there, instead))
    run_dir = tmp_path / "run"
    outcome = prove(tmp_path / "tests" / "faults" / "probe_recipe.py", "--run-dir", run_dir)
    assert outcome.code == 1, outcome.text
    assert "not every case holds" in outcome.last_line and "OUT OF BOUNDS" in outcome.text
    holds, found = rows(run_dir)
    assert not holds
    finders = [FAULTS[name][3] for name in planted]
    assert [name for name, row in found.items() if not row["holds"]] == finders
    assert (run_dir / "prove" / "log.txt").stat().st_size  # kept, to be looked into


def test_a_side_that_does_not_train_fails_the_proof_with_its_last_line(tmp_path):
    outcome = prove(PROBE, "--run-dir", tmp_path / "run", "--fault", "raise@2")
    assert outcome.code == 1
    assert "FAILED: exit 1" in outcome.text and "broken on purpose" in outcome.text


@pytest.mark.parametrize("more", [["--nnodes", 2], ["--resume", "run"]])
def test_where_it_cannot_start_the_processes_it_says_so(tmp_path, more, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps({"settings": {}}))
    outcome = run_here(probe_recipe.main, ["--run-dir", run_dir, *more, "--prove"])
    assert outcome.code == 2 and "--prove starts its processes itself" in outcome.last_line


@pytest.mark.parametrize("name", TRAININGS)
def test_every_training_has_cases_of_flags_that_it_takes(name, tmp_path, monkeypatch):
    """What comes of them on the demos is in the full tier."""
    training = TRAININGS[name](tmp_path)
    tried = []
    monkeypatch.setattr(proving, "prove", lambda *given: tried.extend(given[3]) or 0)
    words = [*training.flags, training.place, tmp_path / "run"]
    outcome = run_here(training.main, [*words, "--prove"])
    assert outcome.code == 0, outcome.text
    assert len(tried) == 4
    config = sys.modules[training.main.__module__].Config
    for case in (case for case in tried if not case.why_not):
        one, other = (
            parse(config, [str(word) for word in (*words, *side)])
            for side in (case.one, case.other)
        )
        assert one != other, case.name


@pytest.mark.full
def test_prompt_tunings_ways_to_take_a_step_agree(tmp_path):
    words = nano().flags(tmp_path / "replaced", tmp_path / "cache")
    script = ROOT / "lavic" / "src" / "prompt_tuning.py"
    outcome = prove(script, *words, "--run-dir", tmp_path / "run")
    assert outcome.code == 0, outcome.text
    holds, found = rows(tmp_path / "run")
    assert holds and len(found) == 5


DEMOS = (
    *("face_distill/train_distill.py", "lavic/src/knowledge_distillation.py"),
    *("vasevqa/filter/model.py", "multimodal/run_training.py"),
    "arcface/run_scripts/run_arcface.py",
)


@pytest.mark.full
@pytest.mark.limit(900)
@pytest.mark.parametrize("script", DEMOS)
def test_a_demo_holds(script, tmp_path):
    outcome = prove(ROOT / script, "--demo", "--run-dir", tmp_path / "run", patience=880.0)
    assert outcome.code == 0, outcome.text
    holds, found = rows(tmp_path / "run")
    assert holds and len(found) >= 4
    assert len(re.findall(r"  ok$", outcome.text, re.M)) >= 2
