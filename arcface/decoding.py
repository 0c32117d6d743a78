"""Encoded pictures as tensors, quickly, and what is wrong with those that are none."""

from __future__ import annotations

import io
import warnings
from typing import cast

import torch
from torch import Tensor

MOST_PIXELS = 100_000_000  # a small file may claim any size; decoding it would fill the memory
_LARGE_JPEG = 1 << 19  # bytes; below it a JPEG cannot claim too much


def decode_rgb(content: bytes) -> Tensor:
    """The picture in `content` as RGB, uint8 (3, H, W), turned upright by its EXIF note.

    The colours of a pixel lie side by side in memory (channels last), as `resize` likes them.
    JPEG, PNG, GIF (first frame) and WebP go through torchvision, the rest through Pillow; both give
    the same grey levels. Raises ValueError, with the reason, when nothing can be decoded.
    """
    is_jpeg = content[:2] == b"\xff\xd8"
    if not is_jpeg or len(content) > _LARGE_JPEG:
        _check_header(content)
    try:
        image = _decode_quickly(content, is_jpeg)
    except RuntimeError:
        image = _decode_with_pillow(content)
    return _interleaved(image)


def _decode_quickly(content: bytes, is_jpeg: bool) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image, decode_jpeg  # takes 3 s to import

    decoder = decode_jpeg if is_jpeg else decode_image
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    image = cast(Tensor, decoder(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True))
    if image.dim() == 4:  # the frames of a GIF
        image = image[0]
    if image.dtype == torch.uint16:  # PNG with 16 bits a channel
        image = (image.to(torch.int32) // 257).to(torch.uint8)
    return image


def _decode_with_pillow(content: bytes) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(_in_a_line(error)) from None


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


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
