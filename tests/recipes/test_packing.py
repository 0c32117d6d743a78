"""The documented `tar` line packs all that going on, judging and using a run needs."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from face_distill import embed, train_distill
from face_distill.demo_data import demo
from shared.files import read_json, read_json_lines
from tests.harness import ROOT, Outcome, run_here, status_of
from tests.trainings import small_faces

EPOCHS = 3  # of 5 steps: 20 images, 4 a step
STOP_AT = 7  # in the middle of the second epoch


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> demo.DemoPaths:
    """Five people of four pictures each, a tiny tower, and 40 pairs of strangers."""
    return small_faces(tmp_path_factory.mktemp("faces"))


def train(faces: demo.DemoPaths, run_dir: Path, *extra: object) -> Outcome:
    return run_here(
        train_distill.main,
        [
            "--blip-path", faces.weights, "--data-root", faces.data_root,
            "--teacher-feat-dir", faces.teacher, "--verify", faces.pairs, "--batch-size", 4,
            "--epochs", EPOCHS, "--adapter-layers", "spread:2", "--workers", 0,
            "--log-every", 1, "--run-dir", run_dir, *extra,
        ],
    )  # fmt: skip


def recorded(run_dir: Path) -> list[dict[str, float]]:
    """Every row of metrics.jsonl, without what the clock says."""
    clock = ("time", "samples_per_s", "steps_per_s")
    return [
        {tag: value for tag, value in row.items() if tag not in clock}
        for row in read_json_lines(run_dir / "metrics.jsonl")
    ]


def pack(recipe: Path) -> Path:
    """Run the README's own line where the README says, and give the archive."""
    page = (ROOT / "face_distill" / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^tar .*$", page, re.M)
    assert line == "tar -czvf training_results.tar.gz checkpoints/ logs/"
    subprocess.run(shlex.split(line), cwd=recipe, check=True, capture_output=True)
    return recipe / "training_results.tar.gz"


@pytest.fixture(scope="module")
def undisturbed(faces, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "checkpoints"
    assert train(faces, run_dir).code == 0
    return run_dir


@pytest.fixture(scope="module")
def packed(faces, tmp_path_factory) -> Path:
    """The archive of a run that a SIGTERM stopped at STOP_AT; the run itself is gone."""
    recipe = tmp_path_factory.mktemp("recipe")
    run_dir = recipe / "checkpoints"

    def stop(*_):
        if max((row["step"] for row in recorded(run_dir)), default=0) == STOP_AT - 1:
            signal.raise_signal(signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    outcome = train(faces, run_dir)
    hook.remove()
    assert outcome.code == 143, outcome.text
    assert status_of(run_dir)["step"] == STOP_AT
    archive = pack(recipe)
    run_dir.rename(recipe / "out of reach")
    (recipe / "logs").rename(recipe / "also out of reach")
    return archive


@pytest.fixture(scope="module")
def unpacked(packed, tmp_path_factory) -> Path:
    """`checkpoints/` on the other machine."""
    machine = tmp_path_factory.mktemp("machine")
    subprocess.run(["tar", "-xzf", packed], cwd=machine, check=True)
    return machine / "checkpoints"


def events_of(run_dir: Path) -> set[str]:
    folder = run_dir.parent / "logs" / "adapter_face_distill"
    return {path.name for path in folder.glob("events.out.tfevents*")}


@pytest.fixture(scope="module")
def continued(faces, unpacked) -> tuple[Outcome, set[str]]:
    """The same command on the unpacked run, and the events that were unpacked."""
    before = events_of(unpacked)
    return train(faces, unpacked), before


def test_an_unpacked_run_continues_as_if_nothing_had_happened(undisturbed, unpacked, continued):
    outcome, _ = continued
    assert outcome.code == 0, outcome.text
    assert f"continuing from {unpacked}/last.pth at step {STOP_AT} of 15" in outcome.text
    assert recorded(unpacked) == recorded(undisturbed)
    assert {row["step"] for row in recorded(unpacked) if "Loss/Total" in row} == {*range(1, 16)}
    assert (unpacked / "best_student_adapter_face.pth").is_file()
    note, whole = (read_json(path / "verification.json") for path in (unpacked, undisturbed))
    assert note == whole and note["after"] is not None


def test_tensorboard_finds_the_unpacked_events_and_the_continued_ones(unpacked, continued):
    _, before = continued
    assert before and events_of(unpacked) > before


def test_the_unpacked_best_student_embeds(faces, unpacked, continued, tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (112, 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    words = [folder, "--checkpoint", unpacked, "--out", tmp_path / "e.npy"]
    outcome = run_here(embed.main, [*words, "--blip-path", faces.weights])
    assert outcome.code == 0, outcome.text
    assert np.load(tmp_path / "e.npy").shape == (3, 64)
