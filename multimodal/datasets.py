"""The data sets of the recipe, as items that are dicts of tensors.

    from datasets import AudioCaps, Clotho, Coco, VoxCeleb, collate    # a script of yours here
    pairs = Coco(Path("data/coco"), "train")
    pairs[0]["images"], pairs.counts.text(), pairs.captions(0)

This file bears the name of Hugging Face's package, which it hides from scripts that lie beside it:
the recipe's own scripts move this directory to the end of sys.path, and import it by its full name.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Unpack

import torch
from torch import Tensor
from torch.utils.data import Dataset

if __name__ == "datasets":  # imported by its bare name: the repository root may be unknown
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from multimodal.pairs.audiocaps import AudioCaps
from multimodal.pairs.clotho import Clotho
from multimodal.pairs.coco import Coco
from multimodal.pairs.samples import SPLITS, Counts, Hearing, Sample, collate
from multimodal.pairs.sources import DATA_SETS, NAMES
from multimodal.pairs.voxceleb import VoxCeleb
from shared.distributed import World
from shared.errors import UserError, one_line
from shared.loader import TrainBatches
from shared.seed import derive

__all__ = [
    "NAMES",
    "SPLITS",
    "AudioCaps",
    "Clotho",
    "Coco",
    "Counts",
    "Sample",
    "VoxCeleb",
    "collate",
]

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
AnyDataSet = Coco | Clotho | AudioCaps | VoxCeleb
Target = Literal["classes", "keywords", "spectrogram"]


@dataclass(frozen=True)
class Task:
    """What one kind of batch is for."""

    name: str  # in charts and reports
    modalities: tuple[str, ...]  # one, or two in the order of a name in model.PAIRS
    contrasts: bool  # the two modalities of a pair find each other
    target: Target | None = None  # labels to predict, or the hidden parts of a sound

    @property
    def pair(self) -> str:
        """Whose temperature it uses."""
        return "_".join(name.removesuffix("_2") for name in self.modalities)


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

    def steps(self, rows: int) -> int:
        """Whole batches of `rows` samples, over all processes, of a pass."""
        return self.training.steps(rows)


@dataclass
class Sources:
    """All sources, and what the report says of their data sets."""

    found: list[Source] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def keywords(self) -> list[str]:
        """The names behind the keyword head's outputs; empty without keywords."""
        named = (source.training for source in self.found if source.target == "keywords")
        return [name for items in named for name in items.label_names]

    @property
    def fills_in(self) -> bool:
        """Whether parts of sounds are hidden and filled in."""
        return any(source.alone == "spectrogram" for source in self.found)

    @property
    def sizes(self) -> dict[str, str]:
        """Found and expected items of each split, for the run's status."""
        return {
            f"{note['data_set']}, {note['split']}": f"{note['found']} of {note['expected']}"
            for note in self.notes
            if "found" in note
        }


class OnePerGroup(Dataset[Batch]):
    """Items of which no batch holds two of one group: two pictures of a scene, or two of a voice.

    As it is, it holds the first item of each group, for validation; `of_pass` has all of them.
    pairs: an item is two sounds of the group, `audio` and `audio_2`.
    """

    def __init__(self, items: Grouped, *, pairs: bool = False) -> None:
        self._items, self._pairs = items, pairs
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
        return self.item(index, 0, ahead=1)

    def item(self, group: int, member: int, ahead: int | None = None) -> Batch:
        """A group's item. ahead: which of the others is the second sound of a pair; None: drawn."""
        members = self._groups[group]
        item = self._items[members[member]]
        if not self._pairs:
            return item
        ahead = ahead or 1 + int(torch.randint(len(members) - 1, ()))
        other = self._items[members[(member + ahead) % len(members)]]
        return {"audio": item["audio"], "audio_2": other["audio"]}

    def steps(self, rows: int) -> int:
        """The batches of `rows` items of different groups that a pass over all items gives.

        As many as there can be: all items, but for an incomplete batch, unless a few groups have
        most of the items.
        """
        sizes = [len(members) for members in self._groups]
        most = sum(sizes) // rows
        while sum(min(size, most) for size in sizes) < most * rows:
            most -= 1
        return most

    def of_pass(self, rows: int, seed: int, number: int) -> Dataset[Batch]:
        """The items of pass `number`, placed so that make_loader's batches have different groups.

        rows: of a batch, over all processes. Which items meet is drawn anew for every pass.
        """
        if all(len(members) == 1 for members in self._groups):
            return self
        generator = torch.Generator().manual_seed(derive(seed, number))
        waiting = [
            torch.randperm(len(members), generator=generator).tolist() for members in self._groups
        ]
        left = torch.tensor([len(members) for members in waiting], dtype=torch.float64)
        batches = []
        for _ in range(self.steps(rows)):
            drawn = torch.rand(len(left), generator=generator, dtype=torch.float64)
            groups = (left + drawn).topk(rows).indices  # the fullest first, else by chance
            left[groups] -= 1
            batches.append([(group, waiting[group].pop()) for group in groups.tolist()])
        order = torch.randperm(len(batches), generator=generator).tolist()
        wanted = [item for place in order for item in batches[place]]
        taken = TrainBatches(len(wanted), rows, World(), seed=seed, epoch=number)
        places = [index for batch in taken for index in batch]
        return _Pass(self, dict(zip(places, wanted, strict=True)))


