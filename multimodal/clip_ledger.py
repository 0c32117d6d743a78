"""What became of every clip of AudioCaps: one JSON line each in clips.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from multimodal import audio
from multimodal.audiocaps import Clip, listed_clips
from shared.files import read_json_lines
from shared.status import now

SPLITS = ("train", "val", "test")
OK, UNAVAILABLE, BLOCKED, FAILED = "ok", "unavailable", "blocked", "failed"


@dataclass(frozen=True)
class Wanted:
    """A clip that is not there yet, and where its sound goes (without suffix)."""

    split: str
    clip: Clip
    target: Path

    @property
    def start(self) -> str:
        """Seconds into the video."""
        return self.clip.key.rpartition("_")[2]


class Ledger:
    """The record of clips; the last line of a clip counts."""

    def __init__(self, root: Path) -> None:
        self._path = root / "clips.jsonl"
        self._status = {
            row["key"]: str(row.get("status"))
            for row in read_json_lines(self._path)
            if isinstance(row.get("key"), str)
        }

    def add(self, wanted: Wanted, status: str, reason: str, source: str) -> None:
        """Write down what became of a clip, at once."""
        self._status[wanted.clip.key] = status
        row = {"key": wanted.clip.key, "split": wanted.split, "status": status}
        row |= {"reason": reason, "source": source, "at": now()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def is_gone(self, clip: Clip) -> bool:
        """Whether the video was found to be unavailable, for good."""
        return self._status.get(clip.key) == UNAVAILABLE


def missing(root: Path) -> list[Wanted]:
    """The listed clips without a sound, test and validation first. Raises UserError."""
    found = []
    for split in reversed(SPLITS):
        folder = root / "audio" / split
        there = {path.stem for path in folder.glob("*") if path.suffix in audio.SUFFIXES}
        for clip in listed_clips(root / f"{split}.csv"):
            if clip.key not in there:
                found.append(Wanted(split, clip, folder / clip.key))
    return found


def summary(root: Path) -> str:
    """'46,231 of 49,838 train, …; not there: 12 blocked, 3,595 unavailable'."""
    ledger, left = Ledger(root), missing(root)
    absent = Counter(wanted.split for wanted in left)
    totals = {split: len(listed_clips(root / f"{split}.csv")) for split in SPLITS}
    parts = [f"{totals[split] - absent[split]:,} of {totals[split]:,} {split}" for split in SPLITS]
    states = Counter(ledger._status.get(wanted.clip.key, "not tried") for wanted in left)
    why = ", ".join(f"{count:,} {state}" for state, count in sorted(states.items()))
    return ", ".join(parts) + (f"; not there: {why}" if why else "")
