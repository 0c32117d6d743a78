"""Batches of faces with what the teacher says of them, on the device and ready for the student."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from face_distill.distill.preprocess import Preprocess
from face_distill.distill.teacher import TeacherFeatures
from face_distill.FaceDataset import FaceDataset
from shared.checkpoint import Position
from shared.distributed import World
from shared.errors import UserError
from shared.loader import make_eval_loader, make_loader

if TYPE_CHECKING:
    from face_distill.train_distill import Config

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class FaceBatches:
    """A data set, its teacher, and the split into training and held-out images."""

    def __init__(
        self, dataset: FaceDataset, teacher: TeacherFeatures, val_fraction: float, seed: int
    ):
        self.teacher = teacher
        self.num_classes = dataset.num_classes
        self.input_size = 224  # side of the student's input
        num_val = round(len(dataset) * val_fraction)
        self.num_training = len(dataset) - num_val
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self.train_set: Dataset[Any] = (
            Subset(dataset, sorted(order[num_val:])) if num_val else dataset
        )
        self.val_set = Subset(dataset, sorted(order[:num_val])) if num_val else None

    @property
    def counts(self) -> dict[str, int]:
        """What there is, for the report."""
        held_out = len(self.val_set) if self.val_set else 0
        return {
            "training images": self.num_training,
            "held-out images": held_out,
            "identities": self.num_classes,
        }

    def training(self, cfg: Config, world: World, position: Position) -> Iterator[Batch]:
        """What is left of the epoch at `position`: images (B, 3, S, S), labels, teacher's rows."""
        loader = make_loader(
            self.train_set,
            cfg.batch_size // world.size,
            world,
            seed=cfg.run.seed,
            workers=cfg.workers,
            epoch=position.epoch,
            offset=position.batch,
        )
        return self._prepare(loader, world)

    def validation(self, cfg: Config, world: World) -> Iterator[Batch]:
        """This process's share of the held-out images, each once over all processes."""
        assert self.val_set is not None
        size = cfg.batch_size // world.size
        return self._prepare(
            make_eval_loader(self.val_set, size, world, workers=cfg.workers), world
        )

    def _prepare(self, loader: DataLoader[Any], world: World) -> Iterator[Batch]:
        preprocess = Preprocess(self.input_size).to(world.device)
        for images, labels, indices in loader:
            embeddings, maps = self.teacher.rows(indices)
            yield (
                preprocess(images.to(world.device, non_blocking=True)),
                labels.to(world.device, non_blocking=True),
                embeddings.to(world.device, non_blocking=True),
                maps.to(world.device, non_blocking=True),
            )


def open_batches(cfg: Config) -> FaceBatches:
    """The data of `cfg`, checked against the teacher's rows. Raises UserError where they differ."""
    teacher = TeacherFeatures(cfg.teacher_feat_dir)
    dataset = FaceDataset(
        cfg.data_root, cfg.selection, limit=len(teacher), per_id=cfg.per_id, cache=cfg.cache
    )
    teacher.check_alignment(dataset)
    batches = FaceBatches(dataset, teacher, cfg.val_fraction, cfg.run.seed)
    num_val = len(batches.val_set) if batches.val_set else 0
    if batches.val_set is not None and num_val < 2:
        raise UserError(
            f"--val-fraction {cfg.val_fraction} holds out {num_val} of {len(dataset)} images, 2 "
            "are needed; raise it, or use 0"
        )
    return batches
