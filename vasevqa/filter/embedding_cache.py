"""Embeddings that stay: one row for the content of a picture and a model, whoever asks for it.

A directory holds, for each model, files of rows `digest (16 bytes), embedding (D float32)`. Every
writer appends to a file that it alone has locked; a row cut off by a kill is cut away by the next
writer. In memory lie the digests (24 bytes a picture); the embeddings are mapped from the disk.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError, one_line
from shared.files import check_regular, write_atomic
from shared.lock import try_to_lock

log = logging.getLogger(__name__)

DIGEST = 16
_TEXT = f"S{DIGEST}"
_FRESH = 50_000  # rows of its own that a writer adds before it sorts anew


def digest_of(content: bytes) -> bytes:
    """What stands for the content of a file."""
    digest = hashlib.blake2b(content, digest_size=DIGEST).digest()
    return digest if digest[-1] else digest[:-1] + b"\1"  # numpy's texts lose zero bytes at the end


class EmbeddingCache:
    """The embeddings of one model, by the digest of a picture's content.

    Rows that other writers append are seen when this one sorts anew.
    """

    def __init__(self, directory: Path, identity: str, dim: int) -> None:
        """Open what is there for the model `identity` with `dim` dimensions; use as a context."""
        self._row = np.dtype([("digest", _TEXT), ("vector", "<f4", (dim,))])
        self._dir = directory / identity
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            self._own = self._open_own()
        except OSError as error:
            raise UserError(
                f"the embedding cache {self._dir} cannot be written: {one_line(error)}; choose "
                "another --cache_dir"
            ) from None
        self._index()

    def __enter__(self) -> EmbeddingCache:
        return self

    def __exit__(self, *_: object) -> None:
        self._own.close()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._fresh or self._place(digest) is not None

    def __len__(self) -> int:
        return len(self._digests) + len(self._fresh)

    def get(self, digest: bytes) -> NDArray[np.float32] | None:
        """The embedding (D,) of a content, or None."""
        if digest in self._fresh:
            size = self._row.itemsize
            content = os.pread(self._own.fileno(), size, self._fresh[digest] * size)
            return np.frombuffer(content, self._row)["vector"][0]
        place = self._place(digest)
        if place is None:
            return None
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._files[number]["vector"][place - self._starts[number]]

    def add(self, digests: list[bytes], vectors: NDArray[np.float32]) -> None:
        """Keep the embeddings (N, D) of N contents; with the system when this returns."""
        rows = np.empty(len(digests), self._row)
        rows["digest"], rows["vector"] = digests, vectors
        first = self._own.tell() // self._row.itemsize
        self._own.write(rows.tobytes())
        self._own.flush()
        self._fresh |= {digest: first + number for number, digest in enumerate(digests)}
        if len(self._fresh) >= _FRESH:
            self._index()

    def table(self, name: str, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """A small array that belongs to the model, made once: the prompts' embeddings (P, D)."""
        path = self._dir / f"{name}.npy"
        try:
            check_regular(path)
            found = np.load(path, allow_pickle=False)
            if found.dtype == np.float32 and found.shape[1:] == self._row["vector"].shape:
                return found
        except Exception:  # not there yet, or damaged, which shows in any of a dozen ways
            log.debug("%s is made", path)
        made = make()
        write_atomic(path, lambda stream: np.save(stream, made), durable=False)
        return made

    def _index(self) -> None:
        """Map every row there is, and sort the digests."""
        self._fresh: dict[bytes, int] = {}  # rows of the own file that are not in the index yet
        self._files = [self._map(path) for path in sorted(self._dir.glob("*.rows"))]
        digests = [rows["digest"] for rows in self._files]
        every = np.concatenate(digests) if digests else np.empty(0, _TEXT)
        self._order = np.argsort(every, kind="stable")
        self._digests = every[self._order]
        self._starts = np.cumsum([0, *map(len, digests)])

    def _place(self, digest: bytes) -> int | None:
        place = int(np.searchsorted(self._digests, np.array(digest, _TEXT)))
        if place < len(self._digests) and self._digests[place] == digest:
            return int(self._order[place])
        return None

    def _open_own(self) -> IO[bytes]:
        """The first file that no other live writer holds, its last row whole."""
        number = 0
        while True:
            stream = (self._dir / f"{number:04d}.rows").open("a+b")
            if try_to_lock(stream.fileno()):
                whole = stream.tell() // self._row.itemsize * self._row.itemsize
                os.ftruncate(stream.fileno(), whole)
                return stream
            stream.close()
            number += 1

    def _map(self, path: Path) -> NDArray[np.void]:
        count = path.stat().st_size // self._row.itemsize
        if count == 0:
            return np.empty(0, self._row)
        return np.memmap(path, self._row, "r", shape=(count,))
