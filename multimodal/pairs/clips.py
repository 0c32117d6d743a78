"""AudioCaps' sounds: from a directory, a repository of the Hub, or YouTube.

What became of every clip is one JSON line in clips.jsonl.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal.pairs.audiocaps import NAME, Clip, files_of, listed_clips
from multimodal.pairs.sources import SOUNDS
from shared.download import part_of
from shared.errors import MissingToolError, UserError, one_line
from shared.files import read_json_lines, write_atomic
from shared.status import now
from shared.unpack import Run, unpack
from shared.web import DownloadError

SPLITS = ("train", "val", "test")
OK, UNAVAILABLE, BLOCKED, FAILED = "ok", "unavailable", "blocked", "failed"


@dataclass(frozen=True)
class Wanted:
    """A clip that is not there yet, and where its sound goes (without suffix)."""

    split: str
    clip: Clip
    target: Path


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
        listed = listed_clips(root / f"{split}.csv")
        there = files_of(listed, folder)
        for clip in listed:
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


# --- where sounds come from -----------------------------------------------------------------------

log = logging.getLogger(__name__)

MOST_BLOCKS = 10  # in a row, until YouTube is left alone
_SECONDS = 10  # of a clip
_OPTIONS = (  # of yt-dlp: the best sound, as flac of one channel at 32 kHz
    *("--quiet", "--no-playlist", "--force-overwrites", "--socket-timeout", "20"),
    *("-f", "bestaudio/best", "-x", "--audio-format", "flac"),
    *("--postprocessor-args", "ExtractAudio:-ac 1 -ar 32000"),
)
_BLOCKED = re.compile(r"not a bot|HTTP Error 429|rate.limit", re.IGNORECASE)
_GONE = re.compile(
    r"unavailable|private video|removed|terminated|not available|copyright|members.only|"
    r"inappropriate|confirm your age|does not exist",
    re.IGNORECASE,
)

Finished = tuple[int, str, str]  # exit code, standard output, standard error
Ask = Callable[[Sequence[str]], Finished]


def from_directory(root: Path, directory: Path, source: str) -> None:
    """Link (or copy) the clips' sounds found below `directory` into the data set.

    Raises UserError when it holds none of them.
    """
    wanted = missing(root)
    found = files_of([item.clip for item in wanted], directory)
    ledger, count = Ledger(root), 0
    for item in wanted:
        path = found.get(item.clip.key)
        if path is not None:
            _put(path, item.target.with_name(item.target.name + path.suffix.lower()))
            ledger.add(item, OK, "", source)
            count += 1
    if wanted and not count:
        raise UserError(
            f"--audiocaps-source {source}: none of the {len(wanted)} missing clips is below "
            f"{directory}; names are <youtube id>_<start>.flac (or wav, ogg, mp3)"
        )
    log.info("audiocaps: %d clips out of %s", count, directory)


def _put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except FileExistsError:
        return
    except OSError:  # another disk, or one without links
        part = part_of(target)
        shutil.copyfile(source, part)
        part.replace(target)


def from_hub(root: Path, repo_id: str, endpoint: str, run: Run | None) -> None:
    """Fetch a data set repository's sounds, plain, in archives or in tables, and take the clips.

    Raises UserError for a repository that holds none of these, and what fetching raises.
    """
    from shared.hub import open_hub

    repository = open_hub(repo_id, "main", endpoint=endpoint, kind="dataset")
    names = sorted(repository.files)
    sounds = [name for name in names if Path(name).suffix.lower() in SOUNDS]
    wanted = {item.clip.video for item in missing(root)}
    sounds = [
        name
        for name in sounds
        if (match := NAME.fullmatch(Path(name).stem)) and match["video"] in wanted
    ]
    archives = [name for name in names if name.endswith((".zip", ".tar", ".tar.gz", ".tgz", ".7z"))]
    tables = [name for name in names if name.endswith(".parquet")]
    if not sounds and not archives and not tables:
        kinds = sorted({Path(name).suffix for name in names})
        raise UserError(
            f"--audiocaps-source hf:{repo_id} holds no sounds named <youtube id>_<start>, no zip, "
            f"tar or 7z archives and no parquet, only {', '.join(kinds)}: unpack them yourself and "
            "give local:DIRECTORY"
        )
    directory = root / "downloads" / repo_id.replace("/", "--")
    repository.fetch(repository.plan(sounds or archives or tables, directory))
    for name in archives if not sounds else ():
        unpack([directory / name], directory / "unpacked", run)
    if not sounds and not archives:
        unpack_tables(root, [directory / name for name in tables], directory / "unpacked")
    from_directory(root, directory, f"hf:{repo_id}")


@dataclass(frozen=True)
class YouTube:
    """How to ask YouTube. ask: runs a program. yt_dlp: where it is; ffmpeg must be on PATH."""

    ask: Ask
    yt_dlp: str
    cookies: Path | None = None
    workers: int = 4

    def fetch(self, root: Path) -> None:
        """Fetch the missing clips, several at once; videos that are gone are not asked for again.

        Raises DownloadError when YouTube refuses ten in a row.
        """
        ledger = Ledger(root)
        wanted = [item for item in missing(root) if not ledger.is_gone(item.clip)]
        log.info("audiocaps: %d clips to fetch from YouTube", len(wanted))
        blocks = 0
        with ThreadPoolExecutor(self.workers) as threads:
            try:
                for item, status, reason in self._results(threads, wanted):
                    ledger.add(item, status, reason, "youtube")
                    blocks = blocks + 1 if status == BLOCKED else 0
                    if blocks >= MOST_BLOCKS:
                        raise DownloadError(
                            f"YouTube refused {blocks} clips in a row ({reason}): give --cookies "
                            "FILE of a browser that is logged in, wait some hours, or use "
                            "--audiocaps-source hf:REPO; the same command continues"
                        )
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _results(
        self, threads: ThreadPoolExecutor, wanted: Sequence[Wanted]
    ) -> Iterable[tuple[Wanted, str, str]]:
        """What became of each clip; only a few are asked for ahead, so that stopping is quick."""
        step = 4 * self.workers
        for start in range(0, len(wanted), step):
            group = {
                threads.submit(self._clip, item): item for item in wanted[start : start + step]
            }
            for future in as_completed(group):
                yield (group[future], *future.result())

    def _clip(self, item: Wanted) -> tuple[str, str]:
        """Fetch one clip: (status, reason)."""
        target = item.target.with_name(item.target.name + ".flac")
        target.parent.mkdir(parents=True, exist_ok=True)
        made = item.target.with_name(item.target.name + ".part.flac")  # no name of a clip
        template = str(made.with_suffix("")).replace("%", "%%") + ".%(ext)s"
        start = int(item.clip.start)
        cookies = ["--cookies", str(self.cookies)] if self.cookies else []
        code, _, error = self.ask([
            self.yt_dlp, *_OPTIONS, *cookies,
            "--download-sections", f"*{start}-{start + _SECONDS}",
            "-o", template, f"https://www.youtube.com/watch?v={item.clip.video}",
        ])  # fmt: skip
        if code == 0 and made.is_file() and made.stat().st_size:
            made.replace(target)
            return OK, ""
        made.unlink(missing_ok=True)
        said = [line for line in error.splitlines() if line.startswith("ERROR")]  # ffmpeg says more
        reason = " ".join(said or error.splitlines()[-1:])[-300:] or f"yt-dlp ended with {code}"
        return _status_of(reason), reason


def _status_of(error: str) -> str:
    if _BLOCKED.search(error):
        return BLOCKED
    return UNAVAILABLE if _GONE.search(error) else FAILED


# --- parquet --------------------------------------------------------------------------------------

_ROWS = 64  # read at once
_SUFFIXES = {b"fLaC": ".flac", b"RIFF": ".wav", b"OggS": ".ogg", b"ID3\x03": ".mp3"}


def unpack_tables(root: Path, tables: Sequence[Path], directory: Path) -> None:
    """Write the sounds of the missing clips as <youtube id>_<start>.<kind> into `directory`.

    A row is known by its columns youtube_id and start_time; its sound is in a column `audio` of
    bytes, or of {bytes, path}. Raises UserError for other tables, MissingToolError without pyarrow.
    """
    wanted = {item.clip.key for item in missing(root)}
    directory.mkdir(parents=True, exist_ok=True)
    for path in tables:
        for row in _rows(path):
            key = f"{row['youtube_id']}_{int(float(row['start_time']))}"
            sound = row["audio"]
            content = sound.get("bytes") if isinstance(sound, Mapping) else sound
            if key in wanted and isinstance(content, bytes) and content:
                target = directory / f"{key}{_SUFFIXES.get(content[:4], '.mp3')}"
                write_atomic(target, lambda s, c=content: (s.write(c), None)[1], durable=False)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingToolError(
            f"{path.name} is a parquet file: pip install pyarrow, then type the same command"
        ) from None
    columns = ["youtube_id", "start_time", "audio"]
    try:
        table = pyarrow.parquet.ParquetFile(path)
        lacking = [name for name in columns if name not in table.schema_arrow.names]
        if lacking:
            raise UserError(
                f"{path} has no column {', '.join(lacking)}, only "
                f"{', '.join(table.schema_arrow.names)}: unpack it yourself and give "
                "--audiocaps-source local:DIRECTORY"
            )
        for batch in table.iter_batches(_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as parquet ({one_line(error)})") from None
