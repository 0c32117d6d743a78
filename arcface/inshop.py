"""DeepFashion In-shop as uint8 pictures with the numbers of their items.

    data = InShop(Path("data/inshop"), "train", build_pipeline(settings))
    image, label, position, flipped = data[0]

<root>/Eval/list_eval_partition.txt says what there is, and <root>/Img/<path> holds it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from arcface.partition import LIST, Picture, read_partition
from arcface.pipeline import Pipeline, build_pipeline
from arcface.section import refuse_unknown
from shared.errors import UserError, one_line, shown
from shared.images import read_rgb

LEFT_OUT = -1  # position of an item whose picture could not be read
_SETTINGS = ("type", "data_root", "split", "pipeline", "data_prefix", "ann_file", "test_mode")

log = logging.getLogger(__name__)


class Garment(NamedTuple):
    """One picture as the loader hands it on."""

    image: Tensor  # uint8 (3, H, W)
    label: int
    position: int  # among the pictures of the split, LEFT_OUT where none could be read
    flipped: bool  # to be mirrored on the device


class InShop(Dataset[Garment]):
    """The pictures of one split, decoded, resized and cut as the pipeline says.

    split: "train", "query" or "gallery". data_prefix: directory of the pictures below root: "Img",
    or "Img_highres" for the large ones (also found in Img/img_highres, as their archive unpacks).
    max_bad: share of the pictures that may be missing or broken; each is named once in the log. A
    training picture gives way to another of its item; a query or gallery picture becomes a black
    one with position LEFT_OUT, which an evaluation passes over.
    Attributes: `names`, `items` (ids), `labels` (int64, by first appearance; query and gallery
    share theirs), `num_classes`.
    Raises UserError for a list that is missing or malformed, and above the share of bad pictures.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        pipeline: Pipeline,
        *,
        data_prefix: str = "Img",
        ann_file: str = LIST,
        max_bad: float = 0.01,
    ) -> None:
        partition = read_partition(Path(root) / ann_file)
        pictures = partition.split(split)
        self.split, self.pipeline = split, pipeline
        self.names = [picture.name for picture in pictures]
        self.items = [picture.item for picture in pictures]
        self.labels = torch.tensor(partition.labels(split), dtype=torch.int64)
        self.num_classes = int(self.labels.max()) + 1
        self._paths = _locate(Path(root), data_prefix, pictures)
        # Shared, so that loader workers know of each other's.
        self._bad = torch.zeros(len(pictures), dtype=torch.bool).share_memory_()
        self._max_bad = math.ceil(max_bad * len(pictures))
        self._of_label = _group(self.labels.tolist()) if split == "train" else {}
        for remark in partition.remarks() if split == "query" else ():
            log.warning(remark)
        self._note_missing()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Garment:
        index = range(len(self))[index]  # negative and outside indices, as in a list
        for choice in self._choices(index):
            image = self._read(choice)
            if image is not None:
                return self._garment(image, choice)
        if self.split == "train":
            raise UserError(f"none of the {len(self)} training pictures can be read")
        blank = torch.zeros((3, self.pipeline.height, self.pipeline.width), dtype=torch.uint8)
        return Garment(blank, int(self.labels[index]), LEFT_OUT, False)

    def left_out(self) -> list[str]:
        """The paths of the pictures found missing or broken so far."""
        return [str(self._paths[index]) for index in self._bad.nonzero().flatten().tolist()]

    def _choices(self, index: int) -> Iterator[int]:
        """The picture itself and, in training, what may stand in: its item's, then any other."""
        yield index
        if self.split == "train":
            yield from (i for i in self._of_label[int(self.labels[index])] if i != index)
            yield from ((index + step) % len(self) for step in range(1, len(self)))

    def _garment(self, image: Tensor, index: int) -> Garment:
        try:
            cut, flipped = self.pipeline(image)
        except ValueError as error:
            raise UserError(f"{self._paths[index]}: {error}") from None
        return Garment(cut, int(self.labels[index]), index, flipped)

    def _read(self, index: int) -> Tensor | None:
        """The decoded picture, or None for one that is (now) known to be bad."""
        if self._bad[index]:
            return None
        try:
            return read_rgb(self._paths[index])
        except ValueError as error:
            self._bad[index] = True
            reason = one_line(error)
        log.warning("left out: %s (%s)", self._paths[index], reason)
        self._check_share(f"the last one: {self._paths[index]} ({reason})")
        return None

    def _note_missing(self) -> None:
        missing = _missing(self._paths)
        self._bad[missing] = True
        for index in missing[: self._max_bad]:
            log.warning("left out: %s (missing)", self._paths[index])
        if missing:
            shown = ", ".join(str(self._paths[index]) for index in missing[:5])
            self._check_share(f"{len(missing)} missing: {shown}{', …' * (len(missing) > 5)}")

    def _check_share(self, which: str) -> None:
        count = int(self._bad.sum())
        if count > self._max_bad:
            raise UserError(
                f"{count} of {len(self)} {self.split} pictures cannot be read, {self._max_bad} may "
                f"be; {which}; unpack the data set again"
            )


def open_inshop(settings: Any, root: Path, name: str, max_bad: float = 0.01) -> InShop:
    """The data set that a configuration's `dataset` dict describes, read from `root`.

    name: the dict's key, for messages. root: the found data_root (see config_options.data_roots).
    Raises UserError for settings that are unknown or of a wrong kind.
    """
    refuse_unknown(settings, name, _SETTINGS, "dict(type='InShop', …)")
    if settings.get("type") != "InShop":
        raise UserError(f"{name}.type is {shown(settings.get('type'))}, allowed: InShop")
    words = {
        key: settings.get(key, default)
        for key, default in (("split", "train"), ("data_prefix", "Img"), ("ann_file", LIST))
    }
    for key, value in words.items():
        if not isinstance(value, str):
            raise UserError(f"{name}.{key} is {shown(value)}, expected text")
    pipeline = build_pipeline(settings.get("pipeline"), f"{name}.pipeline")
    return InShop(
        root,
        words["split"],
        pipeline,
        data_prefix=words["data_prefix"],
        ann_file=words["ann_file"],
        max_bad=max_bad,
    )


def _locate(root: Path, prefix: str, pictures: tuple[Picture, ...]) -> list[Path]:
    """The path of every picture, in the one of the usual layouts that is there."""
    names = [picture.name for picture in pictures]
    short = [name.removeprefix("img/") for name in names]
    layouts = [(root / prefix, names), (root / prefix, short)]
    if prefix == "Img_highres":
        layouts.append((root / "Img" / "img_highres", short))
    for folder, below in layouts:
        # Some of the first may be missing; of a layout that is not there all are.
        if any((folder / name).is_file() for name in below[:20]):
            return [folder / name for name in below]
    return [layouts[0][0] / name for name in names]


def _missing(paths: list[Path]) -> list[int]:
    """The indices of the paths where no file is; each directory is listed once."""
    listed: dict[Path, set[str]] = {}
    missing = []
    for index, path in enumerate(paths):
        folder = path.parent
        if folder not in listed:
            listed[folder] = _file_names(folder)
        if path.name not in listed[folder]:
            missing.append(index)
    return missing


def _file_names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError:
        return set()


def _group(labels: list[int]) -> dict[int, list[int]]:
    """The indices of each label."""
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return groups
