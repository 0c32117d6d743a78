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

import io
import logging
import os
import struct
import warnings
from collections import Counter, deque
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, cast

from shared.errors import UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
MOST_PIXELS = 100_000_000  # a small file may claim any size; decoding it would fill the memory
_PNG = b"\x89PNG\r\n\x1a\n"  # byte 24 of such a file tells the bits of a channel
_LARGE_JPEG = 1 << 19  # bytes; below it a JPEG cannot claim too much


def decode_rgb(content: bytes) -> Tensor:
    """The picture in `content` as RGB, uint8 (3, H, W), turned upright by its EXIF note.

    The colours of a pixel lie side by side in memory (channels last), as `resize` likes them.
    JPEG, GIF (first frame) and WebP go through torchvision, the rest through Pillow; both give the
    same grey levels. Raises ValueError, with the reason, when nothing can be decoded.
    """
    is_jpeg = content[:2] == b"\xff\xd8"
    if not is_jpeg or len(content) > _LARGE_JPEG:
        _check_header(content)
    if content.startswith(_PNG):
        # a damaged PNG makes torchvision 0.29 end the process (SIGSEGV): Pillow looks first
        image = _decode_with_pillow(content)
        return _interleaved(_decode_quickly(content, is_jpeg) if content[24] == 16 else image)
    try:
        image = _decode_quickly(content, is_jpeg)
    except RuntimeError:
        image = _decode_with_pillow(content)
    return _interleaved(image)


def read_rgb(path: Path) -> Tensor:
    """The picture in the file `path` as `decode_rgb` gives it: uint8 (3, H, W).

    Raises ValueError, with the reason in a few words, for one that is missing or cannot be read.
    """
    if not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(_why_no_file(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or one_line(error)}") from None
    return decode_rgb(content)


def problem(path: Path) -> str | None:
    """Why the file `path` gives no picture, or None when it gives one; it is decoded to know."""
    try:
        read_rgb(path)
    except ValueError as error:
        return one_line(error)
    return None


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


def _why_no_file(path: Path) -> str:
    if path.is_symlink():
        return "a link that leads nowhere"
    return "no plain file" if path.exists() else "missing"


def _decode_quickly(content: bytes, is_jpeg: bool) -> Tensor:
    import torch
    from torchvision.io import ImageReadMode, decode_image, decode_jpeg  # takes 3 s to import

    decoder = decode_jpeg if is_jpeg else decode_image
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    image = cast("Tensor", decoder(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True))
    if image.dim() == 4:  # the frames of a GIF
        image = image[0]
    if image.dtype == torch.uint16:  # PNG with 16 bits a channel
        image = (image.to(torch.int32) // 257).to(torch.uint8)
    return image


_DAMAGE = (OverflowError, MemoryError, TypeError, LookupError, struct.error)  # within Pillow


def _decode_with_pillow(content: bytes) -> Tensor:
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, *_DAMAGE) as error:
        raise ValueError(one_line(error)) from None


def _check_header(content: bytes) -> None:
    """Raise ValueError for what is no picture, or claims to be an enormous one."""
    from PIL import Image

    if not content.strip(b"\0 \r\n"):
        raise ValueError("the file is empty" if not content else "the file holds zeros alone")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MOST_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError):
        start = content.lstrip()[:24].decode("ascii", "replace")
        raise ValueError(f"no picture: it begins with {start!r}") from None
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} × {height}: more than {MOST_PIXELS:,} pixels")


def _interleaved(image: Tensor) -> Tensor:
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
