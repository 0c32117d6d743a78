"""How a view of one of the demo's vases looks, as pixels and as a JPEG file.

    render(vase, view=1)                             (160, 160, 3) uint8
    to_jpeg(render(vase, 1, flaw="dark"))            what is the matter with the photograph

The vase is a surface of revolution with a painted skin (vases.py says which). numpy
alone, with Pillow for JPEG.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared import drawing
from shared.drawing import Colour, Floats

if TYPE_CHECKING:
    from vasevqa.demo_data.vases import Vase

VERSION = 1  # of what is drawn and written; another number rebuilds
SIZE = 160  # pixels a side
VIEWS = (1, 2, 3, 4)  # numbers in the file names; 1 is the front
FLAWS = ("dark", "blurred", "cropped")  # of a photograph: the quality classifier's business

CLAY: dict[str, Colour] = {
    "Attic": (205, 110, 52),
    "Corinthian": (226, 200, 142),
    "Apulian": (164, 62, 46),
    "Etruscan": (128, 132, 138),
}
# Radius along the height, from the lip to the foot, as (place, radius); all in shares of the frame.
PROFILES: dict[str, tuple[tuple[float, float], ...]] = {
    "amphora": ((0, 0.15), (0.06, 0.13), (0.2, 0.1), (0.38, 0.31), (0.55, 0.32), (0.82, 0.16),
                (0.93, 0.1), (1, 0.16)),
    "hydria": ((0, 0.17), (0.05, 0.13), (0.16, 0.11), (0.26, 0.34), (0.45, 0.35), (0.8, 0.15),
               (0.93, 0.11), (1, 0.17)),
    "krater": ((0, 0.4), (0.07, 0.37), (0.45, 0.35), (0.72, 0.26), (0.86, 0.09), (0.94, 0.12),
               (1, 0.2)),
    "kylix": ((0, 0.42), (0.15, 0.41), (0.36, 0.3), (0.48, 0.06), (0.82, 0.05), (0.92, 0.16),
              (1, 0.2)),
    "lekythos": ((0, 0.1), (0.05, 0.11), (0.12, 0.045), (0.26, 0.05), (0.34, 0.19), (0.74, 0.18),
                 (0.9, 0.08), (1, 0.14)),
    "oinochoe": ((0, 0.13), (0.09, 0.1), (0.22, 0.09), (0.44, 0.28), (0.65, 0.29), (0.9, 0.15),
                 (1, 0.17)),
}  # fmt: skip
_HEIGHT = {"kylix": 0.46, "krater": 0.66}  # of the others: 0.78
_HANDLES = {"amphora": (0.05, 0.34), "hydria": (0.3, 0.5), "krater": (0.25, 0.6), "kylix": (0, 0.3),
            "lekythos": (0.05, 0.33), "oinochoe": (0.0, 0.42)}  # fmt: skip
_ONE_HANDLE = ("lekythos", "oinochoe")
_BLACK: Colour = (28, 24, 22)
_WHITE: Colour = (238, 234, 220)

# One random stream each, beside those of vases.py; a new one gets a number of its own.
_SCENE, _VIEW, _BREAK, _FLAW = 1, 2, 3, 4
_SKIN = (128, 308)  # pixels: height, and all the way round


def render(vase: Vase, view: int, flaw: str = "", size: int = SIZE) -> NDArray[np.uint8]:
    """One view of a vase as (size, size, 3) uint8; flaw: '', or one of FLAWS, of the photograph."""
    scene = np.random.default_rng([VERSION, vase.seed, _SCENE])
    shot = np.random.default_rng([VERSION, vase.seed, _VIEW, view])
    canvas = _background(scene, size)
    height = _HEIGHT.get(vase.shape, 0.78) * size
    top, centre = 0.9 * size - height, (0.5 + shot.uniform(-0.03, 0.03)) * size
    turn = (view - 1) * math.tau / len(VIEWS) + shot.uniform(-0.15, 0.15)
    _paint_shadow(canvas, vase.shape, size)
    _paint_handles(canvas, vase, turn, (top, centre, height))
    picture, cover = _body(vase, turn, (top, centre, height), size)
    if vase.is_broken:
        breaking = np.random.default_rng([VERSION, vase.seed, _BREAK, view])
        cover = _break(canvas, picture, cover, CLAY[vase.fabric], breaking)
    drawing.paint(canvas, picture, cover)
    canvas += shot.normal(0, 2.0, canvas.shape).astype(np.float32)  # a sensor's noise
    if flaw:
        canvas = _FLAWED[flaw](canvas, np.random.default_rng([VERSION, vase.seed, _FLAW, view]))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def to_jpeg(pixels: NDArray[np.uint8], quality: int = 92) -> bytes:
    """The picture as the content of a JPEG file."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def _background(rng: np.random.Generator, size: int) -> Floats:
    """A wall that grows darker downwards, in a light colour."""
    light = rng.uniform(165, 225) + rng.uniform(-14, 14, 3)
    slope = np.linspace(1.06, 0.84, size, dtype=np.float32)[:, None, None]
    return np.broadcast_to(light.astype(np.float32) * slope, (size, size, 3)).copy()


