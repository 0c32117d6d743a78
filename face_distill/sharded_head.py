"""What training does for an ArcFace head whose centres are shared out over the processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from shared.centre_rows import CentreRows
from shared.checkpoint import Parts
from shared.class_centres import ClassCentres
from shared.distributed import World

if TYPE_CHECKING:
    from face_distill.train_distill import Config


class ShardedHead:
    """The centres' own optimizer, schedule and parts of a checkpoint; of no centres, nothing.

    `sharded` is what `Amp.step` wants to know of them.
    """

    def __init__(self, centres: ClassCentres | None, cfg: Config, world: World) -> None:
        self.parts: Parts = {}
        self.sharded: tuple[Optimizer, World] | None = None
        self._rows: CentreRows | None = None
        if centres is None:
            return
        optimizer = AdamW(centres.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
        self._rows = CentreRows(centres, optimizer)
        self._schedule = CosineAnnealingLR(optimizer, T_max=cfg.epochs)
        self.parts = {"centres": self._rows, "centre_schedule": self._schedule}
        self.sharded = optimizer, world

    def sample(self, labels: Tensor, step: int) -> None:
        """Draw the classes that take part in a step, before its loss; labels (B,)."""
        if self._rows:
            self._rows.sample(labels, step)

    def next_epoch(self) -> None:
        """The learning rate of the next epoch."""
        if self._rows:
            self._schedule.step()
