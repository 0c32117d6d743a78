"""Picture files as the image tower's input: a square, normalised as CLIP's weights expect."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shared import images
from shared.files import open_regular

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
_SMALLEST_CROP = 0.8  # of the area: captions tell where things are, and labels that they are there


def read(path: Path, size: int) -> Tensor:
    """The middle square of the picture, float32 (3, size, size). Raises ValueError."""
    from torchvision.transforms.v2 import functional as transforms

    picture = images.read_rgb(path)
    short = min(picture.shape[1:])
    square = transforms.center_crop(picture, [short, short])
    return normalise(_resized(square, size))


def read_cropped(path: Path, size: int) -> Tensor:
    """A random part of the picture, float32 (3, size, size); never mirrored. Raises ValueError.

    The part covers 80 to 100 % of the area; its position comes from torch's generator.
    """
    picture = images.read_rgb(path)
    height, width = picture.shape[1:]
    area, across, down = torch.rand(3).tolist()
    scale = (_SMALLEST_CROP + (1 - _SMALLEST_CROP) * area) ** 0.5
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = round(down * (height - rows)), round(across * (width - columns))
    return normalise(_resized(picture[:, top : top + rows, left : left + columns], size))


def normalise(pixels: Tensor) -> Tensor:
    """Pixels uint8 (…, 3, H, W) as float32 of mean about 0 and deviation about 1."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).contiguous()


def _resized(picture: Tensor, size: int) -> Tensor:
    from torchvision.transforms.v2 import functional as transforms

    mode = transforms.InterpolationMode.BICUBIC
    return transforms.resize(picture, [size, size], interpolation=mode, antialias=True)


def problem(path: Path) -> str | None:
    """Why the file is no picture, or None; of a JPEG only the beginning and the end are read.

    A file that is cut short, empty or something else is found, damage in the middle is not.
    """
    try:
        with open_regular(path) as stream:
            head = stream.read(2)
            stream.seek(-2, 2)
            tail = stream.read(2)
    except OSError:
        return images.problem(path)
    return None if (head, tail) == (b"\xff\xd8", b"\xff\xd9") else images.problem(path)