def _paint_shadow(canvas: Floats, shape: str, size: int) -> None:
    y, x = _grid(size)
    reach = (0.2 if shape == "kylix" else 0.3) * size
    inside = 1 - np.hypot((x - size / 2) / reach, (y - 0.905 * size) / (0.045 * size))
    drawing.paint(canvas, (70, 66, 62), (np.clip(inside * 3, 0, 1) * 0.6).astype(np.float32))


def _paint_handles(
    canvas: Floats, vase: Vase, turn: float, place: tuple[float, float, float]
) -> None:
    """Loops at both sides (or one), wider the more they stand in the plane of the picture."""
    top, centre, height = place
    size = len(canvas)
    y, x = _grid(size)
    start, end = _HANDLES[vase.shape]
    for side in (0.0,) if vase.shape in _ONE_HANDLE else (0.0, math.pi):
        reach = math.cos(turn + side)
        radius = float(np.interp((start + end) / 2, *_profile(vase.shape))) * size
        across = centre + reach * radius
        middle = top + (start + end) / 2 * height
        wide, tall = 0.09 * size, (end - start) / 2 * height
        ring = np.abs(np.hypot((x - across) / wide, (y - middle) / tall) - 1) * min(wide, tall)
        drawing.paint(
            canvas, _skin_colours(vase)[0], np.clip(0.028 * size - ring, 0, 1).astype(np.float32)
        )


def _body(
    vase: Vase, turn: float, place: tuple[float, float, float], size: int
) -> tuple[Floats, Floats]:
    """The lit body as a picture, and how much of each pixel it covers."""
    top, centre, height = place
    y, x = _grid(size)
    along = np.clip((y - top) / height, 0, 1)
    radius = np.interp(along[:, 0], *_profile(vase.shape)).astype(np.float32)[:, None] * size
    across = (x - centre) / radius
    rows = np.clip(y - top + 0.5, 0, 1) * np.clip(top + height - y + 0.5, 0, 1)
    cover = np.clip((1 - np.abs(across)) * radius + 0.5, 0, 1) * rows
    angle = np.arcsin(np.clip(across, -1, 1)) + turn
    skin = _skin(vase)
    down = np.clip(along * _SKIN[0], 0, _SKIN[0] - 1).astype(int)
    around = (angle / math.tau * _SKIN[1]).astype(int) % _SKIN[1]
    slope = np.gradient(radius[:, 0])[:, None]
    depth = np.sqrt(np.clip(1 - across**2, 0, 1))
    facing = (-0.45 * across + 0.35 * slope + 0.8 * depth) / np.sqrt(1 + slope**2)
    light = 0.42 + 0.62 * np.clip(facing, 0, 1.2)
    shine = np.exp(-(((across + 0.45) / 0.12) ** 2)) * 34
    picture = skin[down, around] * light[..., None] + shine[..., None]
    return picture.astype(np.float32), cover.astype(np.float32)


def _profile(shape: str) -> tuple[list[float], list[float]]:
    """Places and radii for numpy.interp, the corners rounded by points between them."""
    places, radii = zip(*PROFILES[shape], strict=True)
    fine = np.linspace(0, 1, 41)
    smooth = np.interp(fine, places, radii)
    smooth[1:-1] = (smooth[:-2] + 2 * smooth[1:-1] + smooth[2:]) / 4
    return fine.tolist(), smooth.tolist()


