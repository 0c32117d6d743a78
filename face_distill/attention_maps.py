"""A page of faces with where the teacher and the trained student look, for the run's report.

B faces, L tokens, D width of the tower.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from face_distill.face_batches import FaceBatches
from face_distill.model import FaceStudent
from face_distill.preprocess import Preprocess
from shared.errors import one_line
from shared.files import write_text
from shared.page import Page, table, thumbnail
from shared.run_record import PAGES

log = logging.getLogger(__name__)

PAGE = "attention_maps.html"
_FACES, _SIDE = 6, 112  # faces on the page, pixels a side


def write(run_dir: Path, student: FaceStudent, data: FaceBatches) -> None:
    """Write the page into the run's pages/; a page that fails costs a warning, not the run."""
    try:
        text = _page(student, data)
        (run_dir / PAGES).mkdir(exist_ok=True)
        write_text(run_dir / PAGES / PAGE, text)
    except Exception as error:
        log.warning("no attention maps for the report: %s", one_line(error))


def _page(student: FaceStudent, data: FaceBatches) -> str:
    dataset: Any = data.val_set or data.train_set
    chosen = np.linspace(0, len(dataset) - 1, min(_FACES, len(dataset)), dtype=int).tolist()
    images, _, rows = zip(*(dataset[index] for index in chosen), strict=True)
    faces = torch.stack(images)
    theirs = data.teacher.rows([int(row) for row in rows])[1]
    ours = _student_maps(student, faces)
    page = Page("Where teacher and student look")
    page.add(
        "Bright is where the features are strong: of the teacher its stored maps, of the student "
        "the squared length of its patch tokens. Each map is stretched to its own range."
    )
    cells = [
        [_picture(face, None, "face"), _picture(face, a, "teacher"), _picture(face, b, "student")]
        for face, a, b in zip(faces.numpy(), _energy(theirs), ours, strict=True)
    ]
    page.add(table(("face", "teacher", "student"), cells))
    return page.render()


def _student_maps(student: FaceStudent, faces: Tensor) -> NDArray[np.float32]:
    """The energy of the student's tokens as (B, side, side)."""
    device = next(student.parameters()).device
    was_training = student.training
    student.eval()
    with torch.inference_mode():
        preprocess = Preprocess(student.image_size).to(device)
        tokens = student(preprocess(faces.to(device)))[1].float()
    student.train(was_training)
    side = round(tokens.shape[1] ** 0.5)
    return tokens.square().sum(-1).view(-1, side, side).cpu().numpy()


def _energy(maps: Tensor) -> NDArray[np.float32]:
    """The teacher's maps, probabilities or features, as (B, H, W)."""
    return (maps.square().sum(1) if maps.dim() == 4 else maps).numpy()


def _picture(face: NDArray[np.uint8], energy: NDArray[Any] | None, alt: str) -> str:
    """The face (3, H, W), darkened where the map is low, as a thumbnail."""
    pixels = Image.fromarray(face.transpose(1, 2, 0)).resize((_SIDE, _SIDE))
    if energy is not None:
        low, high = float(energy.min()), float(energy.max())
        levels = (energy - low) / max(high - low, 1e-12)
        mask = Image.fromarray((levels * 255).astype(np.uint8)).resize(
            (_SIDE, _SIDE), Image.Resampling.BICUBIC
        )
        pixels = Image.composite(pixels, Image.new("RGB", pixels.size), mask)
    written = io.BytesIO()
    pixels.save(written, "JPEG", quality=85)
    return thumbnail(written.getvalue(), alt, _SIDE)
