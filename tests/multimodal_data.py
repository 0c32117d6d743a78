"""A small built-in demo for the tests of multimodal/: the same formats, fewer files."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from multimodal.demo_data import demo, files
from multimodal.model import create_model
from multimodal.training.losses import Learner
from multimodal.training.weights import BEST, CheckpointFiles
from shared.distributed import World

SMALL: dict[Any, dict[str, Any]] = {
    files: {
        "COCO_SPLITS": {"train": (40, 4), "val": (12, 1), "test": (8, 1)},
        "CLOTHO_SPLITS": {"development": 20, "validation": 8, "evaluation": 6},
        "AUDIOCAPS_SPLITS": {"train": (18, 2), "val": (8, 1), "test": (6, 1)},
        "SPEAKERS": [*files.SPEAKERS[:16], *files.SPEAKERS[48:54]],
        "VIDEOS": 1,
        "UTTERANCES": 2,
    }
}


def build(root: Path) -> demo.DemoPaths:
    """40 pictures, 20 + 16 sounds, 16 speakers; held-out ones of each."""
    with mock.patch.multiple(files, **SMALL[files]):
        return demo.build(root)


@functools.cache
def made() -> demo.DemoPaths:
    """The same, built once a process for all tests that read it and change nothing."""
    root = Path(tempfile.mkdtemp(prefix="multimodal_data_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return build(root)


def untrained(run_dir: Path, keywords: list[str], **settings: object) -> Path:
    """A best_model.pt of the nano model with random weights, written as training writes it."""
    torch.manual_seed(0)
    options = {"size": "nano", "num_classes": 80, "embed_dim": 32}
    learner = Learner(create_model(**options), 80 if keywords else 0)  # type: ignore[arg-type]
    about = {"model": options, "keywords": keywords, "settings": settings}
    files = CheckpointFiles(run_dir / "checkpoints", learner, about, World())
    files.write_weights(BEST, epoch=1, stage="alignment", val_loss=1.0)
    return run_dir / "checkpoints" / BEST