def _skin_colours(vase: Vase) -> tuple[Colour, Colour]:
    """The colours of the body and of what is painted on it."""
    clay = CLAY[vase.fabric]
    return {
        "black-figure": (clay, _BLACK),
        "red-figure": (_BLACK, clay),
        "white-ground": (_WHITE, (120, 62, 34)),
    }[vase.technique]


def _skin(vase: Vase) -> Floats:
    """The vase's surface unrolled: (128, 308, 3), the front in the middle of column 0."""
    ground, paint = _skin_colours(vase)
    height, width = _SKIN
    banded = vase.decoration in drawing.PATTERNS
    name = vase.decoration if banded else "plain"
    skin = drawing.pattern(name, height, width, ground, paint, period=width / 14)
    if not banded:
        for column, radius in ((width // 2, 26), (width // 5, 17), (4 * width // 5, 17)):
            motif = drawing.mask(
                vase.decoration, height, width, centre=(0.52 * height, column), radius=radius
            )
            drawing.paint(skin, paint, motif)
    for start, end in ((0.24, 0.27), (0.76, 0.79)):  # lines around the shoulder and above the foot
        skin[int(start * height) : int(end * height)] = paint
    skin[: int(0.2 * height)] = skin[int(0.86 * height) :] = CLAY[vase.fabric]
    return np.roll(skin, width // 2, axis=1)


def _break(
    canvas: Floats, picture: Floats, cover: Floats, clay: Colour, rng: np.random.Generator
) -> Floats:
    """Crack the body into pieces and take some away; those left. Shards lie on the floor."""
    size = len(canvas)
    y, x = _grid(size)
    points = rng.uniform((0.15, 0.2), (0.85, 0.8), (11, 2)) * size
    distances = np.hypot(y[..., None] - points[:, 0], x[..., None] - points[:, 1])
    order = np.argsort(distances, axis=2)[..., :2]
    nearest = np.take_along_axis(distances, order, axis=2)
    gap = nearest[..., 1] - nearest[..., 0]
    lost = np.isin(order[..., 0], rng.choice(len(points), 4, replace=False))
    crack = np.clip(2.6 - gap, 0, 1).astype(np.float32)
    drawing.paint(picture, (12, 10, 10), crack)
    for _ in range(9):
        centre = (rng.uniform(0.86, 0.96) * size, rng.uniform(0.06, 0.94) * size)
        shard = drawing.mask(
            "triangle", size, size, centre=centre, radius=rng.uniform(0.03, 0.075) * size,
            angle=rng.uniform(0, math.tau),
        )  # fmt: skip
        drawing.paint(canvas, clay, shard)
    return np.where(lost, 0, cover).astype(np.float32)


def _darken(canvas: Floats, rng: np.random.Generator) -> Floats:
    return canvas * np.float32(rng.uniform(0.1, 0.25))


def _blur(canvas: Floats, rng: np.random.Generator) -> Floats:
    """Three box filters, which come near a Gaussian."""
    width = 2 * int(rng.integers(3, 6)) + 1
    for axis in (0, 1, 0, 1, 0, 1):
        pad = [(0, 0)] * 3
        pad[axis] = (width // 2 + 1, width // 2)
        sums = np.cumsum(np.pad(canvas, pad, mode="edge"), axis=axis, dtype=np.float64)
        ahead, behind = [slice(None)] * 3, [slice(None)] * 3
        ahead[axis], behind[axis] = slice(width, None), slice(None, -width)
        canvas = ((sums[tuple(ahead)] - sums[tuple(behind)]) / width).astype(np.float32)
    return canvas


def _crop(canvas: Floats, rng: np.random.Generator) -> Floats:
    """A corner of the picture, enlarged: most of the vase is outside."""
    size = len(canvas)
    side = int(rng.uniform(0.34, 0.46) * size)
    corner = [int(rng.choice((0.0, 0.25, 1.0)) * (size - side)) for _ in range(2)]
    take = np.arange(size) * side // size
    return canvas[corner[0] + take][:, corner[1] + take]


_FLAWED = {"dark": _darken, "blurred": _blur, "cropped": _crop}


def _grid(size: int) -> tuple[Floats, Floats]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    return y, x
