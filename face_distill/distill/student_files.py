"""The files of a trained student: written by a run, found by the tools, with settings and tower.

Entry scripts look here before anything slow is imported.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError, did_you_mean
from shared.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from face_distill.distill.model import FaceStudent

SETTINGS = "config.json"  # of a run directory, or of an adapter that an earlier version exported
BEST = "best_student_adapter_face.pth"
EVERY_EPOCHS = 5  # student_adapter_face_epoch_*.pth
_EXPORTED = "model.safetensors"
_ADAPTER = re.compile(r"vit\.encoder\.layers\.(\d+)\.mlp\.adapter\.down_proj\.weight")


def save_epoch(
    run_dir: Path, student: FaceStudent, epoch: int, *, is_best: bool, full: bool
) -> None:
    """Write the documented files of an epoch (from 1): the best, and every fifth.

    full: the whole student, not adapters and head alone.
    """
    from face_distill.distill.model import trainable_state
    from shared import checkpoint

    periodic = f"student_adapter_face_epoch_{epoch}.pth"
    names = [BEST] * is_best + [periodic] * (epoch % EVERY_EPOCHS == 0)
    state = (student.state_dict() if full else trainable_state(student)) if names else {}
    for path in (run_dir / name for name in names):
        with checkpoint.beside(path):
            checkpoint.save(path, state, keep=1)


def checkpoint_at(path: Path) -> Path:
    """The trained student that `path` means: a file, an exported adapter, a run directory's best.

    Raises UserError when there is none.
    """
    if path.is_dir():
        if (path / _EXPORTED).is_file():
            return path
        if (path / BEST).is_file():
            return path / BEST
        raise UserError(
            f"{path} holds no trained student: expected {BEST} of a run, or {_EXPORTED} of an "
            "export"
        )
    if path.exists():
        return path
    there = [p.name for p in path.parent.glob("*.pth")] if path.parent.is_dir() else []
    raise UserError(
        f"{path} is missing: train first (./train.sh), or give --checkpoint PATH"
        f"{did_you_mean(path.name, there)}"
    )


def demo_student(demo: Path, typed: Collection[str]) -> dict[str, Path]:
    """`checkpoint` and `blip_path` that ./train.sh --demo left in `demo`, but for those typed.

    Raises UserError when it has not been run.
    """
    checkpoint = demo / "runs" / "checkpoints" / BEST
    if "checkpoint" not in typed and not checkpoint.is_file():
        raise UserError("the demo has no trained student yet: type ./train.sh --demo first")
    found = {"checkpoint": checkpoint, "blip_path": demo / "weights" / "blip2_weights"}
    return {name: path for name, path in found.items() if name not in typed}


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """The settings beside `checkpoint`, of the run or the export that wrote it; {} without any."""
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    content = read_json(directory / SETTINGS)
    found = content.get("settings", content) if isinstance(content, dict) else {}
    return found if isinstance(found, dict) else {}


def tower_of(checkpoint: Path, typed: Path | None, default: Path) -> Path:
    """The BLIP-2 directory for `checkpoint`: `typed`, the run's if still there, or `default`.

    Raises UserError when there is no tower; `typed` is never replaced by another.
    """
    stored = settings_of(checkpoint).get("blip_path")
    own = [Path(stored)] if isinstance(stored, str) else []
    candidates = [typed] if typed else [*own, default]
    for path in candidates:
        if (path / "config.json").is_file():
            return path
    looked = " and ".join(str(path / "config.json") for path in candidates)
    raise UserError(
        f"no BLIP-2 tower: {looked} missing; fetch it with "
        "python download_weight.py, or type --blip-path PATH"
    )


# --- what is in them ------------------------------------------------------------------------------


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


def read_trained(path: Path) -> dict[str, Tensor]:
    """The tensors of a trained student under their plain names, on the CPU, as the file has them.

    Raises UserError for what `weights.read` refuses, and for the checkpoint a run resumes from.
    """
    from shared import weights

    try:
        return weights.strip_wrappers(weights.read(path))
    except UserError:
        if _is_of_a_run(path):
            raise UserError(
                f"{path} is what a run resumes from (optimizer and all), not a student: give "
                f"{path.with_name(BEST)}, or a student_adapter_face_epoch_N.pth beside it"
            ) from None
        raise


def _is_of_a_run(path: Path) -> bool:
    from shared import checkpoint as checkpoints

    try:
        return path.is_file() and "parts" in checkpoints.load(path)
    except (checkpoints.DamagedError, UserError, TypeError):
        return False
