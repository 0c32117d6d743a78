"""Simple pictures for the demos: shapes with smooth edges, colours, patterns. numpy alone.

    canvas = pattern("plain", 96, 128, COLOURS["grey"], COLOURS["white"], period=16)
    paint(canvas, COLOURS["red"], mask("star", 96, 128, centre=(48, 64), radius=30))
    to_image(canvas).save(path)

Nothing here draws random numbers: the caller's own generator decides, so a seed gives a picture.
A canvas is float32 (H, W, 3), 0..255; y counts downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = NDArray[np.floating[Any]]
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 205),
    "yellow": (245, 208, 40),
    "purple": (130, 55, 160),
    "orange": (243, 130, 30),
    "white": (248, 248, 248),
    "black": (20, 20, 20),
    "grey": (135, 135, 135),
    "brown": (115, 70, 35),
    "pink": (245, 140, 190),
    "cyan": (60, 200, 215),
}


def mask(
    shape: str,
    height: int,
    width: int,
    *,
    centre: tuple[float, float],
    radius: float,
    angle: float = 0.0,
) -> Floats:
    """How much of each pixel `shape` covers: (height, width), 0 to 1, edges one pixel soft.

    shape: one of SHAPES. centre: (y, x) in pixels. radius: of the circle around it, in pixels.
    angle: radians, clockwise. Raises ValueError for an unknown shape.
    """
    if shape not in _DISTANCES:
        raise ValueError(f"no shape {shape!r}: known are {', '.join(SHAPES)}")
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5 - centre[0]
    x = np.arange(width, dtype=np.float32)[None, :] + 0.5 - centre[1]
    cos, sin = math.cos(angle), math.sin(angle)
    distance = _DISTANCES[shape]((cos * y - sin * x) / radius, (cos * x + sin * y) / radius)
    return np.clip(0.5 - distance * radius, 0, 1).astype(np.float32)


def pattern(
    name: str,
    height: int,
    width: int,
    colour: Colour,
    second: Colour,
    *,
    period: float,
    phase: float = 0.0,
) -> Floats:
    """A canvas (height, width, 3) of `colour`, with `second` as stripes, dots or checks.

    name: one of PATTERNS. period, phase: pixels. Raises ValueError for an unknown pattern.
    """
    if name not in _PATTERNS:
        raise ValueError(f"no pattern {name!r}: known are {', '.join(PATTERNS)}")
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5 + phase) / period
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5 + phase) / period
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = colour
    inside = np.broadcast_to(_PATTERNS[name](y, x) * period, (height, width))
    paint(canvas, second, np.clip(0.5 - inside, 0, 1).astype(np.float32))
    return canvas


def paint(canvas: Floats, colour: Colour | Floats, where: Floats) -> None:
    """Lay `colour`, or a picture of the canvas's size, over the canvas where the mask says so."""
    cover = where[..., None]
    canvas += cover * (np.asarray(colour, np.float32) - canvas)


def to_image(canvas: Floats) -> Image:
    """The canvas as a Pillow image, RGB."""
    from PIL import Image

    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


# Signed distances to an outline, about right near it, in units of the radius; negative inside.


def _circle(y: Floats, x: Floats) -> Floats:
    return np.hypot(y, x) - 1


def _ring(y: Floats, x: Floats) -> Floats:
    return np.abs(np.hypot(y, x) - 0.75) - 0.25


def _square(y: Floats, x: Floats) -> Floats:
    return np.maximum(np.abs(y), np.abs(x)) - math.sqrt(0.5)


def _diamond(y: Floats, x: Floats) -> Floats:
    return (np.abs(y) + 1.6 * np.abs(x) - 1) / math.hypot(1, 1.6)


def _triangle(y: Floats, x: Floats) -> Floats:
    side = (math.sqrt(3) * np.abs(x) - y - 1) / 2
    return np.maximum(side, y - 0.5)


def _cross(y: Floats, x: Floats) -> Floats:
    along, across = np.maximum(np.abs(y), np.abs(x)), np.minimum(np.abs(y), np.abs(x))
    return np.maximum(along - 0.95, across - 0.3)


def _star(y: Floats, x: Floats) -> Floats:
    """Five points: in each of ten wedges the edge is the line from a tip to an inner corner."""
    wedge, inner = math.pi / 5, 0.42
    turned = np.abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)
    radius = np.hypot(y, x)
    along, across = radius * np.cos(turned), radius * np.sin(turned)
    corner = (inner * math.cos(wedge), inner * math.sin(wedge))
    normal = (corner[1], 1 - corner[0])
    length = math.hypot(*normal)
    return ((along - 1) * normal[0] + across * normal[1]) / length


def _heart(y: Floats, x: Floats) -> Floats:
    """Two discs over a wedge whose sides touch them."""
    disc = np.hypot(y + 0.3, np.abs(x) - 0.4) - 0.5
    wedge = np.maximum(0.765 * np.abs(x) + 0.644 * (y - 0.95), -y - 0.05)
    return np.minimum(disc, wedge)


def _none(y: Floats, x: Floats) -> Floats:
    return np.full(np.broadcast_shapes(y.shape, x.shape), 1.0, np.float32)


def _stripes(y: Floats, x: Floats) -> Floats:
    diagonal = (y + x) / math.sqrt(2)
    return np.abs(diagonal % 1 - 0.5) - 0.25


def _dots(y: Floats, x: Floats) -> Floats:
    return np.hypot(y % 1 - 0.5, x % 1 - 0.5) - 0.28


def _checks(y: Floats, x: Floats) -> Floats:
    across, down = np.abs(x % 1 - 0.5) - 0.25, np.abs(y % 1 - 0.5) - 0.25
    # inside where exactly one of the two is: the sign of the product, the nearer edge's distance
    return np.where(across * down < 0, -1, 1) * np.minimum(np.abs(across), np.abs(down))


_DISTANCES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
    "heart": _heart,
}
_PATTERNS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "plain": _none,
    "striped": _stripes,
    "dotted": _dots,
    "checked": _checks,
}
SHAPES, PATTERNS = tuple(_DISTANCES), tuple(_PATTERNS)
