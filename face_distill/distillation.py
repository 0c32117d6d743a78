"""The student with its losses, as one module: what DistributedDataParallel wraps.

B images a process, W processes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from face_distill.distill import losses, model
from face_distill.distill.losses import ArcFaceHead
from face_distill.distill.model import FaceStudent
from shared.distributed import World, gather_with_grad
from shared.errors import UserError

if TYPE_CHECKING:
    from face_distill.face_batches import FaceBatches
    from face_distill.train_distill import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """What each term counts in the total, and how the terms are formed."""

    arc: float
    at: float
    rkd: float
    rkd_angle: float
    rkd_norm: str  # offdiag or all
    at_mode: str
    map_kind: str  # of the teacher's maps: probability or features


class Distiller(nn.Module):
    """Images and what the teacher says of them → the loss terms, each a scalar.

    ArcFace and attention transfer are means over this process's images; the relations are those of
    all B · W images, the same on every process, with exact gradients under DDP's averaging.
    """

    def __init__(
        self,
        student: FaceStudent,
        weights: Weights,
        world: World,
    ) -> None:
        """Take the student with its head."""
        super().__init__()
        self.student = student
        self.weights = weights
        self._world = world

    def forward(
        self, images: Tensor, labels: Tensor, embeddings: Tensor, maps: Tensor
    ) -> dict[str, Tensor]:
        """Terms ArcFace, AT and RKD, unweighted scalars.

        images (B, 3, S, S) normalised, labels (B,), the teacher's embeddings (B, D_t) and maps.
        """
        return self._form(images, labels, embeddings, maps, self._world)

    def terms(
        self, images: Tensor, labels: Tensor, embeddings: Tensor, maps: Tensor
    ) -> dict[str, Tensor]:
        """The terms of this process's images alone, whatever the others do (for validation).

        Scalars, of inputs as `forward` takes them.
        """
        return self._form(images, labels, embeddings, maps, World())

    def _form(
        self, images: Tensor, labels: Tensor, embeddings: Tensor, maps: Tensor, world: World
    ) -> dict[str, Tensor]:
        weights = self.weights
        own, tokens = self.student(images)
        assert self.student.head is not None
        everyone = gather_with_grad(own, world)
        teachers = gather_with_grad(embeddings, world)
        relations = losses.rkd_distance(everyone, teachers, weights.rkd_norm)
        if weights.rkd_angle:
            relations = relations + weights.rkd_angle * losses.rkd_angle(everyone, teachers)
        return {
            "ArcFace": self.student.head(own, labels),
            "AT": losses.attention_transfer(tokens, maps, weights.at_mode, weights.map_kind),
            "RKD": relations,
        }

    def total(self, terms: dict[str, Tensor], *, arc_only: bool) -> Tensor:
        """The weighted sum of the terms, a scalar; of ArcFace alone during the warm-up."""
        total = self.weights.arc * terms["ArcFace"]
        if arc_only:
            return total
        return total + self.weights.at * terms["AT"] + self.weights.rkd * terms["RKD"]

    def describe(self, terms: dict[str, Tensor]) -> str:
        """How the loss is formed, and each term's raw and weighted size."""
        weights = self.weights
        factors = {"ArcFace": weights.arc, "AT": weights.at, "RKD": weights.rkd}
        sizes = [
            f"{name} {size:.4g} x {factors[name]:g} = {size * factors[name]:.4g}"
            for name, size in ((name, float(term.detach())) for name, term in terms.items())
        ]
        return (
            f"attention transfer {weights.at_mode} on {weights.map_kind} maps, RKD over "
            f"{weights.rkd_norm} pairs | {' | '.join(sizes)}"
        )


def build(cfg: Config, data: FaceBatches, world: World) -> Distiller:
    """The student on its device, ready to train; the same on every process (same seed).

    Raises UserError when the head has fewer classes than the data, or the tower cannot be loaded.
    """
    tower = model.load_tower(cfg.blip_path)
    layers = model.adapter_layers(len(tower.encoder.layers), cfg.adapter_layers)
    num_classes, width = _num_classes(cfg, data.num_classes), tower.config.hidden_size
    student = FaceStudent(
        tower,
        layers,
        ArcFaceHead(width, num_classes, cfg.arc_scale, cfg.arc_margin),
        image_size=cfg.image_size,
        checkpointing=cfg.gradient_checkpointing,
    )
    kind = data.teacher.kind
    mode = losses.DEFAULT_AT_MODE[kind] if cfg.at_mode == "auto" else cfg.at_mode
    weights = Weights(
        cfg.lambda_arc,
        cfg.lambda_at,
        cfg.lambda_rkd,
        cfg.rkd_angle_weight,
        cfg.rkd_norm,
        mode,
        kind,
    )
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    log.info(
        "%d images of %d identities | adapters in layers %s | %.2f M of %.1f M parameters train",
        data.num_training,
        num_classes,
        " ".join(map(str, layers)),
        trainable / 1e6,
        sum(p.numel() for p in student.parameters()) / 1e6,
    )
    return Distiller(student, weights, world).to(world.device)


def _num_classes(cfg: Config, found: int) -> int:
    wanted = found if cfg.num_classes == "auto" else int(cfg.num_classes)
    if wanted < found:
        raise UserError(
            f"--num-classes {wanted} is below the {found} identities of the selected images; "
            f"use auto, or {found} and above"
        )
    return wanted
