"""Face images and labels of a selection of faces_emore, or of a folder of folders.

    from FaceDataset import FaceDataset                  # a script of yours beside this file
    faces = FaceDataset(Path("datasets/faces_emore"), "first_n", limit=12000)
    image, label, index = faces[0]                       # uint8 (3, 112, 112), 0..C-1, 0

`index` is the row of the teacher's files that belongs to the image.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

if __name__ == "FaceDataset":  # imported by its bare name: the repository root may be unknown
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from face_distill.distill.images import (
    SIZE,
    FolderSource,
    RecordSource,
    decode,
    number_by_appearance,
    open_source,
)
from shared.errors import UserError, did_you_mean
from shared.images import Skipped

SELECTIONS = ("first_n", "per_id")
MOST_DAMAGED = 0.05  # share of the images that may be left out
_BYTES_PER_IMAGE = 3 * SIZE * SIZE
_AT_A_TIME = 256  # images read before they are decoded

log = logging.getLogger(__name__)


class FaceDataset(Dataset[tuple[Tensor, int, int]]):
    """Items are (image, label, index): uint8 (3, 112, 112) RGB, 0..num_classes-1, 0..len-1.

    root: holds train.rec and train.idx (faces_emore), or <identity>/<image> folders.
    selection: "first_n" takes the first `limit` images of the file; "per_id" takes the first
        identities that have at least `per_id` images, that many of each, `limit` in all.
    limit: number of images; None takes all there are.
    cache: decode every image once, here, into memory that loader workers share; left off with a
        message where it would take more than half of the free memory.
    Damaged images and records keep their row, as a black picture; `find_damaged` names them, and
    `split` leaves them out.
    Labels count identities in the order in which they appear. Images of another size are resized
    to 112 x 112 (bicubic, antialias, the sides independently); greyscale becomes RGB.
    Attributes: `labels` and `keys` (int64, one an image), `num_classes`, `is_cached`, `damaged`
    (row → name and reason).
    Raises UserError for a bad selection, a damaged index, and more than 5 % damaged images.
    """

    def __init__(
        self,
        root: Path,
        selection: str = "first_n",
        limit: int | None = None,
        per_id: int = 20,
        cache: bool = True,
    ) -> None:
        _check_numbers(selection, limit, per_id)
        self.root, self.selection = Path(root), selection
        source = open_source(self.root)
        if selection == "first_n":
            self.keys = _first_n(source, self.root, limit)
            labels = source.labels(self.keys)
        else:
            self.keys = _first_of_each(source, self.root, limit, per_id)
            labels = np.repeat(np.arange(len(self.keys) // per_id), per_id)
        self.labels = number_by_appearance(labels)
        self.num_classes = int(self.labels.max()) + 1
        self._source = source.keep(self.keys)
        self._cache: Tensor | None = None
        self.damaged: dict[int, str] = {}
        self._is_checked = False
        if cache and _fits(len(self.keys) * _BYTES_PER_IMAGE):
            size = (len(self), 3, SIZE, SIZE)
            self._cache = torch.zeros(size, dtype=torch.uint8).share_memory_()
            self.find_damaged()

    @property
    def is_cached(self) -> bool:
        """Whether the images were decoded once and lie in shared memory."""
        return self._cache is not None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        index = range(len(self))[index]  # negative and outside indices, as in a list
        # A copy: a transform that works in place must not reach the cache.
        image = self._decode(index) if self._cache is None else self._cache[index].clone()
        return image, int(self.labels[index]), index

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, int]]:
        """The items of a whole batch; a DataLoader asks for them in one call."""
        images = self._images(indices)
        labels = self.labels[indices].tolist()
        return [(images[i], labels[i], int(index)) for i, index in enumerate(indices)]

    def images(self, indices: list[int]) -> Tensor:
        """The images of these items, uint8 (len(indices), 3, 112, 112), a copy."""
        images = self._images(indices)
        return images if isinstance(images, Tensor) else torch.stack(images)

    def _images(self, indices: list[int]) -> Tensor | list[Tensor]:
        if self._cache is not None:
            return self._cache[torch.as_tensor(indices)]
        return [self._decode(index) for index in indices]

    def selection_sha256(self) -> str:
        """What tells this selection from another: SHA-256 over keys (or paths) and labels."""
        digest = hashlib.sha256(self._source.identity_bytes(self.keys))
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def find_damaged(self) -> None:
        """Decode every image once, unless that is done: fills `damaged`, and the cache if any.

        Raises UserError when more than MOST_DAMAGED of the images are damaged.
        """
        if self._is_checked:
            return
        left_out = Skipped()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(self), _AT_A_TIME):
                rows = range(start, min(start + _AT_A_TIME, len(self)))
                contents = [self._read(row) for row in rows]
                for row, image in zip(rows, pool.map(_decoded, contents), strict=True):
                    if isinstance(image, str):
                        self.damaged[row] = f"{self._source.where(int(self.keys[row]))}: {image}"
                        left_out.add(self._source.where(int(self.keys[row])), image)
                    elif self._cache is not None:
                        self._cache[row] = image
        self._is_checked = True
        left_out.refuse_above(MOST_DAMAGED, len(self))

    def _read(self, index: int) -> bytes | str:
        """The encoded image, or why there is none."""
        try:
            return self._source.read(int(self.keys[index]))
        except UserError as error:
            return str(error)

    def _decode(self, index: int) -> Tensor:
        if index in self.damaged:
            return torch.zeros((3, SIZE, SIZE), dtype=torch.uint8)
        image = _decoded(self._read(index))
        if isinstance(image, str):
            where = self._source.where(int(self.keys[index]))
            raise UserError(f"{where}: {image}; fetch the data set again or leave this image out")
        return image


def _decoded(content: bytes | str) -> Tensor | str:
    """The image of these bytes, or why there is none; a reason stays one."""
    if isinstance(content, str):
        return content
    try:
        return decode(content)
    except ValueError as error:
        return f"the image is corrupt ({error})"


def split(
    faces: FaceDataset, fraction: float, seed: int, smallest: int = 2
) -> tuple[Subset[Any], Subset[Any]]:
    """The training images and the held-out ones, a share of `fraction` drawn by `seed`.

    Damaged images are in neither. Raises UserError for a share of fewer than `smallest` images.
    """
    faces.find_damaged()
    whole = [row for row in range(len(faces)) if row not in faces.damaged]
    count = round(len(whole) * fraction)
    if fraction and count < smallest:
        near = math.ceil(1e4 * smallest / len(whole)) / 1e4
        raise UserError(
            f"--val-fraction {fraction} holds out {count} of {len(whole)} images, {smallest} are "
            f"needed (2 a process: losses compare pairs); use {near:g} or more, or 0"
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [whole[place] for place in order]
    return Subset(faces, sorted(drawn[count:])), Subset(faces, sorted(drawn[:count]))


def _check_numbers(selection: str, limit: int | None, per_id: int) -> None:
    if selection not in SELECTIONS:
        hint = did_you_mean(selection, SELECTIONS)
        raise UserError(f"selection {selection!r}: allowed are {' and '.join(SELECTIONS)}{hint}")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: the number of images must be at least 1")
    if selection == "per_id" and per_id < 1:
        raise UserError(f"per_id {per_id}: each identity needs at least 1 image")
    if selection == "per_id" and limit is not None and limit % per_id:
        below = limit // per_id * per_id
        near = [number for number in (below, below + per_id) if number]
        raise UserError(
            f"limit {limit} is no multiple of per_id {per_id}: use "
            f"{' or '.join(str(number) for number in near)}"
        )


def _first_n(source: RecordSource | FolderSource, root: Path, limit: int | None) -> np.ndarray:
    if limit is not None and limit > len(source.keys):
        raise UserError(
            f"{root} holds {len(source.keys)} images, {limit} were asked for: lower the limit (one "
            "image a row of the teacher's files), or fetch the whole data set"
        )
    return source.keys[:limit].copy()


def _first_of_each(
    source: RecordSource | FolderSource, root: Path, limit: int | None, per_id: int
) -> np.ndarray:
    enough = (keys[:per_id] for keys in source.identities() if len(keys) >= per_id)
    wanted = None if limit is None else limit // per_id
    chosen = list(itertools.islice(enough, wanted))
    if not chosen or (wanted is not None and len(chosen) < wanted):
        raise UserError(
            f"{root} has {len(chosen)} identities with at least {per_id} images, "
            f"{wanted or 'at least 1'} were asked for: lower the limit or per_id"
        )
    return np.concatenate(chosen)


def _fits(need: int) -> bool:
    """Whether `need` bytes are at most half of the free memory; says so when they are not."""
    free = min(_free_memory(), _free_shared_memory())
    if need <= free / 2:
        return True
    log.warning(
        "decoding each time: a decode-once cache needs %.1f GB, and %.1f GB of memory are free",
        need / 1e9,
        free / 1e9,
    )
    return False


def _free_memory() -> float:
    """Bytes of RAM that can be had, the container's limit counted; infinity where unknown."""
    free = math.inf
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # "max", where there is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def _free_shared_memory() -> float:
    """Bytes free in /dev/shm, where shared tensors live; infinity where there is none."""
    with contextlib.suppress(OSError):
        return float(shutil.disk_usage("/dev/shm").free)
    return math.inf
