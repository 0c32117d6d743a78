"""What there is to learn from below a data root: pairs, their labels, and what was left out.

A source is one data set with the two splits that training reads. Data sets that are not there, or
not whole, are left out with the reason; those that the user named are refused instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from multimodal.datasets import AudioCaps, Clotho, Coco, Counts, VoxCeleb, collate
from multimodal.learner import Target, Task
from shared.errors import UserError, one_line

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]


class Grouped(Protocol):
    """A data set whose items belong to groups of which a batch may hold one item."""

    counts: Counts

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Batch: ...
    def group_of(self, index: int, /) -> Hashable:
        """The picture, clip or person that an item shows."""
        ...


@dataclass(frozen=True)
class DataOptions:
    """How data sets are opened."""

    image_size: int
    clip_seconds: float = 10.0
    feature_cache: Path | None = None
    sounds_alone: Literal["auto", "keywords", "spectrogram"] = "auto"

    def alone(self, target: Target | None) -> Target | None:
        """What sounds with these labels, or without any, are for in the first stage."""
        if self.sounds_alone == "keywords":
            return target
        return target if target and self.sounds_alone == "auto" else "spectrogram"


@dataclass(frozen=True)
class Source:
    """One data set to learn from."""

    name: str
    modalities: tuple[str, str]
    training: OnePerGroup
    validation: OnePerGroup | None
    target: Target | None = None
    alone: Target | None = None  # what its pictures or sounds are for in the first stage

    def task(self, stage: int) -> Task | None:
        """What its batches are for in a stage (0 unimodal, 1 alignment, 2 fine-tuning), if any."""
        if stage == 0:
            alone = tuple(name for name in self.modalities if name in ("image", "audio"))
            return Task(self.name, alone, False, self.alone) if self.alone else None
        return Task(self.name, self.modalities, True, self.target if stage == 2 else None)


@dataclass
class Sources:
    """All sources, and what the report says of their data sets."""

    found: list[Source] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, str]:
        """Found and expected items of each split, for the run's status."""
        return {
            f"{note['data_set']}, {note['split']}": f"{note['found']} of {note['expected']}"
            for note in self.notes
            if "found" in note
        }


class OnePerGroup(Dataset[Batch]):
    """One item of each group: no batch ever holds two pictures of one scene, or two of one voice.

    Which item of a group it is, is drawn anew each time while training; else it is the first.
    pairs: an item is two sounds of the group, `audio` and `audio_2`.
    """

    def __init__(self, items: Grouped, *, draw: bool, pairs: bool = False) -> None:
        self._items, self._draw, self._pairs = items, draw, pairs
        groups: dict[Hashable, list[int]] = {}
        for index in range(len(items)):
            groups.setdefault(items.group_of(index), []).append(index)
        self._groups = [members for members in groups.values() if len(members) > int(pairs)]

    @property
    def counts(self) -> Counts:
        """The data set's."""
        return self._items.counts

    @property
    def label_names(self) -> Sequence[str]:
        """What its labels mean; empty without labels."""
        return getattr(self._items, "label_names", ())

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Batch:
        members = self._groups[index]
        first = int(torch.randint(len(members), ())) if self._draw and len(members) > 1 else 0
        item = self._items[members[first]]
        if not self._pairs:
            return item
        ahead = 1 + int(torch.randint(len(members) - 1, ())) if self._draw else 1
        other = self._items[members[(first + ahead) % len(members)]]
        return {"audio": item["audio"], "audio_2": other["audio"]}


def collate_views(samples: Sequence[Batch]) -> Batch:
    """`collate`, also for pairs of sounds: `audio_2` and `audio_mask_2` beside `audio`."""
    if "audio_2" not in samples[0]:
        return collate(samples)
    first = collate([{"audio": sample["audio"]} for sample in samples])
    second = collate([{"audio": sample["audio_2"]} for sample in samples])
    return first | {"audio_2": second["audio"], "audio_mask_2": second["audio_mask"]}