class _Pass(Dataset[Batch]):
    """The items of one pass by their places: (group, member)."""

    def __init__(self, items: OnePerGroup, places: dict[int, tuple[int, int]]) -> None:
        self._items, self._places = items, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Batch:
        return self._items.item(*self._places[index])


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
    for name in NAMES:
        if named and name not in named:
            continue
        root = data_root / name
        if not root.is_dir() and not named:
            sources.notes.append({"data_set": name, "left_out": "not there"})
            continue
        try:
            source = _open(name, data_root, options)
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
            f"{data_root} holds nothing to learn from: expected one of {', '.join(NAMES)}; "
            "fetch them by python download_datasets.py --datasets coco clotho audiocaps, or type "
            "--data-root"
        )
    return sources


def _notes(source: Source) -> list[dict[str, Any]]:
    """The counts of a source's splits, and how its pairs are made."""
    pairs = " with ".join(name.replace("_2", " of the same voice") for name in source.modalities)
    return [
        {**asdict(part.counts), "share": _share(part.counts), "used_as": use, "pairs": pairs}
        for part, use in ((source.training, "training"), (source.validation, "validation"))
        if part is not None
    ]


def _share(counts: Counts) -> float:
    return round(counts.found / max(1, counts.expected), 4)


def _open(name: str, data_root: Path, options: DataOptions) -> Source:
    """One source. VoxCeleb: faces with voices where there are frames, else two sounds of a voice.

    Raises UserError for a data set that is not there, or not whole.
    """

    def opened(split: Literal["train", "val"]) -> AnyDataSet:
        return open_split(
            name, data_root, split, options.image_size,
            clip_seconds=options.clip_seconds, cache=options.feature_cache,
        )  # fmt: skip

    train, row = opened("train"), DATA_SETS[name]
    modalities, pairs = row.modalities, False
    if isinstance(train, VoxCeleb) and not train.has_faces:
        log.info("voxceleb has no frames of faces: voices are paired with voices of one speaker")
        modalities, pairs = ("audio", "audio_2"), True
    target = row.labels if getattr(train, "label_names", ()) else None
    alone = target
    if "text" in modalities and "audio" in modalities:
        alone = options.alone(target)
    held_out = _held_out(lambda: opened("val"), pairs=pairs)
    return Source(name, modalities, OnePerGroup(train, pairs=pairs), held_out, target, alone)


def open_split(
    name: str,
    data_root: Path,
    split: Literal["train", "val", "test"],
    image_size: int,
    *,
    train: bool | None = None,
    limit: int | None = None,
    **hearing: Unpack[Hearing],
) -> AnyDataSet:
    """A split of the data set `name` below `data_root`. Raises UserError."""
    root = data_root / name
    if name == "coco":
        return Coco(root, split, image_size=image_size, train=train, limit=limit)
    if name == "voxceleb":
        return VoxCeleb(root, split, image_size=image_size, train=train, limit=limit, **hearing)
    kind = {"clotho": Clotho, "audiocaps": AudioCaps}[name]
    return kind(root, split, train=train, limit=limit, **hearing)


def _held_out(opened: Callable[[], Grouped], *, pairs: bool = False) -> OnePerGroup | None:
    """The validation split, or None with a warning."""
    try:
        found = OnePerGroup(opened(), pairs=pairs)
    except UserError as error:
        log.warning("no validation: %s", one_line(error))
        return None
    return found if len(found) > 1 else None
