"""The demo of multimodal/, built once a process for all tests that read it."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch

from multimodal.demo_data import demo
from multimodal.demo_data.demo import DemoPaths
from multimodal.model import create_model
from multimodal.training.losses import Learner
from multimodal.training.weights import BEST, CheckpointFiles
from shared.distributed import World


@functools.cache
def made() -> DemoPaths:
    """The finished demo; tests must not change it."""
    root = Path(tempfile.mkdtemp(prefix="multimodal_demo_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return demo.build(root)


def untrained(run_dir: Path, keywords: list[str], **settings: object) -> Path:
    """A best_model.pt of the nano model with random weights, written as training writes it."""
    torch.manual_seed(0)
    options = {"size": "nano", "num_classes": 80, "embed_dim": 32}
    learner = Learner(create_model(**options), 80 if keywords else 0)  # type: ignore[arg-type]
    about = {"model": options, "keywords": keywords, "settings": settings}
    files = CheckpointFiles(run_dir / "checkpoints", learner, about, World())
    files.write_weights(BEST, epoch=1, stage="alignment", val_loss=1.0)
    return run_dir / "checkpoints" / BEST
