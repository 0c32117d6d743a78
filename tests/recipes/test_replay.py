"""--replay: a step of a run, reconstructed to the bit, on a page."""

import re
import shutil
from functools import cache

import pytest
import torch

from shared.files import read_json_lines
from tests.harness import run_here, status_of
from tests.trainings import CLOCKS, TRAININGS

OFTEN = ("face_distill", "lavic_distillation", "multimodal")
NAMES = [n if n in OFTEN else pytest.param(n, marks=pytest.mark.full) for n in TRAININGS]
# of a step, where it is not 4; of stage 2 each forward pass is one
SAMPLES = {"multimodal": 8, "arcface": 6, "lavic_tuning": 1}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As a run of its own has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """By the training's name its script's main, flags and run directory, of one run for all tests.

    It was saved every 4 steps, and stopped at step 6; face_distill's epochs have 5.
    """

    @cache
    def trained(name):
        root = tmp_path_factory.mktemp(name)
        training = TRAININGS[name](root)
        flags = [*training.words(root / "out"), "--save-every", 4, "--keep", 9]
        outcome = run_here(training.main, [*flags, "--stop-after", 6])
        assert outcome.code == 0, outcome.text
        assert "--stop-after 6: saved at step 6" in outcome.text
        run_dir = training.run_dir(root / "out")
        assert status_of(run_dir)["state"] == "stopped"
        return training.main, flags, run_dir

    return trained


def content(run_dir):
    """The run's own files: name → bytes."""
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}


def logged(run_dir, step):
    """What the run's metrics have of a step, but for the times."""
    rows = [row for row in read_json_lines(run_dir / "metrics.jsonl") if row["split"] == "train"]
    (row,) = (row for row in rows if row["step"] == step)
    return {name: value for name, value in row.items() if name not in CLOCKS}


def replayed(run, step, begins_at):
    """The page of a step that is trained once more and has the logged loss; the run is as it was.

    begins_at: the step of the checkpoint that it begins at, None for the beginning.
    """
    main, flags, run_dir = run
    before = content(run_dir)
    outcome = run_here(main, [*flags, "--replay", step])
    assert outcome.code == 0, outcome.text
    assert "as logged to the bit" in outcome.last_line
    assert ("continuing from" in outcome.text) == (begins_at is not None)
    assert begins_at is None or f"at step {begins_at} of" in outcome.text
    assert content(run_dir) == before
    there = run_dir / f"replay_{step}"
    assert logged(there, step) == logged(run_dir, step)
    assert not list(there.glob("last*"))
    return (there / "replay.html").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_replayed_loss_is_the_logged_one_to_the_bit(stopped, name):
    page = replayed(stopped(name), 5, begins_at=4)
    assert "gradients of" in page and "norm before clipping" in page
    samples = int(re.search(r"The (\d+) samples, the highest loss first", page)[1])
    assert samples == SAMPLES.get(name, 4)
    without = ("multimodal", "lavic_tuning")  # not every sample has a picture
    assert page.count("data:image/png") == samples or name in without


def test_a_step_before_every_checkpoint_is_replayed_from_the_beginning(stopped):
    replayed(stopped("face_distill"), 3, begins_at=None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--replay", 7], "has 6 steps so far"),
        (["--replay", 0], "replay must be a whole number from 1"),
        (["--replay", 3, "--nproc", 2], "the run has 1 process(es): type --nproc 1"),
        (["--replay", 3, "--seed", 9], "has other settings (seed: "),
        (["--replay", 3, "--run-dir", "/nowhere/run"], "/nowhere/run holds no run"),
    ],
)
def test_what_cannot_be_replayed_is_refused(stopped, more, said):
    main, flags, run_dir = stopped("face_distill")
    before = content(run_dir)
    outcome = run_here(main, [*flags, *more])
    assert outcome.code == 2 and said in outcome.last_line, outcome.text
    assert content(run_dir) == before and not (run_dir / "replay_7").exists()


def test_the_runs_own_settings_are_taken_from_its_directory(stopped, tmp_path):
    main, _, run_dir = stopped("face_distill")
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    outcome = run_here(main, ["--resume", copy, "--replay", 6])
    assert outcome.code == 0, outcome.text
    assert "as logged to the bit" in outcome.last_line
    assert (copy / "replay_6" / "replay.html").is_file()
