"""What is known of each picture: JSON lines, one file a process, that a killed pass goes on from.

A row belongs to a file as it is now: `filename` with its `size` and `mtime_ns`. `Parts` keeps the
rows of one pass (the directory's name says which model and prompts); what they hold beyond that is
the pass's business.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shared.distributed import World
from shared.files import open_regular, read_json_lines

log = logging.getLogger(__name__)

Row = dict[str, Any]
Keys = NDArray[np.uint64]  # sorted


@dataclass(frozen=True)
class Item:
    """One file below the input directory, as it is now."""

    name: str  # relative, with /
    size: int = -1  # -1: it cannot be looked at
    mtime_ns: int = 0

    @property
    def key(self) -> int:
        """A number for name, size and time."""
        return _number(f"{self.name}\0{self.size}\0{self.mtime_ns}")

    @classmethod
    def at(cls, root: Path, name: str) -> Item:
        """The file `name` below `root`."""
        try:
            found = (root / name).stat()
        except OSError:
            return cls(name)
        return cls(name, found.st_size, found.st_mtime_ns)

    @classmethod
    def of(cls, row: Row) -> Item:
        """The file that a row is about."""
        return cls(row["filename"], row["size"], row["mtime_ns"])


def owner(name: str, world_size: int) -> int:
    """The rank that a file belongs to: from its name alone, whatever else is there."""
    return _number(name) % world_size


def sample(names: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` of the names by lot; the same ones in whatever order they come."""
    import heapq

    drawn = heapq.nsmallest(count, ((_number(f"{seed}\0{name}"), name) for name in names))
    return sorted(name for _, name in drawn)


def keys_of(root: Path, names: Iterable[str]) -> Keys:
    """The keys of files as they are now, sorted: 8 bytes a file."""
    return np.sort(np.fromiter((Item.at(root, name).key for name in names), np.uint64))


def holds(keys: Keys, key: int) -> bool:
    """Whether `key` is among the sorted `keys`."""
    place = int(np.searchsorted(keys, np.uint64(key)))
    return place < len(keys) and int(keys[place]) == key


class Parts:
    """The rows of a pass in `directory`, part-<rank>.jsonl of each process."""

    def __init__(self, directory: Path, world: World) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self._world = directory, world

    def __iter__(self) -> Iterator[Row]:
        """Every row, of every process that ever wrote here."""
        for path in sorted(self.directory.glob("part-*.jsonl")):
            for row in read_json_lines(path):
                if _is_whole(row):
                    yield row

    def pending(self, root: Path, names: Iterable[str]) -> list[Item]:
        """This rank's files among `names` that no row tells of yet."""
        done = np.sort(np.fromiter((Item.of(row).key for row in self), np.uint64))
        own = (name for name in names if owner(name, self._world.size) == self._world.rank)
        items = (Item.at(root, name) for name in own)
        return [item for item in items if not holds(done, item.key)]

    def open(self) -> IO[str]:
        """This rank's file, to append to; a line cut off by a kill is cut away."""
        path = self.directory / f"part-{self._world.rank:04d}.jsonl"
        with path.open("ab+") as stream:
            end = stream.tell()
            if end:
                stream.seek(max(0, end - (1 << 20)))
                tail = stream.read()
                torn = len(tail) - (tail.rfind(b"\n") + 1)
                if torn:
                    log.info("%s: %d bytes of an unfinished row are cut away", path, torn)
                    os.ftruncate(stream.fileno(), end - torn)
        return path.open("a", encoding="utf-8")


def file_identity(path: Path) -> str:
    """Changes with the content of a file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:24]


def line_of(row: Row) -> str:
    """A row as its line."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def _is_whole(row: Row) -> bool:
    """Whether a row says what `Item.of` and the ledger ask it for, in texts that UTF-8 has."""
    texts = [row.get("filename"), row.get("digest") or "", row.get("problem") or ""]
    if not all(isinstance(text, str) for text in texts):
        return False
    whole = isinstance(row.get("size"), int) and isinstance(row.get("mtime_ns"), int)
    try:
        "".join(texts).encode()  # type: ignore[arg-type]
    except UnicodeEncodeError:
        return False
    return whole and isinstance(row.get("score") or 0.0, int | float)


def _number(text: str) -> int:
    content = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
