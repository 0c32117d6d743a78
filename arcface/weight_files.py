"""Weights of this recipe's own files, and of others, into its networks."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from arcface.encoders import Encoder, fill_backbone
from shared import checkpoint, weights
from shared.checkpoint import DamagedError
from shared.class_centres import ClassCentres
from shared.errors import UserError

log = logging.getLogger(__name__)


def load_weights(encoder: Encoder, head: ClassCentres | None, path: Path) -> None:
    """Fill the encoder from `path` and, where the file has the same centres, the head.

    path: best_….pth, epoch_N.pth or last.pt of a run, or a state dict as encoders.fill_backbone
    takes it. Raises UserError for a file that cannot be read or an encoder that does not fit.
    """
    state = _read(path)
    fill_backbone(encoder.backbone, state, path)
    if head is None:
        return
    centres = state.get("head.weight")
    if centres is None or centres.shape != head.weight.shape:
        log.info("the head starts from random centres: %s has none of its size", path)
        return
    head.weight.data.copy_(centres)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, a run's checkpoint under the names of its best file."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing: expected best_….pth, epoch_N.pth or another checkpoint"
        )
    try:
        content = checkpoint.load(path)
    except (DamagedError, UserError):
        return weights.read(path)  # another format, or the reason in words
    parts = content.get("parts") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not isinstance(parts.get("encoder"), dict):
        return weights.read(path)
    head = parts.get("head") or {}
    centres = head.get("centres", head.get("weight"))
    state = {f"encoder.{name}": tensor for name, tensor in parts["encoder"].items()}
    return state | ({"head.weight": centres} if isinstance(centres, Tensor) else {})
