"""VoxCeleb: voices of people, with frames of their faces where these were put beside them."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Unpack

import torch
from torch import Tensor
from torch.utils.data import Dataset

from multimodal.pairs import samples
from multimodal.pairs.samples import Hearing, Sample, Sounds
from multimodal.pairs.sources import SOUNDS
from shared.errors import UserError
from shared.images import SUFFIXES
from shared.seed import derive

_SPEAKER = re.compile(r"id(\d{5})")
_TEST_SPEAKERS = range(10270, 10310)  # of VoxCeleb1, where no list says
_SETS = ("dev", "test")
_HELD_OUT = 20  # one of so many speakers outside the test set validates


@dataclass(frozen=True)
class _Utterance:
    speaker: str
    video: str
    file: Path


class VoxCeleb(Dataset[Sample]):
    """Items are dicts: audio (T, 80), speaker (); with frames of the video also images (3, S, S).

    root: holds wav/<speaker>/<video>/<number>.wav, and faces/<speaker>/<video>/*.jpg where there
        are frames; vox1_meta.csv or vox2_meta.csv tells the test speakers apart.
    split: by speakers: test is VoxCeleb's, one of twenty others validates (of twelve, four).
    Only utterances of videos with frames are items where any frames are there: `has_faces`.
    train: random part of the sound and random frame; default: for the split train alone.
    Also `counts`, and of an item `path(index)`, `group_of(index)`; `speaker` runs from 0.
    Raises UserError.
    """

    def __init__(
        self,
        root: Path,
        split: Literal["train", "val", "test"],
        *,
        image_size: int = 224,
        train: bool | None = None,
        limit: int | None = None,
        **hearing: Unpack[Hearing],
    ) -> None:
        samples.checked_split(split)
        self._size, self._is_train = image_size, split == "train" if train is None else train
        self._sounds = Sounds(train=self._is_train, **hearing)
        self._faces = _faces(root / "faces")
        listed = [item for item in _utterances(root) if self._is_item(item)]
        speakers = sorted({item.speaker for item in listed})
        chosen = _of_split(speakers, split, _test_speakers(root))
        listed = [item for item in listed if item.speaker in chosen]
        self._items, self.counts = samples.usable(
            listed, lambda item: item.file, samples.sound_problem,
            of=("voxceleb", split), what="utterances", where=root,
            form="wav/<speaker>/<video>/<number>.wav", limit=limit,
        )  # fmt: skip
        self._numbers = {speaker: number for number, speaker in enumerate(sorted(chosen))}
        self._replacing = samples.Replacing("voxceleb", "utterances")

    @property
    def has_faces(self) -> bool:
        """Whether items hold `images`."""
        return bool(self._faces)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        return self._replacing.load(index, len(self), self._load)

    def _load(self, index: int) -> Sample:
        speaker = torch.tensor(self._numbers[self._items[index].speaker])
        sample = {"audio": self.sound(index), "speaker": speaker}
        return sample | ({"images": self.image(index)} if self.has_faces else {})

    def sound(self, index: int) -> Tensor:
        """The sound alone, float32 (T, 80). Raises audio.AudioError, which names the file."""
        return self._sounds.features(self.path(index))

    def image(self, index: int) -> Tensor:
        """A frame of the item's video, float32 (3, S, S). Raises ValueError with the file."""
        item = self._items[index]
        frames = self._faces[item.speaker, item.video]
        read = samples.read_cropped_picture if self._is_train else samples.read_picture
        frame = frames[int(torch.randint(len(frames), ())) if self._is_train else len(frames) // 2]
        try:
            return read(frame, self._size)
        except ValueError as error:
            raise ValueError(f"{frame}: {error}") from None

    def path(self, index: int) -> Path:
        """The item's sound file."""
        return self._items[index].file

    def group_of(self, index: int) -> str:
        """The speaker: a batch must not hold two items of one group."""
        return self._items[index].speaker

    def _is_item(self, item: _Utterance) -> bool:
        return not self._faces or (item.speaker, item.video) in self._faces


def _utterances(root: Path) -> list[_Utterance]:
    found = [
        _Utterance(path.parts[-3], path.parts[-2], path)
        for path in sorted((root / "wav").glob("id*/*/*"))
        if path.suffix.lower() in SOUNDS and _SPEAKER.fullmatch(path.parts[-3])
    ]
    if not found:
        raise UserError(
            f"{root} holds no wav/<speaker>/<video>/<number>.wav: python download_datasets.py "
            "--datasets voxceleb says how to get VoxCeleb"
        )
    return found


def _faces(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """(speaker, video) → its frames in order."""
    found: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("id*/*/*")):
        if path.suffix.lower() in SUFFIXES:
            found[path.parts[-3], path.parts[-2]].append(path)
    return dict(found)


def _test_speakers(root: Path) -> set[str]:
    """The speakers that a list calls test, and VoxCeleb1's of which no list tells."""
    set_of: dict[str, str] = {}
    for path in (root / "vox1_meta.csv", root / "vox2_meta.csv"):
        if path.is_file():
            set_of |= _listed(path)
    named = {speaker for speaker, name in set_of.items() if name == "test"}
    return named | ({f"id{number}" for number in _TEST_SPEAKERS} - set_of.keys())


def _listed(path: Path) -> dict[str, str]:
    """Speaker → dev or test. Raises UserError for a line or a whole list that does not say it."""
    found: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        cells = [cell.strip(" \"'") for cell in re.split(_separator(line), line)]
        speaker = next((cell for cell in cells if _SPEAKER.fullmatch(cell)), None)
        if speaker is None:
            continue  # the header, a blank line
        name = next((cell.lower() for cell in cells[::-1] if cell.lower() in _SETS), None)
        if name is None:
            raise UserError(
                f"{path}, line {number}: {speaker} is in none of the sets {' and '.join(_SETS)}; "
                "fetch the list again"
            )
        found[speaker] = name
    if not found:
        raise UserError(
            f"{path} names no speaker: expected lines such as id10270, …, test with tabs, commas "
            "or spaces between; fetch the list again, or take it away to hold out VoxCeleb1's "
            "test speakers"
        )
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _separator(line: str) -> str:
    """VoxCeleb1's list is about with tabs and with commas, VoxCeleb2's has ` ,`."""
    return next((mark for mark in "\t,;" if mark in line), r"\s+")


def _of_split(speakers: list[str], split: str, test: set[str]) -> set[str]:
    if split == "test":
        return {speaker for speaker in speakers if speaker in test}
    others = [speaker for speaker in speakers if speaker not in test]
    ranked = sorted(others, key=lambda speaker: derive(int(speaker[2:])))
    fewest = min(4, len(others) // 3)
    held_out = set(ranked[: max(fewest, len(others) // _HELD_OUT)])
    return held_out if split == "val" else set(others) - held_out
