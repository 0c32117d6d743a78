"""AudioCaps: ten seconds of a YouTube video with one caption, five in validation and test."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Unpack

from torch import Tensor
from torch.utils.data import Dataset

from multimodal.pairs import samples
from multimodal.pairs.samples import Hearing, Sample, Sounds, read_table
from multimodal.pairs.sources import SOUNDS
from shared.errors import UserError

COLUMNS = ["audiocap_id", "youtube_id", "start_time", "caption"]
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
# <video>, Y<video>, <video>_<start>, <video>_<start>.000_<end>.000: names that are about
NAME = re.compile(
    r"Y?(?P<video>[A-Za-z0-9_-]{11})(?:_(?P<start>\d+)(?:\.\d+)?(?:_\d+(?:\.\d+)?)?)?"
)

log = logging.getLogger(__name__)


@dataclass
class Clip:
    """A clip of the list. key: <youtube id>_<start in seconds>, the name of its file."""

    video: str
    key: str
    captions: list[str] = field(default_factory=list)

    @property
    def start(self) -> str:
        """Seconds into the video."""
        return self.key.rpartition("_")[2]


class AudioCaps(Dataset[Sample]):
    """Items are dicts: audio (T, 80), input_ids (77), attention_mask (77).

    root: holds train.csv, val.csv and test.csv, and audio/<split>/<youtube id>_<start>.flac (or
        wav, ogg, mp3). Clips that are listed and not there are counted: videos vanish.
    train: random part of the sound and random caption; default: for the split train alone.
    clip_seconds, eval_seconds, cache: see samples.Sounds. limit: so many clips, spread.
    Also `counts`, and of an item `captions(index)`, `path(index)`, `group_of(index)`.
    Raises UserError.
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
        samples.checked_split(split)
        self._is_train = split == "train" if train is None else train
        self._sounds = Sounds(train=self._is_train, **hearing)
        listed = listed_clips(root / f"{split}.csv")
        files = files_of(listed, _folder(root, split))
        self._clips, self.counts = samples.usable(
            listed, lambda clip: files.get(clip.key), samples.sound_problem,
            of=("audiocaps", split), what="clips", where=root / f"{split}.csv",
            form=f"audio/{split}/<youtube_id>_<start_time>.flac (or wav, ogg, mp3)", limit=limit,
        )  # fmt: skip
        self._files = files
        self._replacing = samples.Replacing("audiocaps", "clips")

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Sample:
        return self._replacing.load(index, len(self), self._load)

    def _load(self, index: int) -> Sample:
        text = samples.text_of(samples.pick(self._clips[index].captions, self._is_train))
        return {"audio": self.sound(index), **text}

    def sound(self, index: int) -> Tensor:
        """The sound alone, float32 (T, 80). Raises audio.AudioError, which names the file."""
        return self._sounds.features(self.path(index))

    def captions(self, index: int) -> list[str]:
        """The item's captions: one of the split train, five of the others."""
        return self._clips[index].captions

    def path(self, index: int) -> Path:
        """The item's file."""
        return self._files[self._clips[index].key]

    def group_of(self, index: int) -> str:
        """The video: a batch must not hold two items of one group."""
        return self._clips[index].video


def listed_clips(path: Path) -> list[Clip]:
    """The clips of a list in its order, with their captions. Raises UserError with the line."""
    clips: dict[str, Clip] = {}
    for line, row in read_table(path, "utf-8-sig", COLUMNS):
        video, start = row["youtube_id"], row["start_time"]
        if not _YOUTUBE_ID.fullmatch(video) or not start.isdecimal():
            raise UserError(
                f"{path}, line {line}: youtube_id {video!r} and start_time {start!r}, expected 11 "
                "characters of A-Z a-z 0-9 _ - and a number of seconds"
            )
        caption = " ".join(row["caption"].split())
        if not caption:
            log.warning("%s, line %d: the caption is empty and left out", path, line)
            continue
        clip = clips.setdefault(f"{video}_{start}", Clip(video, f"{video}_{start}"))
        clip.captions.append(caption)
    return list(clips.values())


def _folder(root: Path, split: str) -> Path:
    """Where the sounds of a split are."""
    folders = (root / "audio" / split, root / split, root / "audio")
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def files_of(clips: Sequence[Clip], folder: Path) -> dict[str, Path]:
    """Key → sound of the clips whose file is below `folder`, by any name that NAME knows.

    A name without the start will do for the only clip of a video.
    """
    found = _named_sounds(folder)
    clips_of = Counter(clip.video for clip in clips)
    files = {}
    for clip in clips:
        path = found.get((clip.video, clip.start))
        if path is None and clips_of[clip.video] == 1:
            path = found.get((clip.video, None))
        if path is not None:
            files[clip.key] = path
    return files


def _named_sounds(directory: Path) -> dict[tuple[str, str | None], Path]:
    """(video, start or None) → file of every sound whose name says what it is."""
    found: dict[tuple[str, str | None], Path] = {}
    for folder, _, names in os.walk(directory):
        for name in sorted(names):
            path = Path(folder) / name
            match = NAME.fullmatch(path.stem)
            if match and path.suffix.lower() in SOUNDS and path.is_file():
                start = match["start"]
                found[match["video"], start and str(int(start))] = path
    return found
