"""--replay: a step of a run, reconstructed to the bit, on a page."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from arcface.run_scripts import run_arcface
from face_distill import train_distill
from lavic.src import knowledge_distillation, prompt_tuning
from multimodal import run_training
from shared.files import read_json_lines
from tests import multimodal_data
from tests.arcface_nano import build_inshop, write_config
from tests.harness import run_here, status_of
from tests.lavic_nano import build_nano, flags_of
from tests.lavic_talks import nano
from tests.recipes.test_face_distill import faces as drawn_faces  # noqa: F401  a fixture
from tests.vase_filter_nano import write_quality_set
from vasevqa.filter import model as quality_model

# 20 images or samples, 4 a step: five steps an epoch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As a run of its own has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def face_flags(request):
    faces = request.getfixturevalue("drawn_faces")
    return train_distill.main, [
        "--blip-path", faces.weights, "--data-root", faces.data_root,
        "--teacher-feat-dir", faces.teacher, "--batch-size", 4, "--epochs", 3,
        "--adapter-layers", "spread:2", "--workers", 0,
    ]  # fmt: skip


def lavic_flags(request):
    drawn = build_nano(request.getfixturevalue("tmp_path_factory").mktemp("nano"))
    return knowledge_distillation.main, [*flags_of(drawn, Path("replaced")), "--num_epochs", 3]


def multimodal_flags(request):
    root = request.getfixturevalue("tmp_path_factory").mktemp("multimodal")
    data = multimodal_data.build(root).data_root
    return run_training.main, [
        "--data-root", data, "--model-size", "nano", "--batch-size", 4, "--epochs", 3,
        "--gradient-accumulation-steps", 2, "--workers", 0, "--clip-seconds", 1, "--init", "random",
        "--eval-batch-size", 8, "--no-use-checkpoint",
    ]  # fmt: skip


def arcface_flags(request):
    root = request.getfixturevalue("tmp_path_factory").mktemp("arcface")
    config = write_config(root / "nano.py")
    inshop = build_inshop(root)
    return run_arcface.main, ["--config", config, "--data-root", inshop, "--seed", 1]


def quality_flags(request):
    root = request.getfixturevalue("tmp_path_factory").mktemp("quality")
    data = write_quality_set(root / "images2", each=20)
    return quality_model.main, [
        "--arch", "resnet10", "--image_size", 32, "--pretrained", "none", "--workers", 0,
        "--data_dir", data, "--output_dir", root / "out", "--batch_size", 4, "--num_epochs", 3,
    ]  # fmt: skip


def tuning_flags(request):
    root = request.getfixturevalue("tmp_path_factory").mktemp("tuning")
    return prompt_tuning.main, [
        *nano().flags(root / "replaced", root / "cache"), "--num_epochs", 3, "--no-evaluate-before",
        "--batch_size", 4,
    ]  # fmt: skip


RECIPES = {"face_distill": face_flags, "lavic": lavic_flags, "multimodal": multimodal_flags}
MORE = {"arcface": arcface_flags, "vasevqa": quality_flags, "lavic, stage 2": tuning_flags}


@pytest.fixture(
    scope="module",
    params=[*RECIPES, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)],
)
def run(request, tmp_path_factory):
    """(main, flags, run directory): a run that was saved every 4 steps, and stopped at step 12."""
    main, flags = (RECIPES | MORE)[request.param](request)
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    flags = [*flags, "--run-dir", run_dir, "--log-every", 1, "--save-every", 4, "--keep", 9]
    outcome = run_here(main, [*flags, "--stop-after", 12])
    assert outcome.code == 0, outcome.text
    assert "--stop-after 12: saved at step 12" in outcome.text
    assert status_of(run_dir)["state"] == "stopped"
    return main, flags, run_dir


def content(run_dir):
    """The run's own files: name → bytes."""
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}


# of a step, where it is not 4; of stage 2 each forward pass is one
SAMPLES = {run_training.main: 8, run_arcface.main: 6, prompt_tuning.main: 1}


def logged(run_dir, step):
    """What the run's metrics have of a step, but for the times."""
    rows = [row for row in read_json_lines(run_dir / "metrics.jsonl") if row["split"] == "train"]
    timed = ("time", "steps_per_s", "samples_per_s")
    (row,) = (row for row in rows if row["step"] == step)
    return {name: value for name, value in row.items() if name not in timed}


# from the checkpoint of step 4; from before every checkpoint; in another epoch than the checkpoint
@pytest.mark.parametrize(("step", "begins_at"), [(5, 4), (3, None)])
def test_the_replayed_loss_is_the_logged_one_to_the_bit(run, step, begins_at):
    main, flags, run_dir = run
    before = content(run_dir)
    outcome = run_here(main, [*flags, "--replay", step])
    assert outcome.code == 0, outcome.text
    assert "as logged to the bit" in outcome.last_line
    assert ("continuing from" in outcome.text) == (begins_at is not None)
    if begins_at:
        assert f"at step {begins_at} of" in outcome.text
    assert content(run_dir) == before
    there = run_dir / f"replay_{step}"
    assert logged(there, step) == logged(run_dir, step)
    assert not list(there.glob("last*"))
    page = (there / "replay.html").read_text()
    assert "gradients of" in page and "norm before clipping" in page
    samples = int(re.search(r"The (\d+) samples, the highest loss first", page)[1])
    assert samples == SAMPLES.get(main, 4)
    without = (run_training.main, prompt_tuning.main)  # not every sample has a picture
    assert page.count("data:image/png") == samples or main in without


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--replay", 13], "has 12 steps so far"),
        (["--replay", 0], "replay must be a whole number from 1"),
        (["--replay", 3, "--nproc", 2], "the run has 1 process(es): type --nproc 1"),
        (["--replay", 3, "--seed", 9], "has other settings (seed: "),
        (["--replay", 3, "--run-dir", "/nowhere/run"], "/nowhere/run holds no run"),
    ],
)
def test_what_cannot_be_replayed_is_refused(run, more, said):
    main, flags, run_dir = run
    before = content(run_dir)
    outcome = run_here(main, [*flags, *more])
    assert outcome.code == 2 and said in outcome.last_line, outcome.text
    assert content(run_dir) == before and not (run_dir / "replay_13").exists()


def test_the_runs_own_settings_are_taken_from_its_directory(run, tmp_path):
    main, _, run_dir = run
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    outcome = run_here(main, ["--resume", copy, "--replay", 6])
    assert outcome.code == 0, outcome.text
    assert "as logged to the bit" in outcome.last_line
    assert (copy / "replay_6" / "replay.html").is_file()
