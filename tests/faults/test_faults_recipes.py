"""Rows 13 and 16 of the fault matrix in the recipes' own loops: full disks, NaN gradients."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from arcface.run_scripts import run_arcface
from face_distill import train_distill
from face_distill.demo_data import demo as faces
from lavic.src import knowledge_distillation
from multimodal import run_training
from shared import checkpoint, files
from shared.amp import Amp
from tests import arcface_nano, lavic_nano, multimodal_data, vase_filter_nano
from tests.harness import run_here
from vasevqa.filter import model


def arcface(root: Path) -> tuple[Any, list[object], Path]:
    data = arcface_nano.build_inshop(root / "data")
    config = arcface_nano.write_config(root / "nano.py")
    flags = ["--config", config, "--data-root", data, "--work-dir", root / "run"]
    return run_arcface.main, [*flags, "--save-every", 1], root / "run"


def lavic(root: Path) -> tuple[Any, list[object], Path]:
    flags = lavic_nano.flags_of(lavic_nano.build_nano(root / "nano"), root / "run")
    return knowledge_distillation.main, [*flags, "--save-every", 1], root / "run"


def multimodal(root: Path) -> tuple[Any, list[object], Path]:
    data = multimodal_data.build(root / "data").data_root
    flags = ["--data-root", data, "--output-dir", root / "run", "--model-size", "nano"]
    flags += ["--batch-size", 4, "--epochs", 3, "--workers", 0, "--clip-seconds", 1]
    flags += ["--init", "random"]
    return run_training.main, [*flags, "--save-every", 1, "--no-use-checkpoint"], root / "run"


def vasevqa(root: Path) -> tuple[Any, list[object], Path]:
    data = vase_filter_nano.write_quality_set(root / "data", each=12)
    flags = ["--data_dir", data, "--arch", "resnet10", "--image_size", 32, "--pretrained", "none"]
    flags += ["--batch_size", 4, "--workers", 0, "--save_every", 1, "--num_epochs", 2]
    return model.main, [*flags, "--output_dir", root / "run"], root / "run" / ".quality_model"


def face_distill(root: Path) -> tuple[Any, list[object], Path]:
    small = {"NUM_PEOPLE": 5, "PICTURES_EACH": 4, "PEOPLE_A_FOLD": 2, "TEACHER_PEOPLE": 100}
    with mock.patch.multiple(faces, **small, PICTURES_OF_STRANGER=4, PAIRS_A_FOLD=4):
        paths = faces.build(root / "faces")
    flags = ["--data-root", paths.data_root, "--blip-path", paths.weights, "--epochs", 2]
    flags += ["--teacher-feat-dir", paths.teacher, "--batch-size", 4, "--workers", 0]
    flags += ["--adapter-layers", "spread:2", "--run-dir", root / "run"]
    return train_distill.main, flags, root / "run"


@contextlib.contextmanager
def refused(*paths: Path) -> Iterator[None]:
    """The file system takes none of these files: their temporary names are directories."""
    places = [path.with_name(f"{path.name}.tmp.{os.getpid()}") for path in paths]
    for place in places:
        place.mkdir(parents=True)
    try:
        yield
    finally:
        for place in places:
            place.rmdir()


@pytest.mark.slow
@pytest.mark.limit(300)
@pytest.mark.parametrize("recipe", [face_distill, arcface, lavic, multimodal, vasevqa])
def test_fault_13_a_run_whose_last_save_failed_is_not_done(recipe, tmp_path):
    main, flags, run_dir = recipe(tmp_path)
    with refused(run_dir / "last.pt", run_dir / "last.pth"):
        outcome = run_here(main, flags)
    status = files.read_object(run_dir / "status.json")
    assert (outcome.code, status["state"], status["exit_code"]) == (1, "failed", 1), outcome.text
    assert "the checkpoint of step" in outcome.last_line and "was not written" in outcome.last_line
    assert "Traceback" not in outcome.text
    for path in run_dir.glob("epoch_*.pth"):  # from the state at hand: each is whole
        assert checkpoint.load(path)["position"]["batch"] == 0
    again = run_here(main, flags)
    assert again.code == 0, again.text
    assert files.read_object(run_dir / "status.json")["state"] == "done"


BESIDE = {
    face_distill: "best_student_adapter_face.pth",
    multimodal: "checkpoints/best_model.pt",
    vasevqa: "../best_image_quality_model.pth",
}


@pytest.mark.slow
@pytest.mark.limit(300)
@pytest.mark.parametrize("recipe", BESIDE)
def test_fault_13_a_file_beside_the_checkpoint_costs_a_warning(recipe, tmp_path):
    main, flags, run_dir = recipe(tmp_path)
    path = run_dir / BESIDE[recipe]
    with refused(path):
        outcome = run_here(main, flags)
    assert outcome.code == 0, outcome.text
    assert f"{path.name} was not written" in outcome.text
    assert "Traceback" not in outcome.text
    assert not path.exists()


def is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return all(map(is_finite, value)) if isinstance(value, list) else True


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [arcface, lavic, multimodal, vasevqa])
def test_fault_16_no_recipe_saves_a_step_that_is_not_finite(recipe, tmp_path, monkeypatch):
    """The third step on, one parameter's gradient is NaN: the run ends, its weights are whole."""
    main, flags, run_dir = recipe(tmp_path)
    step, taken = Amp.step, [0]

    def poisoned(amp: Amp, optimizer: Any, parameters: Any, **more: Any) -> float:
        parameters, taken[0] = list(parameters), taken[0] + 1
        if taken[0] > 2:
            next(p for p in parameters if p.grad is not None).grad.fill_(math.nan)
        return step(amp, optimizer, parameters, **more)

    monkeypatch.setattr(Amp, "step", poisoned)
    outcome = run_here(main, [*flags, "--max-bad-steps", 2])
    assert outcome.code == 1, outcome.text
    assert "not finite for 2 steps in a row" in outcome.last_line and taken == [4]
    assert outcome.text.count("this step is not applied") == 1
    saved = [*run_dir.glob("last.p*"), *run_dir.glob("*.pth")]
    assert saved, sorted(run_dir.iterdir())
    for path in saved:
        assert is_finite(torch.load(path, weights_only=True)["parts"]), path
