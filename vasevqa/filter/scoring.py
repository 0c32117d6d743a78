"""Pictures to scores: decoded by workers, encoded in batches, each content once.

score = cos(picture, mean of high) - cos(picture, mean of low), where a mean is that of the texts'
embeddings as the text tower gives them, brought to unit length afterwards.
B pictures, D dimensions, H and L prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from shared import images
from shared.distributed import World
from shared.errors import UserError, one_line
from shared.files import read_bytes
from shared.loader import make_eval_loader
from vasevqa.filter.clip_model import Clip
from vasevqa.filter.embedding_cache import EmbeddingCache, digest_of
from vasevqa.filter.job import Job
from vasevqa.filter.prompts import Prompts
from vasevqa.filter.rows import Item, Parts, Row, line_of

SUFFIXES = images.SUFFIXES | {".tif", ".tiff"}
_CHUNK = 4096  # files for which one set of loader workers lives


def list_pictures(root: Path) -> list[str]:
    """The pictures below `root`, relative, with /; without those whose names are no UTF-8."""
    names, skipped = [], images.Skipped("pictures")
    for name in images.find_images(root, SUFFIXES):
        try:
            name.encode()
            names.append(name)
        except UnicodeEncodeError:
            skipped.add(name, "its name is not UTF-8: rename it")
    if not names:
        kinds = " ".join(sorted(SUFFIXES))
        raise UserError(f"{root} holds no picture ({kinds})")
    return names


@dataclass(frozen=True)
class Scorer:
    """A CLIP, its prompts' embeddings and the cache of its pictures'."""

    clip: Clip
    prompts: Prompts
    cache: EmbeddingCache
    batch_size: int
    workers: int

    @property
    def identity(self) -> str:
        """Changes with everything that changes a score."""
        return f"{self.clip.identity}-{self.prompts.identity}"

    def run(self, job: Job, parts: Parts, root: Path, names: list[str], what: str) -> None:
        """Add a row for each of this rank's files that has none; leaves when asked to stop."""
        pending = parts.pending(root, names)
        job.begin(what, len(pending))
        table = self._table() if pending else None
        with parts.open() as lines:
            for batch in self._batches(root, pending):
                assert table is not None
                for row in self.score(batch, table):
                    lines.write(line_of(row))
                lines.flush()
                job.advance(len(batch))
                if job.asked_to_stop:
                    return

    def _table(self) -> PromptTable:
        """The prompts' embeddings, from the cache where they are in it."""
        rows = self.cache.table(
            f"prompts-{self.prompts.identity}",
            lambda: PromptTable.of(self.clip, self.prompts).rows,
        )
        return PromptTable(rows)

    def score(self, batch: list[Prepared], table: PromptTable) -> Iterator[Row]:
        """The rows of a batch; its new contents are encoded in one go."""
        fresh = {
            file.digest: file.pixels
            for file in batch
            if file.pixels is not None and file.digest not in self.cache
        }
        if fresh:
            pixels = torch.stack([p for p in fresh.values() if p is not None])
            self.cache.add(list(fresh), self.clip.encode_images(pixels).numpy())
        for file in batch:
            row = {
                "filename": file.item.name,
                "size": file.item.size,
                "mtime_ns": file.item.mtime_ns,
            }
            if file.problem:
                yield row | {"problem": file.problem}
                continue
            vector = self.cache.get(file.digest)
            assert vector is not None, file.item.name
            yield row | {"digest": file.digest.hex()} | table.compare(vector)

    def _batches(self, root: Path, pending: list[Item]) -> Iterator[list[Prepared]]:
        for start in range(0, len(pending), _CHUNK):
            chunk = pending[start : start + _CHUNK]
            few = len(chunk) <= 2 * self.batch_size  # workers would start for longer than they help
            yield from make_eval_loader(
                _Files(root, chunk, self),
                self.batch_size,
                World(device=self.clip.device),
                workers=0 if few else self.workers,
                collate=list,
            )


@dataclass(frozen=True)
class Prepared:
    """A file as a worker hands it over: pixels only when its content has no embedding yet."""

    item: Item
    digest: bytes = b""
    pixels: Tensor | None = None  # (3, S, S), prepared
    problem: str = ""


class _Files(Dataset[Prepared]):
    """Files, read, hashed and, where their content is new, decoded and prepared."""

    def __init__(self, root: Path, items: list[Item], scorer: Scorer) -> None:
        self._root, self._items = root, items
        self._cache, self._prepare = scorer.cache, scorer.clip.prepare_tensor

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Prepared:
        item = self._items[index]
        try:
            content = read_bytes(self._root / item.name)
        except OSError as error:
            return Prepared(item, problem=f"cannot be read: {error.strerror}")
        digest = digest_of(content)
        if digest in self._cache:
            return Prepared(item, digest)
        try:
            return Prepared(item, digest, self._prepare(images.decode_rgb(content)))
        except ValueError as error:
            return Prepared(item, problem=one_line(error))


@dataclass(frozen=True)
class PromptTable:
    """Unit vectors (2 + H + L, D): the mean of each group, then each prompt."""

    rows: NDArray[np.float32]

    @classmethod
    def of(cls, clip: Clip, prompts: Prompts) -> PromptTable:
        """The table of `prompts` as `clip` sees them."""
        high, low = clip.encode_texts(prompts.high), clip.encode_texts(prompts.low)
        rows = torch.cat([high.mean(0)[None], low.mean(0)[None], high, low])
        return cls(normalize(rows, dim=1).numpy())

    def compare(self, vector: NDArray[np.float32]) -> Row:
        """The scores of a picture's unit vector (D,)."""
        high, low, *each = (self.rows @ vector).tolist()
        prompts = [round(cosine, 6) for cosine in each]
        return {"score": high - low, "high": high, "low": low, "prompts": prompts}
