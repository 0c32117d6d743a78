"""From the rows of a pass to folders: its table, files put where it says, reports.

    table = Table(state / "scores.jsonl", keys_of(root, names), ("score",))
    table.decide(0.15, "accepted", "rejected")
    folders = Folders(root, out, ("accepted", "rejected", QUARANTINE), link=False)
    for name in folders.place(table.places): ...
    folders.move_strays(table, state / "aside")

A row of scores.jsonl is about a file as it was: `filename`, `size`, `mtime_ns`; then numbers, or
`problem`, why it cannot be read. numpy and the standard library, no torch: a million rows are
decided in some 300 MB, since what is long stays in the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import shutil
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shared import images
from shared.errors import UserError
from shared.files import open_regular, write_atomic
from shared.page import Picture

log = logging.getLogger(__name__)

QUARANTINE = "quarantine"  # the place of what cannot be read
PERCENTILES = (10, 25, 50, 75, 90)
BINS = 24
_BLOCK = 65536  # rows
SIDE = 128  # pixels, the longer side of a picture on a page

_json = json.JSONEncoder(ensure_ascii=False).encode

Row = dict[str, Any]
Keys = NDArray[np.uint64]


# --- files and rows -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One file below the input directory, as it is now."""

    name: str  # relative, with /
    size: int = -1  # -1: it cannot be looked at
    mtime_ns: int = 0

    @property
    def key(self) -> int:
        """A number for name, size and time."""
        return number_of(f"{self.name}\0{self.size}\0{self.mtime_ns}")

    @property
    def row(self) -> Row:
        """What its row begins with."""
        return {"filename": self.name, "size": self.size, "mtime_ns": self.mtime_ns}

    @classmethod
    def at(cls, root: Path, name: str) -> Item:
        """The file `name` below `root`."""
        try:
            found = (root / name).stat()
        except OSError:
            return cls(name)
        return cls(name, found.st_size, found.st_mtime_ns)


def number_of(text: str) -> int:
    """A number below 2**64 that stands for a text."""
    content = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def keys_of(root: Path, names: Iterable[str]) -> Keys:
    """The keys of files as they are now: 8 bytes a file."""
    return np.fromiter((Item.at(root, name).key for name in names), np.uint64)


def scored_rows(path: Path) -> Iterator[tuple[int, int, Row]]:
    """(key, place in the file, row) of every whole row; other lines are passed over.

    Raises UserError for a file that cannot be read.
    """
    try:
        stream = open_regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; move it away") from None
    at = 0
    with stream:
        for line in stream:
            try:
                row = json.loads(line)
                if isinstance(row["filename"], str):
                    item = Item(row["filename"], int(row["size"]), int(row["mtime_ns"]))
                    yield item.key, at, row
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                pass  # the header, or what a killed process left
            at += len(line)


# --- the table ------------------------------------------------------------------------------------


