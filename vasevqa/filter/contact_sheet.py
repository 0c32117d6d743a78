"""Pictures on a page: small copies with a line below each, inside the page's one file."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchvision.transforms.v2.functional import resize

from shared import images
from shared.page import Picture

SIDE = 128  # pixels, the longer side


def small_copy(path: Path) -> bytes | None:
    """A JPEG of at most SIDE x SIDE pixels, or None when the file gives no picture."""
    from PIL import Image

    try:
        image = images.read_rgb(path)
    except ValueError:
        return None
    height, width = image.shape[1:]
    scale = SIDE / max(height, width)
    small = resize(image, [max(1, round(height * scale)), max(1, round(width * scale))])
    encoded = io.BytesIO()
    Image.fromarray(small.permute(1, 2, 0).numpy()).save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


def gallery(root: Path, captions: Iterable[tuple[str, str]]) -> list[Picture | str]:
    """Of each (file below `root`, caption) a picture; of one that is gone its name."""
    cells: list[Picture | str] = []
    for name, caption in captions:
        content, caption = small_copy(root / name), images.printable(caption)
        cells.append(Picture(content, name, caption) if content else f"(gone) {caption} ")
    return cells


def score_lines(histogram: Mapping[str, Sequence[float]], threshold: float) -> dict[str, Any]:
    """How many pictures have which score, and the threshold as an upright line."""
    edges, counts = histogram["edges"], histogram["counts"]
    xs = [edge for pair in pairwise(edges) for edge in pair]
    ys = [float(count) for count in counts for _ in range(2)]
    top = max([*counts, 1])
    return {"pictures": (xs, ys), "threshold": ([threshold, threshold], [0.0, float(top)])}
