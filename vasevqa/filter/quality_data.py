"""images2/{0,1} as three splits without pictures that cannot be read."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared import distributed, images
from shared.distributed import World
from shared.errors import UserError
from shared.images import SUFFIXES, Skipped, find_images
from shared.loader import make_eval_loader
from vasevqa.filter import quality_net

log = logging.getLogger(__name__)

KINDS = SUFFIXES | {".tif", ".tiff"}
LABELS = (0, 1)
_FEWEST = 3  # pictures a class: one for each split
_TRAIN, _VAL = 0.8, 0.1  # the rest is the test split

Labelled = tuple[str, int]  # (name below the data directory, label)


@dataclass(frozen=True)
class Splits:
    """The pictures of each split; no picture is in two."""

    train: list[Labelled]
    val: list[Labelled]
    test: list[Labelled]

    @property
    def counts(self) -> list[int]:
        """Training pictures of each label."""
        return [sum(label == own for _, label in self.train) for own in LABELS]

    @property
    def sizes(self) -> dict[str, int]:
        """How many pictures each split has, for the run's status."""
        splits = (("training", self.train), ("validation", self.val), ("test", self.test))
        return {f"{name} pictures": len(pictures) for name, pictures in splits}

    @property
    def class_weights(self) -> Tensor:
        """What a picture of each label counts, (2,), so that both count the same in all."""
        counts = torch.tensor(self.counts, dtype=torch.float32)
        return counts.sum() / (len(LABELS) * counts)


def find_labelled(root: Path) -> list[Labelled]:
    """The pictures of root/0 and root/1, any depth. Raises UserError when a label has none."""
    found: list[Labelled] = []
    for label in LABELS:
        folder = root / str(label)
        if not folder.is_dir():
            raise UserError(
                f"{folder} is no folder: --data_dir needs 0/ (low quality) and 1/ (high quality) "
                "with pictures"
            )
        names = find_images(folder, KINDS)
        if len(names) < _FEWEST:
            raise UserError(
                f"{folder} holds {len(names)} picture(s) ({' '.join(sorted(KINDS))}): at least "
                f"{_FEWEST} are needed, one for each split"
            )
        found += [(f"{label}/{name}", label) for name in names]
    return found


def leave_out_unreadable(
    root: Path, found: list[Labelled], world: World, *, workers: int, allowed: float
) -> tuple[list[Labelled], Skipped]:
    """`found` without what cannot be decoded, and what that is; every rank looks at its share.

    Raises UserError when more than the share `allowed` cannot be decoded, or a label has too few.
    """
    share = make_eval_loader(_Problems(root, found), 16, world, workers=workers, collate=list)
    own = [pair for batch in share for pair in batch if pair[1]]
    skipped = Skipped("pictures")
    for name, reason in sorted(p for part in distributed.gather_objects(own, world) for p in part):
        skipped.add(name, reason)
    skipped.refuse_above(allowed, len(found))
    good = [(name, label) for name, label in found if name not in skipped.names]
    for label in LABELS:
        if sum(own == label for _, own in good) < _FEWEST:
            raise UserError(f"{root / str(label)}: fewer than {_FEWEST} pictures can be read")
    return good, skipped


class _Problems(Dataset[tuple[str, str]]):
    """(name, why it cannot be decoded or '')."""

    def __init__(self, root: Path, found: list[Labelled]) -> None:
        self._root, self._found = root, found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int) -> tuple[str, str]:
        name = self._found[index][0]
        return name, images.problem(self._root / name) or ""


def split(found: Sequence[Labelled], seed: int) -> Splits:
    """80 % to train with, 10 % to validate, 10 % to test, of each label; the same for a seed."""
    parts: list[list[Labelled]] = [[], [], []]
    for label in LABELS:
        own = sorted(item for item in found if item[1] == label)
        random.Random(f"{seed} {label}").shuffle(own)
        num_val = max(1, round(_VAL * len(own)))
        num_test = max(1, round((1 - _TRAIN - _VAL) * len(own)))
        num_train = len(own) - num_val - num_test
        ends = (num_train, num_train + num_val)
        for part, items in zip(
            parts, (own[: ends[0]], own[ends[0] : ends[1]], own[ends[1] :]), strict=True
        ):
            part += items
    return Splits(*parts)


class QualityPictures(Dataset[tuple[Tensor, int]]):
    """(prepared picture, label); each split has its own object, hence its own preparation."""

    def __init__(self, root: Path, items: list[Labelled], prepare: Any) -> None:
        self._root, self._items, self._prepare = root, items, prepare

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name, label = self._items[index]
        return self._prepare(images.read_rgb(self._root / name)), label


def training_pictures(root: Path, splits: Splits, size: int) -> QualityPictures:
    """The training split, varied anew in every epoch."""
    return QualityPictures(root, splits.train, quality_net.for_training(size))


def fixed_pictures(root: Path, items: list[Labelled], size: int) -> QualityPictures:
    """A split to measure on: never varied."""
    return QualityPictures(root, items, quality_net.for_evaluation(size))