class Table:
    """The rows of the files that are there now, sorted by name; their texts stay in the file."""

    def __init__(self, path: Path, present: Keys, fields: Sequence[str]) -> None:
        """Of the rows of one file the last counts; those whose key is not `present` are not read.

        fields: the numbers that are kept of a row: `values` (N, fields), NaN for unreadable files.
        """
        kind = np.dtype([("key", "u8"), ("at", "i8"), ("content", "S16"),
                         ("values", "f8", (len(fields),))])  # fmt: skip
        names: list[str] = []
        found = np.fromiter(_entries(path, fields, names), kind)
        _, last = np.unique(found["key"][::-1], return_index=True)
        last = len(found) - 1 - last
        last = last[np.isin(found["key"][last], present)]
        order = sorted(last.tolist(), key=names.__getitem__)
        found = found[order]
        self._path, self._offsets, self._contents = path, found["at"], found["content"]
        self.names = [names[number] for number in order]
        self.values = found["values"]
        self.places = np.full(len(order), "", "U10")
        self.keepers = np.arange(len(order))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def scores(self) -> NDArray[np.float64]:
        """The first of the values (N,)."""
        return self.values[:, 0]

    @property
    def is_readable(self) -> NDArray[np.bool_]:
        """Which files have a score (N,)."""
        return ~np.isnan(self.scores)

    def decide(self, threshold: float, accepted: str, rejected: str) -> None:
        """Put what scores at least `threshold` to `accepted`, other files to `rejected`.

        What cannot be read goes into quarantine.
        """
        chosen = np.where(self.scores >= threshold, accepted, rejected)
        self.places = np.where(self.is_readable, chosen, QUARANTINE)

    def find_duplicates(self, accepted: str) -> None:
        """Note in `keepers` (N,) the first accepted file of the same content, or itself."""
        rows = np.flatnonzero(self.places == accepted)
        self.keepers = np.arange(len(self))
        if len(rows):
            contents, first = np.unique(self._contents[rows], return_index=True)
            near = np.searchsorted(contents, self._contents).clip(max=len(contents) - 1)
            is_same = self.is_readable & (contents[near] == self._contents)
            self.keepers = np.where(is_same, rows[first[near]], self.keepers)

    def reject_duplicates(self, accepted: str, rejected: str) -> None:
        """Of accepted files with the same content keep the first by name."""
        is_copy = (self.places == accepted) & (self.keepers != np.arange(len(self)))
        self.places[is_copy] = rejected

    def refuse_mostly_unreadable(self, most: float, undone: str) -> None:
        """Raise UserError when more than the share `most` is unreadable; undone: what is not."""
        bad = np.flatnonzero(~self.is_readable)
        if len(bad) > most * len(self):
            row = next(self.rows(bad[:1]))
            raise UserError(
                f"{len(bad)} of {len(self)} files cannot be read, more than --max_unreadable "
                f"{most:g}; the first is {row['filename']} ({row['problem']}); nothing was {undone}"
            )

    def count(self, place: str) -> int:
        """How many files a place has."""
        return int((self.places == place).sum())

    def rows(self, chosen: Iterable[int] | None = None) -> Iterator[Row]:
        """The rows as they are in the file, or those with the numbers `chosen`."""
        with self._path.open("rb") as stream:
            for number in range(len(self)) if chosen is None else chosen:
                stream.seek(self._offsets[number])
                yield json.loads(stream.readline())

    def entries(self) -> Iterator[tuple[str, list[float], str, int]]:
        """Name, values, place and keeper of each file, by blocks: numpy is slow one by one."""
        for start in range(0, len(self), _BLOCK):
            block = slice(start, start + _BLOCK)
            columns = (self.values, self.places, self.keepers)
            yield from zip(
                self.names[block], *(column[block].tolist() for column in columns), strict=True
            )

    def unreadable(self) -> list[dict[str, str]]:
        """Name and reason of what cannot be read."""
        rows = self.rows(np.flatnonzero(~self.is_readable))
        return [{"filename": row["filename"], "reason": row["problem"]} for row in rows]

    def place_of(self, name: str) -> str | None:
        """Where a file belongs, or None for a name that is unknown."""
        number = bisect_left(self.names, name)
        is_there = number < len(self) and self.names[number] == name
        return str(self.places[number]) if is_there else None


def _entries(path: Path, fields: Sequence[str], names: list[str]) -> Iterator[tuple[Any, ...]]:
    """key, place, content and values of the rows; their names go to `names`."""
    nothing = (np.nan,) * len(fields)
    for key, at, row in scored_rows(path):
        try:
            content = bytes.fromhex(row.get("content", ""))
            is_unreadable = isinstance(row.get("problem"), str)
            values = nothing if is_unreadable else tuple(float(row[field]) for field in fields)
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
        if is_unreadable or all(map(math.isfinite, values)):
            names.append(row["filename"])
            yield key, at, content, values


# --- numbers of many scores -----------------------------------------------------------------------


def statistics(scores: NDArray[np.float64]) -> dict[str, float]:
    """count, mean, std, min, max, median and percentiles p10 … p90 of at least one score."""
    found = {"mean": scores.mean(), "std": scores.std(), "min": scores.min(),
             "max": scores.max(), "median": np.median(scores)}  # fmt: skip
    found |= {f"p{place}": np.percentile(scores, place) for place in PERCENTILES}
    return {"count": len(scores)} | {name: float(value) for name, value in found.items()}


def histogram(scores: NDArray[np.float64]) -> dict[str, list[float]]:
    """`edges` (BINS + 1) and `counts` (BINS) of at least one score."""
    low, high = float(scores.min()), float(scores.max())
    counts, edges = np.histogram(scores, BINS, (low, high if high > low else low + 1e-6))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def text_histogram(found: Mapping[str, Sequence[float]], threshold: float) -> str:
    """A histogram for a terminal, a line a bin; an arrow marks the threshold."""
    most = max(found["counts"]) or 1
    lines = []
    for (left, right), count in zip(pairwise(found["edges"]), found["counts"], strict=True):
        mark = ">" if left <= threshold < right else " "
        lines.append(f"  {left:+.4f} {mark} {'#' * round(40 * count / most)} {int(count)}")
    return "\n".join(lines)


