"""The recipes' own trainings on their smallest data: what is asked of all of them alike.

training = TRAININGS["arcface"](root)      # makes its data below `root`
run_here(training.main, training.words(root / "run"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from arcface.run_scripts import run_arcface
from face_distill import train_distill
from face_distill.demo_data import demo as faces_demo
from lavic.src import knowledge_distillation, prompt_tuning
from multimodal import run_training
from shared.files import read_json_lines
from tests import arcface_nano, lavic_nano, lavic_talks, multimodal_data, vase_filter_nano
from tests.harness import ROOT
from vasevqa.filter import model as quality_model

CLOCKS = ("time", "steps_per_s", "samples_per_s")


@dataclass(frozen=True)
class Training:
    """A training script and its flags on data that are made.

    place: the flag of where a run goes. inside: its run directory, seen from there. loss: its tag.
    """

    main: Callable[[list[str]], int]
    script: Path
    flags: list[object]
    place: str
    inside: str = "."
    loss: str = "loss"

    def words(self, place: Path, *more: object) -> list[object]:
        """What to type for a run into `place`; typed again it continues an interrupted one."""
        return [*self.flags, "--log-every", 1, "--resume", "auto", self.place, place, *more]

    def with_workers(self, number: int) -> list[object]:
        if "--config" in self.flags:
            return ["--cfg-options", f"train_dataloader.num_workers={number}"]
        return ["--workers", number]

    def run_dir(self, place: Path) -> Path:
        return place / self.inside


def _of(main: Callable[[list[str]], int], script: str, *rest: Any, **more: Any) -> Training:
    return Training(main, ROOT / script, *rest, **more)


FEW_FACES = {
    "NUM_PEOPLE": 5, "PICTURES_EACH": 4, "PEOPLE_A_FOLD": 2, "TEACHER_PEOPLE": 100,
    "PICTURES_OF_STRANGER": 4, "PAIRS_A_FOLD": 4,
}  # fmt: skip


def small_faces(root: Path, **changes: int) -> faces_demo.DemoPaths:
    """Five people of four pictures each, a tiny tower, and 24 pairs of strangers."""
    with mock.patch.multiple(faces_demo, **FEW_FACES | changes):
        return faces_demo.build(root)


def face_distill(root: Path) -> Training:
    """20 images, 4 a step, 6 epochs."""
    paths = small_faces(root)
    flags = [
        "--data-root", paths.data_root, "--blip-path", paths.weights, "--teacher-feat-dir",
        paths.teacher, "--batch-size", 4, "--epochs", 6, "--adapter-layers", "spread:2",
        "--workers", 0,
    ]  # fmt: skip
    script = "face_distill/train_distill.py"
    return _of(train_distill.main, script, flags, "--run-dir", loss="Loss/Total")


def arcface(root: Path) -> Training:
    """24 pictures, 6 a step, 3 epochs."""
    data = arcface_nano.build_inshop(root / "data")
    config = arcface_nano.write_config(root / "nano.py")
    flags = ["--config", config, "--data-root", data, "--seed", 1]
    return _of(run_arcface.main, "arcface/run_scripts/run_arcface.py", flags, "--work-dir")


def lavic_distillation(root: Path) -> Training:
    """20 samples, 4 a step, 4 epochs."""
    flags = lavic_nano.flags_of(lavic_nano.build_nano(root), root / "run")
    script = "lavic/src/knowledge_distillation.py"
    return _of(
        knowledge_distillation.main, script, [*flags, "--num_epochs", 4], "--output_dir",
        loss="train_loss",
    )  # fmt: skip


def lavic_tuning(_root: Path) -> Training:
    """3 steps an epoch, 5 epochs."""
    nano = lavic_talks.nano()
    flags = [*nano.flags(nano.root / "run"), "--num_epochs", 5]
    script = "lavic/src/prompt_tuning.py"
    return _of(prompt_tuning.main, script, flags, "--finetune_output_dir", loss="train_loss")


def multimodal(root: Path) -> Training:
    """Three stages of one epoch each, 33 steps in all, with dropout."""
    flags = [
        "--data-root", multimodal_data.build(root).data_root, "--model-size", "nano",
        "--batch-size", 4, "--gradient-accumulation-steps", 2, "--epochs", 3, "--workers", 0,
        "--clip-seconds", 1, "--init", "random", "--eval-batch-size", 8, "--no-use-checkpoint",
        "--dropout", 0.1,
    ]  # fmt: skip
    return _of(run_training.main, "multimodal/run_training.py", flags, "--output-dir")


def vasevqa_filter(root: Path) -> Training:
    """40 pictures, 4 a step, 3 epochs."""
    flags = [
        "--data_dir", vase_filter_nano.write_quality_set(root / "data", each=20),
        "--arch", "resnet10", "--image_size", 32, "--pretrained", "none", "--batch_size", 4,
        "--workers", 0, "--num_epochs", 3,
    ]  # fmt: skip
    script = "vasevqa/filter/model.py"
    return _of(quality_model.main, script, flags, "--output_dir", inside=".quality_model")


TRAININGS: dict[str, Callable[[Path], Training]] = {
    make.__name__: make
    for make in (
        *(face_distill, arcface, lavic_distillation, lavic_tuning, multimodal, vasevqa_filter),
    )
}


def records(run_dir: Path) -> list[dict[str, Any]]:
    """All that metrics.jsonl tells of a run, without times."""
    rows = read_json_lines(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


def tensors(content: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a file's content by its path in it."""
    if isinstance(content, torch.Tensor):
        return {name: content}
    items = content.items() if isinstance(content, dict) else ()
    return {at: t for key, value in items for at, t in tensors(value, f"{name}/{key}").items()}
