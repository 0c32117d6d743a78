"""The student's files, and what its embedding is worth before and after training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor

from face_distill.distill import model, verification
from face_distill.distill.model import FaceStudent
from face_distill.distill.pair_files import read_pairs
from face_distill.distill.preprocess import Preprocess
from shared import checkpoint, weights
from shared.distributed import World
from shared.early_stopping import EarlyStopping
from shared.files import read_object, write_json

if TYPE_CHECKING:
    from face_distill.train_distill import Config

log = logging.getLogger(__name__)

BEST = "best_student_adapter_face.pth"
EVERY_EPOCHS = 5  # student_adapter_face_epoch_*.pth


class Trainable:
    """The trained part of a student, as a part of a checkpoint."""

    def __init__(self, student: FaceStudent) -> None:
        self._student = student

    def state_dict(self) -> dict[str, Tensor]:
        """Adapters and head, on the CPU."""
        return model.trainable_state(self._student)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put them back. Raises UserError when they do not fit."""
        weights.load_strict(self._student, state, only=self.state_dict().keys(), source="last.pth")


def save_epoch(
    cfg: Config, world: World, student: FaceStudent, epoch: int, *, is_best: bool
) -> None:
    """Write the documented files of an epoch (from 1): the best, and every fifth."""
    periodic = f"student_adapter_face_epoch_{epoch}.pth"
    names = [BEST] * is_best + [periodic] * (epoch % EVERY_EPOCHS == 0)
    if not (names and world.is_main):
        return
    state = student.state_dict() if cfg.full_checkpoint else model.trainable_state(student)
    for path in (cfg.run_dir / name for name in names):
        with checkpoint.beside(path):
            checkpoint.save(path, state, keep=1)


def verify_before(cfg: Config, world: World, student: FaceStudent, step: int) -> float | None:
    """Accuracy on --verify's pairs before the first step; of a resumed run, the one noted then."""
    if not (cfg.verify and world.is_main):
        return None
    note = cfg.run_dir / "verification.json"
    if step > 0:
        written = read_object(note)
        return written.get("before") if written.get("pairs") == str(cfg.verify) else None
    before = _accuracy(cfg, world, student)
    with checkpoint.beside(note):
        write_json(note, {"pairs": str(cfg.verify), "before": before})
    return before


def conclude(
    cfg: Config,
    world: World,
    student: FaceStudent,
    before: float | None,
    stopping: EarlyStopping,
) -> dict[str, Any]:
    """What the run ends with: why, which files, and the best student's accuracy against before."""
    best = cfg.run_dir / BEST
    files = sorted(cfg.run_dir.glob("*student_adapter_face*.pth"))
    reason = f"the loss did not fall for {stopping.bad} epochs" if stopping.should_stop else ""
    ending: dict[str, Any] = {"outputs": [str(path) for path in files], "reason": reason}
    if before is None or not cfg.verify or not best.exists():
        return ending
    model.load_student(student, best)
    after = _accuracy(cfg, world, student)
    note = cfg.run_dir / "verification.json"
    with checkpoint.beside(note):
        write_json(note, {"pairs": str(cfg.verify), "before": before, "after": after})
    log.info("verification accuracy on %s: %.4f untrained, %.4f trained", cfg.verify, before, after)
    name = f"verification accuracy ({cfg.verify.stem})"
    result = {"name": name, "before": before, "after": after, "higher_is_better": True}
    return ending | {"result": result}


def _accuracy(cfg: Config, world: World, student: FaceStudent) -> float:
    assert cfg.verify is not None
    preprocess = Preprocess(student.image_size).to(world.device)
    student.eval()
    accuracy = verification.verify(
        lambda images: student(preprocess(images.to(world.device)))[0],
        read_pairs(cfg.verify),
    )
    student.train()
    return accuracy.mean
