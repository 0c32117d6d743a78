"""Trained students for tests: a run's files as training leaves them, without the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from face_distill.distill.losses import ArcFaceHead
from face_distill.distill.model import FaceStudent, load_tower, trainable_state
from shared.files import write_json

LAYERS = [0, 2]
BOTTLENECK = 8
CLASSES = 5
BEST = "best_student_adapter_face.pth"


def student_of(tower: Path, seed: int = 0, **options: Any) -> FaceStudent:
    """A student with random adapters, none of them zero, and a head."""
    torch.manual_seed(seed)
    vit = load_tower(tower)
    head = ArcFaceHead(vit.config.hidden_size, CLASSES)
    student = FaceStudent(vit, LAYERS, head, bottleneck=BOTTLENECK, **options)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return student


def write_run(directory: Path, tower: Path, *, full: bool = False, **settings: Any) -> Path:
    """The best student of a run in `directory`, its settings and its verification beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    student = student_of(tower, image_size=settings.get("image_size"))
    torch.save(student.state_dict() if full else trainable_state(student), directory / BEST)
    decisive = {"lr": 5e-3, "arc_scale": 16.0, "arc_margin": 0.2, "image_size": None} | settings
    paths = {"blip_path": str(tower), "data_root": "/home/someone/faces"}
    write_json(
        directory / "config.json",
        {"settings": decisive | paths, "identity": decisive | {"world_size": 1}},
    )
    write_json(
        directory / "verification.json",
        {"pairs": "/home/someone/lfw.bin", "before": 0.5125, "after": 0.8375},
    )
    return directory / BEST
