"""Clotho v2.1: sounds of 15 to 30 seconds with five captions and keywords each."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Unpack

from torch import Tensor
from torch.utils.data import Dataset

from multimodal.pairs import samples
from multimodal.pairs.samples import Hearing, Sample, Sounds, read_table
from shared.errors import UserError

log = logging.getLogger(__name__)

FOLDERS = {"train": "development", "val": "validation", "test": "evaluation"}


@dataclass(frozen=True)
class _Clip:
    name: str  # the file's, the key of both lists
    captions: list[str]
    labels: list[int]


class Clotho(Dataset[Sample]):
    """Items are dicts: audio (T, 80), input_ids (77), attention_mask (77), labels (80).

    root: holds clotho_captions_*.csv, clotho_metadata_*.csv and the folders development,
        validation and evaluation, as the archives give them.
    split: train is development, val validation, test evaluation.
    train: random part of the sound and random caption; default: for the split train alone.
    clip_seconds, eval_seconds, cache: see samples.Sounds. limit: so many clips, spread.
    `labels` mark which of the 80 keywords most frequent in development the clip has; their names
    are `label_names` (fewer in a small set, none without the metadata). Also `counts`, and of an
    item `captions(index)`, `path(index)`, `group_of(index)`. Raises UserError.
    """

    def __init__(
        self,
        root: Path,
        split: Literal["train", "val", "test"],
        *,
        train: bool | None = None,
        limit: int | None = None,
        **hearing: Unpack[Hearing],
    ) -> None:
        folder = FOLDERS[samples.checked_split(split)]
        self._is_train = split == "train" if train is None else train
        self._sounds = Sounds(train=self._is_train, **hearing)
        files = (root / folder).iterdir() if (root / folder).is_dir() else ()
        self._files = {path.name.lower(): path for path in files}  # .WAV is .wav
        self.label_names = _frequent_keywords(root / "clotho_metadata_development.csv")
        listed = _clips(root, folder, self.label_names)
        self._clips, self.counts = samples.usable(
            listed, lambda clip: self._files.get(clip.name.lower()), samples.sound_problem,
            of=("clotho", folder), what="clips", where=_captions_file(root, folder),
            form=f"{folder}/<file_name of the list>", limit=limit,
        )  # fmt: skip
        self._replacing = samples.Replacing("clotho", "clips")

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Sample:
        return self._replacing.load(index, len(self), self._load)

    def _load(self, index: int) -> Sample:
        clip = self._clips[index]
        text = samples.text_of(samples.pick(clip.captions, self._is_train))
        return {"audio": self.sound(index), **text, "labels": self.labels(index)}

    def sound(self, index: int) -> Tensor:
        """The sound alone, float32 (T, 80). Raises audio.AudioError, which names the file."""
        return self._sounds.features(self.path(index))

    def captions(self, index: int) -> list[str]:
        """The item's five captions."""
        return self._clips[index].captions

    def labels(self, index: int) -> Tensor:
        """float32 (80): ones at the item's labels."""
        return samples.multi_hot(self._clips[index].labels)

    def path(self, index: int) -> Path:
        """The item's file."""
        return self._files[self._clips[index].name.lower()]

    def group_of(self, index: int) -> str:
        """The clip's file name: a batch must not hold two items of one group."""
        return self._clips[index].name


def _captions_file(root: Path, folder: str) -> Path:
    return root / f"clotho_captions_{folder}.csv"


def _clips(root: Path, folder: str, keywords: tuple[str, ...]) -> list[_Clip]:
    path = _captions_file(root, folder)
    columns = [f"caption_{number}" for number in range(1, 6)]
    rows = read_table(path, "utf-8-sig", ["file_name", *columns])
    number_of = {word: number for number, word in enumerate(keywords)}
    keywords_file = root / f"clotho_metadata_{folder}.csv"
    metadata = _keywords(keywords_file)
    if keywords_file.is_file() and not any(metadata.get(row["file_name"]) for _, row in rows):
        raise UserError(
            f"{keywords_file} has keywords for none of the {len(rows)} clips of {path.name}: "
            "expected the same file_name and keywords with ; between; fetch both again, or remove "
            "this one to train without keywords"
        )
    clips = []
    for line, row in rows:
        name = _checked_name(row["file_name"], path, line)
        captions = [text for column in columns if (text := row[column].strip())]
        if not captions:
            log.warning("%s, line %d: %s has no caption and is left out", path, line, name)
            continue
        labels = [number_of[word] for word in metadata.get(name, ()) if word in number_of]
        clips.append(_Clip(name, captions, labels))
    return clips


def _keywords(path: Path) -> dict[str, list[str]]:
    """File name → its keywords, in lower case; {} without the file. It is ISO-8859-1."""
    if not path.is_file():
        return {}
    rows = read_table(path, "iso-8859-1", ["file_name", "keywords"])
    return {
        row["file_name"]: [w for w in map(_plain, row["keywords"].split(";")) if w]
        for _, row in rows
    }


def _plain(word: str) -> str:
    return " ".join(word.lower().split())


def _frequent_keywords(path: Path) -> tuple[str, ...]:
    """The keywords that most clips have, at most 80; of equally frequent ones the first in A-Z."""
    counted = Counter(word for words in _keywords(path).values() for word in set(words))
    ordered = sorted(counted, key=lambda word: (-counted[word], word))
    return tuple(ordered[: samples.NUM_LABELS])


def _checked_name(name: str, path: Path, line: int) -> str:
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise UserError(f"{path}, line {line}: file_name {name!r} is no name of a file")
    return name
