"""Small pictures for tests, encoded in memory, and what Pillow makes of them."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image


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
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
