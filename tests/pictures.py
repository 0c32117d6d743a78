"""Small pictures for tests, encoded in memory, and what Pillow makes of them."""

from __future__ import annotations

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps


def picture(seed=0, height=32, width=32):
    """A smooth random picture with some grain, as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float)
    return Image.fromarray((smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", **settings):
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def with_pillow(content):
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


def damaged(content, seed):
    """`content` with one to seven bytes in a row replaced."""
    rng = np.random.default_rng(seed)
    start, count = int(rng.integers(len(content))), int(rng.integers(1, 8))
    return content[:start] + rng.bytes(count) + content[start + count :]


def claiming(content, width, height):
    """A JPEG that says it had another size."""
    start = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2")) + 5
    return content[:start] + struct.pack(">HH", height, width) + content[start + 4 :]