# --- files to their places ------------------------------------------------------------------------


@dataclass(frozen=True)
class Folders:
    """The folders `names` of `target`, which get files of `source`; link: symbolic links.

    Sources are read, never moved or changed.
    """

    source: Path
    target: Path
    names: tuple[str, ...]
    link: bool

    def place(self, table: Table) -> Iterator[str]:
        """Bring each file of the table to target/place/name; yields the names.

        A file that an earlier decision put into another of the folders is moved from there.
        """
        for name, folder in zip(table.names, table.places, strict=True):
            if folder:
                goal = self.target / folder / name
                others = [self.target / other / name for other in self.names if other != folder]
                _bring(self.source / name, goal, others, self.link)
            yield name

    def move_strays(self, table: Table, aside: Path) -> int:
        """Move what is here and not where the table says into `aside`; how many."""
        moved = 0
        for folder in self.names:
            for path in _files_below(self.target / folder):
                name = path.relative_to(self.target / folder).as_posix()
                if table.place_of(name) != folder:
                    goal = _free(aside / folder / name)
                    goal.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(goal)
                    moved += 1
        if moved:
            log.info("%d file(s) that this run did not decide on are now in %s", moved, aside)
        return moved


def _bring(source: Path, goal: Path, others: list[Path], link: bool) -> None:
    if not source.exists():  # a link that leads nowhere, or gone since it was scored
        log.warning("not copied: %s is not there", source)
        return
    link = link or not source.is_file()  # a pipe or a device cannot be copied
    there = [other for other in others if os.path.lexists(other)]
    if there and not os.path.lexists(goal) and _is_same(source, there[0], link):
        goal.parent.mkdir(parents=True, exist_ok=True)
        there[0].replace(goal)
    if not _is_same(source, goal, link):
        goal.parent.mkdir(parents=True, exist_ok=True)
        _put(source, goal, link)


def _is_same(source: Path, goal: Path, link: bool) -> bool:
    """Whether `goal` is what `_put` would make of `source`."""
    if link:
        return goal.is_symlink() and goal.readlink() == source.resolve()
    if goal.is_symlink() or not goal.exists():
        return False
    ours, theirs = source.stat(), goal.stat()
    return (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)


def _put(source: Path, goal: Path, link: bool) -> None:
    temporary = goal.with_name(f"{goal.name}.tmp.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    if link:
        temporary.symlink_to(source.resolve())
    else:
        shutil.copy2(source, temporary)  # with its times: a later pass sees the same file
    temporary.replace(goal)


def _files_below(folder: Path) -> Iterator[Path]:
    for base, _, names in os.walk(folder):
        yield from (Path(base) / name for name in sorted(names))


def _free(path: Path) -> Path:
    number, free = 1, path
    while os.path.lexists(free):
        free = path.with_name(f"{path.name}.{number}")
        number += 1
    return free


# --- reports --------------------------------------------------------------------------------------


def write_report(path: Path, head: dict[str, Any], results: Iterable[dict[str, Any]]) -> None:
    """One JSON object: `head`, and the `results` as its last member, a line each."""

    def write(stream: IO[bytes]) -> None:
        start = json.dumps(head, indent=2, ensure_ascii=False).rpartition("\n}")[0]
        stream.write(f'{start},\n  "results": ['.encode())
        separator = "\n    "
        for result in results:
            stream.write((separator + _json(result)).encode())
            separator = ",\n    "
        stream.write(b"\n  ]\n}\n")

    write_atomic(path, write)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, atomically."""

    def write(stream: IO[bytes]) -> None:
        for row in rows:
            stream.write((_json(row) + "\n").encode())

    write_atomic(path, write)


def gallery(root: Path, captions: Iterable[tuple[str, str]]) -> list[Picture | str]:
    """Of each (file below `root`, caption) a small copy; of one that is gone its caption."""
    from PIL import Image

    cells: list[Picture | str] = []
    for name, text in captions:
        caption = images.printable(text)
        try:
            decoded = images.read_rgb(root / name)
        except ValueError:
            cells.append(f"(gone) {caption} ")
            continue
        small, encoded = Image.fromarray(decoded.permute(1, 2, 0).numpy()), io.BytesIO()
        small.thumbnail((SIDE, SIDE))
        small.save(encoded, "JPEG", quality=80)
        cells.append(Picture(encoded.getvalue(), name, caption))
    return cells
