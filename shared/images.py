"""Encoded pictures as tensors, quickly; what is wrong with those that are none; those of a folder.

    skipped = Skipped("pictures")
    for name in find_images(root):
        try:
            image = read_rgb(root / name)
        except ValueError as reason:
            skipped.add(name, str(reason))
    skipped.refuse_above(0.5, total)

torch is imported by the first picture: entry scripts look into folders before that.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import warnings
from collections import Counter, deque
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, cast

from shared import files
from shared.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
MOST_PIXELS = 100_000_000  # a small file may claim any size; decoding it would fill the memory
# What is decoded, whatever a file's name says; JPEG by torchvision, the others by Pillow. Not its
# other formats: some start a program (EPS) or take any bytes for a picture (TGA).
FORMATS = (
    *("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF"),
    *("AVIF", "JPEG2000", "DDS", "ICNS", "ICO", "PPM"),
)
_JPEG = b"\xff\xd8"
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's markers of a size


def decode_rgb(content: bytes) -> Tensor:
    """The picture in `content` as RGB, uint8 (3, H, W), turned upright by its EXIF note.

    The colours of a pixel lie side by side in memory (channels last), as `resize` likes them. Of
    several pictures the first counts; transparency is dropped; 16 bits become 8.
    Raises ValueError, with the reason, when nothing can be decoded.
    """
    if content.startswith(_JPEG) and _is_moderate_jpeg(content):
        try:
            return _decode_jpeg(content)
        except RuntimeError:
            pass  # Pillow says why
    import numpy as np
    import torch

    return torch.from_numpy(np.array(_decode_with_pillow(content))).permute(2, 0, 1)


def read_rgb(path: Path) -> Tensor:
    """The picture in the file `path` as `decode_rgb` gives it: uint8 (3, H, W).

    Raises ValueError, with the reason in a few words, for one that is missing or cannot be read.
    """
    return decode_rgb(_content(path))


def problem(path: Path) -> str | None:
    """Why the file `path` gives no picture, or None when it gives one; it is decoded to know."""
    try:
        _decode_with_pillow(_content(path))
    except ValueError as error:
        return one_line(error)
    return None


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height of the picture in `content`, before EXIF; only its header is read.

    Raises ValueError, with the reason, for what is no picture and above MOST_PIXELS.
    """
    return _opened(content).size


class Skipped:
    """Things left out and why: each named once in the log, all counted.

    what: the plural of their kind, for messages.
    """

    def __init__(self, what: str = "pictures") -> None:
        self._what = what
        self.names: dict[str, str] = {}

    @property
    def count(self) -> int:
        """How many were left out."""
        return len(self.names)

    @property
    def reasons(self) -> dict[str, int]:
        """How many were left out for each reason, the most frequent first."""
        return dict(Counter(self.names.values()).most_common())

    def add(self, name: str, reason: str) -> None:
        """Note that `name` is left out because of `reason`; the first reason counts."""
        if name not in self.names:
            self.names[name] = reason
            log.warning("left out: %s (%s)", printable(name), reason)

    def refuse_above(self, share: float, total: int) -> None:
        """Raise UserError when more than `share` (0 to 1) of `total` were left out."""
        if self.count > share * total:
            name, reason = next(iter(self.names.items()))
            raise UserError(
                f"{self.count} of {total} {self._what} cannot be used, and at most {share:.0%} may "
                f"be left out; the first is {printable(name)} ({reason}): see the log for the rest"
            )


def find_images(root: Path, suffixes: Collection[str] = SUFFIXES) -> list[str]:
    """The image files below `root`, any depth: their relative paths with /, sorted as text.

    suffixes: in lower case. Hidden files and folders are left out. Links to folders elsewhere are
    followed, each folder once; links to what lies below or above `root` are not: they would give
    images twice, or never end.
    Raises UserError when `root` or a folder below it is missing or cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the folder that holds the images")
    top = root.resolve()
    found: list[str] = []
    seen: set[Path] = set()
    todo = deque([root])
    while todo:
        folder = todo.popleft()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        for entry in _entries(folder):
            if entry.is_dir():
                todo.extend([] if _leads_back(entry, top) else [entry])
            elif entry.suffix.lower() in suffixes:
                found.append(entry.relative_to(root).as_posix())
    return sorted(found)


def printable(name: str) -> str:
    """`name` for logs and JSON: bytes that are no UTF-8 and line breaks as escapes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None


def _leads_back(entry: Path, top: Path) -> bool:
    """Whether `entry` is a link to a folder below `top`, to `top` or to one above it."""
    if not entry.is_symlink():
        return False
    target = entry.resolve()
    return target.is_relative_to(top) or top.is_relative_to(target)


def _content(path: Path) -> bytes:
    """The bytes of the file. Raises ValueError."""
    try:
        return files.read_bytes(path)
    except FileNotFoundError:
        reason = "a link that leads nowhere" if path.is_symlink() else "missing"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or one_line(error)}"
    raise ValueError(reason)


def _is_moderate_jpeg(content: bytes) -> bool:
    """Whether the JPEG says its size in the usual place, and it is not above MOST_PIXELS."""
    at, last = len(_JPEG), len(content) - 9
    while at <= last and content[at] == 0xFF:
        if content[at + 1] in _FRAME_HEADERS:
            height, width = content[at + 5 : at + 7], content[at + 7 : at + 9]
            return int.from_bytes(height) * int.from_bytes(width) <= MOST_PIXELS
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return False


def _decode_jpeg(content: bytes) -> Tensor:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg  # takes 3 s to import

    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    image = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    return _interleaved(cast("Tensor", image))


def _decode_with_pillow(content: bytes) -> Image:
    """The picture as RGB, turned upright. Raises ValueError."""
    from PIL import ImageOps

    image = _opened(content)
    try:
        image.load()
        with contextlib.suppress(Exception):  # a damaged EXIF note says nothing
            image = ImageOps.exif_transpose(image)
        return _eight_bits(image).convert("RGB")
    except Exception as error:  # a damaged picture fails in any of a dozen ways, none of them a bug
        raise ValueError(_reason(error)) from None


def _opened(content: bytes) -> Image:
    """The picture, not decoded yet. Raises ValueError for none, and above MOST_PIXELS."""
    from PIL import Image, UnidentifiedImageError

    if not content.strip(b"\0 \r\n"):
        raise ValueError("the file holds zeros alone" if content else "the file is empty")
    try:
        image = Image.open(io.BytesIO(content), formats=_formats())
    except UnidentifiedImageError:
        start = content.lstrip()[:24].decode("ascii", "replace")
        raise ValueError(f"no picture: it begins with {start!r}") from None
    except Exception as error:
        raise ValueError(_reason(error)) from None
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} × {image.height}: more than {MOST_PIXELS:,} pixels")
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    from PIL import Image

    Image.init()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is the limit here
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _eight_bits(image: Image) -> Image:
    """The picture with grey levels up to 255, where it has 16 bits: Pillow would cut them off."""
    import numpy as np
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))


def _reason(error: Exception) -> str:
    from PIL import Image

    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS:,} pixels"
    return f"damaged ({one_line(error)})"


def _interleaved(image: Tensor) -> Tensor:
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
