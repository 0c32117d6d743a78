"""A trained student out of its files, ready to embed faces: for evaluation and use.

What the adapters are like (layers, width) is read from the checkpoint's own names and shapes, the
side of the input from the settings beside it, so that nobody has to repeat them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from face_distill.distill import model
from face_distill.distill.model import FaceStudent
from face_distill.distill.preprocess import Preprocess
from face_distill.distill.run_settings import BEST, settings_of
from shared import checkpoint as checkpoints
from shared import weights
from shared.errors import UserError
from shared.precision import Amp

_ADAPTER = re.compile(r"vit\.encoder\.layers\.(\d+)\.mlp\.adapter\.down_proj\.weight")


@dataclass(frozen=True)
class AdapterShape:
    """Which layers have an adapter, ascending, and the adapters' inner width."""

    layers: list[int]
    bottleneck: int


def adapter_shape(state: dict[str, Tensor], source: Path) -> AdapterShape:
    """The adapters that `state` holds. Raises UserError, naming `source`, when there are none."""
    widths = {
        int(found[1]): tensor.shape[0]
        for name, tensor in state.items()
        if (found := _ADAPTER.fullmatch(name)) and tensor.dim() == 2
    }
    if not widths or len(set(widths.values())) > 1:
        raise UserError(
            f"{source} holds no face adapters (vit.encoder.layers.N.mlp.adapter.…): give "
            "best_student_adapter_face.pth, student_adapter_face_epoch_N.pth or an exported adapter"
        )
    return AdapterShape(sorted(widths), next(iter(widths.values())))


def read_trained(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a trained student under their plain names, on the CPU, as the file has them.

    Raises UserError for what `weights.read` refuses, and for the checkpoint a run resumes from.
    """
    try:
        return weights.strip_wrappers(weights.read(checkpoint))
    except UserError:
        if _is_of_a_run(checkpoint):
            raise UserError(
                f"{checkpoint} is what a run resumes from (optimizer and all), not a student: give "
                f"{checkpoint.with_name(BEST)}, or a student_adapter_face_epoch_N.pth beside it"
            ) from None
        raise


def _is_of_a_run(path: Path) -> bool:
    try:
        return path.is_file() and "parts" in checkpoints.load(path)
    except (checkpoints.DamagedError, UserError, TypeError):
        return False


def open_student(
    blip_path: Path, checkpoint: Path | None = None, *, image_size: int | None = None
) -> FaceStudent:
    """The student without its head, on the CPU, frozen; untrained without a `checkpoint`.

    checkpoint: adapters alone or the whole student, as training writes them; or an adapter that
    an earlier version exported.
    image_size: side of the input; by default that of the run, or else the tower's own.
    Raises UserError when a file is missing, damaged or of another tower.
    """
    if checkpoint is None:
        student = FaceStudent(model.load_tower(blip_path), [], image_size=image_size)
        return student.requires_grad_(False).eval()
    shape = adapter_shape(read_trained(checkpoint), checkpoint)
    tower = model.load_tower(blip_path)
    if shape.layers[-1] >= len(tower.encoder.layers):
        raise UserError(
            f"{checkpoint} has an adapter in layer {shape.layers[-1]}, the tower in {blip_path} "
            f"has {len(tower.encoder.layers)}: give the tower it was trained on (--blip-path)"
        )
    student = FaceStudent(
        tower,
        shape.layers,
        bottleneck=shape.bottleneck,
        image_size=image_size or stored_image_size(checkpoint),
    )
    model.load_student(student, checkpoint)
    return student.requires_grad_(False).eval()


def stored_image_size(checkpoint: Path) -> int | None:
    """The side of the input that the run or export beside `checkpoint` notes, if it notes one."""
    size = settings_of(checkpoint).get("image_size")
    if size is None or (type(size) is int and size > 0):
        return size
    raise UserError(f"the settings beside {checkpoint} give image_size {size!r}: expected a number")


class FaceEmbedder(nn.Module):
    """uint8 faces (B, 3, H, W) on any device → embeddings (B, D), float32, on `device`.

    Not unit length; wrap it in `verification.flip_embeddings` for the usual protocol.
    """

    def __init__(self, student: FaceStudent, device: torch.device, amp: str = "off") -> None:
        super().__init__()
        self.student = student.to(device).eval()
        self._preprocess = Preprocess(student.image_size).to(device)
        self._device, self._amp = device, Amp(amp, device)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        with self._amp.autocast():
            return self.student(self._preprocess(images.to(self._device)))[0].float()