def open_all(data_root: Path, named: Sequence[str], options: DataOptions) -> Sources:
    """Every source below `data_root`, or those named.

    Raises UserError when nothing can be learnt from, or when a named data set cannot be opened.
    """
    sources = Sources()
    for name, opener in _OPENERS.items():
        if named and name not in named:
            continue
        root = data_root / name
        if not root.is_dir() and not named:
            sources.notes.append({"data_set": name, "left_out": "not there"})
            continue
        try:
            source = opener(root, options)
        except UserError as error:
            if named:
                raise
            log.warning("%s is left out: %s", name, one_line(error))
            sources.notes.append({"data_set": name, "left_out": one_line(error)})
            continue
        sources.found.append(source)
        sources.notes += _notes(source)
        log.info("%s", source.training.counts.text())
    if not sources.found:
        raise UserError(
            f"{data_root} holds nothing to learn from: expected one of {', '.join(_OPENERS)}; "
            "fetch them by python download_datasets.py --datasets coco clotho audiocaps, or type "
            "--data-root"
        )
    return sources


def _notes(source: Source) -> list[dict[str, Any]]:
    """The counts of a source's splits, and how its pairs are made."""
    pairs = " with ".join(name.replace("_2", " of the same voice") for name in source.modalities)
    return [
        {**asdict(part.counts), "used_as": use, "pairs": pairs}
        for part, use in ((source.training, "training"), (source.validation, "validation"))
        if part is not None
    ]


def _open_coco(root: Path, options: DataOptions) -> Source:
    train = Coco(root, "train", image_size=options.image_size)
    held_out = _held_out(lambda: Coco(root, "val", image_size=options.image_size))
    target = "classes" if train.label_names else None
    return Source(
        "coco", ("image", "text"), OnePerGroup(train, draw=True), held_out, target, target
    )


def _open_clotho(root: Path, options: DataOptions) -> Source:
    sounds: dict[str, Any] = _sounds(options)
    train = Clotho(root, "train", **sounds)
    held_out = _held_out(lambda: Clotho(root, "val", **sounds))
    target = "keywords" if train.label_names else None
    items, alone = OnePerGroup(train, draw=True), options.alone(target)
    return Source("clotho", ("audio", "text"), items, held_out, target, alone)


def _open_audiocaps(root: Path, options: DataOptions) -> Source:
    sounds: dict[str, Any] = _sounds(options)
    train = AudioCaps(root, "train", **sounds)
    held_out = _held_out(lambda: AudioCaps(root, "val", **sounds))
    items, alone = OnePerGroup(train, draw=True), options.alone(None)
    return Source("audiocaps", ("audio", "text"), items, held_out, alone=alone)


def _open_voxceleb(root: Path, options: DataOptions) -> Source:
    """Faces with voices where there are frames, else two sounds of each voice."""
    sounds: dict[str, Any] = _sounds(options) | {"image_size": options.image_size}
    train = VoxCeleb(root, "train", **sounds)
    pairs = not train.has_faces
    held_out = _held_out(lambda: VoxCeleb(root, "val", **sounds), pairs=pairs)
    modalities = ("audio", "audio_2") if pairs else ("image", "audio")
    if pairs:
        log.info("voxceleb has no frames of faces: voices are paired with voices of one speaker")
    training = OnePerGroup(train, draw=True, pairs=pairs)
    return Source("voxceleb", modalities, training, held_out)


_OPENERS = {
    "coco": _open_coco,
    "clotho": _open_clotho,
    "audiocaps": _open_audiocaps,
    "voxceleb": _open_voxceleb,
}


def _sounds(options: DataOptions) -> dict[str, Any]:
    return {"clip_seconds": options.clip_seconds, "cache": options.feature_cache}


def _held_out(opened: Callable[[], Grouped], *, pairs: bool = False) -> OnePerGroup | None:
    """The validation split, or None with a warning."""
    try:
        found = OnePerGroup(opened(), draw=False, pairs=pairs)
    except UserError as error:
        log.warning("no validation: %s", one_line(error))
        return None
    return found if len(found) > 1 else None
