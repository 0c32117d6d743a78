"""The lavic demo at nano size: its formats and checkpoint, of a model that has learnt nothing."""

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lavic.demo_data import demo, lessons, sight

NUM_VALID = 6


def build_nano(root: Path) -> demo.DemoPaths:
    """A copy of the one that a process makes: the language model is random."""
    shutil.copytree(_made().name, root, dirs_exist_ok=True)
    return demo.DemoPaths(root)


@cache
def _made() -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory(prefix="lavic-nano-")
    with pytest.MonkeyPatch.context() as patch:
        for module, sizes in UNTAUGHT.items():
            for name, value in sizes.items():
                patch.setattr(module, name, value)
        paths = demo.build(Path(made.name))
    lines = paths.val_data.read_text(encoding="utf-8").splitlines(keepends=True)
    paths.val_data.write_text("".join(lines[:NUM_VALID]), encoding="utf-8")
    return made


def _draw(model: Any, _make: object) -> None:
    """Weights of unit gain: what stands at the pictures' places changes what is said."""
    core = model.model.language_model
    for weight in (p for p in (*core.parameters(), model.lm_head.weight) if p.dim() == 2):
        torch.nn.init.normal_(weight, 0, weight.shape[1] ** -0.5)


UNTAUGHT: dict[Any, dict[str, Any]] = {lessons: {"teach": _draw}, sight: {"STEPS": 0}}


def flags_of(paths: demo.DemoPaths, run_dir: Path) -> list[object]:
    """Flags of a stage 1 of 20 samples, 4 a step, 2 epochs, on the CPU."""
    return [
        "--model_name", paths.weights,
        "--train_data", paths.train_data, "--train_images_dir", paths.train_images,
        "--val_data", paths.val_data, "--val_images_dir", paths.valid_images,
        "--max_samples", 20, "--batch_size", 4, "--num_epochs", 2, "--lr", 1e-3,
        "--num_workers", 0, "--log_every", 1, "--output_dir", run_dir,
    ]  # fmt: skip
