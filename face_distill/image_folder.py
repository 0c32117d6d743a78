"""Images of a folder, whatever users keep in one, as face crops ready for the student.

Broken files come back as the reason why they cannot be used; nothing here raises for one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from face_distill.FaceDataset import SIZE, fitted
from shared.images import read_rgb

_BATCHES_AHEAD = 2  # decoded or being decoded while a batch is embedded


@dataclass(frozen=True)
class Face:
    """pixels: RGB, uint8 (3, 112, 112). is_aligned: the file had that size already."""

    pixels: NDArray[np.uint8]
    is_aligned: bool


@dataclass(frozen=True)
class Unreadable:
    """Why a file gives no face, in a few words."""

    reason: str


def read_face(path: Path) -> Face | Unreadable:
    """The image in `path` as a face crop, RGB, 112 x 112 pixels, as training decodes it."""
    try:
        image = read_rgb(path)
    except ValueError as error:
        return Unreadable(str(error))
    return Face(fitted(image).numpy(), image.shape[-2:] == (SIZE, SIZE))


def in_batches(
    root: Path, names: Sequence[str], batch_size: int, workers: int
) -> Iterator[list[tuple[str, Face | Unreadable]]]:
    """The images of `names` below `root` in order, `batch_size` at a time, decoded ahead.

    workers: threads that decode (the decoders let them run side by side). Memory holds the crops of
    three batches and a whole image a thread, however many images there are.
    """
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        ahead: deque[tuple[Sequence[str], list[Future[Face | Unreadable]]]] = deque()
        for start in range(0, len(names), batch_size):
            batch = names[start : start + batch_size]
            ahead.append((batch, [pool.submit(read_face, root / name) for name in batch]))
            if len(ahead) > _BATCHES_AHEAD:
                yield _finished(*ahead.popleft())
        while ahead:
            yield _finished(*ahead.popleft())


def _finished(
    names: Sequence[str], futures: list[Future[Face | Unreadable]]
) -> list[tuple[str, Face | Unreadable]]:
    return [(name, future.result()) for name, future in zip(names, futures, strict=True)]
