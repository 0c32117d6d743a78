"""Images of a folder, whatever users keep in one, as face crops ready for the student.

Broken files come back as the reason why they cannot be used; nothing here raises for one.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.errors import one_line

SIZE = 112  # pixels a side of an aligned crop, as in face_distill.FaceDataset
MAX_PIXELS = 89_000_000  # Pillow's own border between a photograph and a decompression bomb
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
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


class _UnusableError(Exception):
    """An image that is refused; the message is the reason."""


def read_face(path: Path) -> Face | Unreadable:
    """The image in `path` as a face crop: turned upright by its EXIF, RGB, 112 x 112 pixels.

    Transparency is dropped and 16 bits become 8, as in training. Another size is resized (bicubic,
    antialias, the sides independently).
    """
    try:
        image = _decode(path)
    except Exception as error:  # a damaged image fails in any of a dozen ways, none of them a bug
        return Unreadable(_reason(path, error))
    is_aligned = image.size == (SIZE, SIZE)
    if not is_aligned:
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return Face(np.asarray(image).transpose(2, 0, 1).copy(), is_aligned)


def _decode(path: Path) -> Image.Image:
    if not path.is_file():  # reading a pipe would wait for ever
        raise _UnusableError("a link that leads nowhere" if path.is_symlink() else "no plain file")
    with Image.open(path, formats=_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        if image.mode.startswith("I"):  # Pillow would clip 16-bit grey levels at 255: all white
            levels = np.clip(np.asarray(image), 0, 65535) // 257
            return _upright(Image.fromarray(levels.astype(np.uint8)), image).convert("RGB")
        return _upright(image, image).convert("RGB")


def _upright(image: Image.Image, original: Image.Image) -> Image.Image:
    """`image` turned as the EXIF of `original` says; as it is when that cannot be read."""
    with contextlib.suppress(Exception):
        image.info.setdefault("exif", original.info.get("exif", b""))
        return ImageOps.exif_transpose(image)
    return image


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, _UnusableError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 1_000_000} million pixels"
    if isinstance(error, UnidentifiedImageError):
        return _why_unidentified(path)
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cut off or damaged ({one_line(error)})"


def _why_unidentified(path: Path) -> str:
    with path.open("rb") as stream:
        start = stream.read(64).lstrip()
    if not start:
        return "empty file"
    return "a web page" if start.startswith(b"<") else f"none of {', '.join(_FORMATS)}"


def in_batches(
    root: Path, names: Sequence[str], batch_size: int, workers: int
) -> Iterator[list[tuple[str, Face | Unreadable]]]:
    """The images of `names` below `root` in order, `batch_size` at a time, decoded ahead.

    workers: threads that decode (Pillow lets them run side by side). Memory holds the crops of
    three batches and a whole image a thread, however many images there are.
    """
    Image.init()  # not thread-safe
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
