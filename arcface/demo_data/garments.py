"""Procedural garments: cut, pattern and colours say which item it is, all else is the shot's.

A `Style` is what all pictures of an item share. A `Shot` is how one was taken: who wears it, pose,
size, place, background, light and noise, which change the pixels far more than the item does.
Lengths are in half picture widths; u runs to the right and v down from between the shoulders.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np

SIZE = 112  # pixels a side
HUES = 10
PATTERNS = ("logo", "rows", "columns", "diagonals", "dots", "checks")
SLEEVES = {"none": 0.0, "short": 0.30, "long": 0.72}
LENGTHS = {"crop": 0.50, "hip": 0.72, "knee": 1.12}
VIEWS = {"front": 1, "side": 2, "back": 3, "full": 4, "additional": 7}  # with In-shop's numbers
_OVERSAMPLING = 2  # of outlines
_EDGE = 28.0  # steepness of a pattern's edges: two pixels from one colour to the other

Colour = np.ndarray  # (3,) float, 0..1
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Style:
    """What one item looks like."""

    sleeves: str
    length: str
    is_flared: bool
    has_v_neck: bool
    pattern: str
    period: float  # from one stripe or dot to the next
    emblem: int  # 0..3, the shape of the logo
    cloth: Colour
    print_: Colour


@dataclass(frozen=True)
class Shot:
    """How one picture was taken."""

    view: str
    shift: tuple[float, float]
    angle: float  # radians
    zoom: float
    turn: float  # width as seen, 1 from the front
    arms: tuple[float, float]  # radians away from the body, left and right
    skin: Colour
    hair: Colour
    gain: Colour  # brightness and colour cast of the light
    slope: tuple[float, float]  # change of light across and down
    backdrop: np.ndarray  # (2, 3) colours at the top and the bottom
    furniture: np.ndarray  # (2, 7): left, top, width, height and colour of a box
    noise: float  # standard deviation
    seed: int


def style_of(number: int, rng: np.random.Generator) -> Style:
    """The item of this number on the grid of `num_styles()` styles; `rng` sets the fine points."""
    number, hue = divmod(number, HUES)
    number, pattern = divmod(number, len(PATTERNS))
    number, sleeves = divmod(number, len(SLEEVES))
    number, length = divmod(number, len(LENGTHS))
    is_flared, has_v_neck = divmod(number, 2)
    cloth = _paint(hue / HUES + rng.normal(0, 0.012), rng.uniform(0.5, 0.8), rng.uniform(0.5, 0.85))
    prints = [np.full(3, 0.95), np.full(3, 0.08), _paint(hue / HUES + 0.5, 0.7, 0.7)]
    return Style(
        sleeves=list(SLEEVES)[sleeves],
        length=list(LENGTHS)[length],
        is_flared=bool(is_flared),
        has_v_neck=bool(has_v_neck),
        pattern=PATTERNS[pattern],
        period=rng.uniform(0.15, 0.26),
        emblem=int(rng.integers(4)),
        cloth=cloth,
        print_=prints[int(rng.integers(len(prints)))],
    )


def num_styles() -> int:
    """How many combinations of cut, pattern and colour there are."""
    return HUES * len(PATTERNS) * len(SLEEVES) * len(LENGTHS) * 4


def draw_shot(view: str, rng: np.random.Generator) -> Shot:
    """A random way to take a picture from the side that `view` names."""
    zoom = {"full": (0.90, 1.05), "additional": (1.40, 1.60)}.get(view, (1.12, 1.38))
    skin = rng.uniform(0.35, 0.95) * np.array([1.0, 0.80, 0.68])
    return Shot(
        view=view,
        shift=(rng.uniform(-0.14, 0.14), rng.uniform(-0.12, 0.12)),
        angle=rng.normal(0, 0.07),
        zoom=rng.uniform(*zoom),
        turn=rng.uniform(0.60, 0.75) if view == "side" else rng.uniform(0.90, 1.0),
        arms=(rng.uniform(0.08, 0.9), rng.uniform(0.08, 0.9)),
        skin=skin,
        hair=rng.uniform(0.05, 0.6) * np.array([1.0, 0.75, 0.5]),
        gain=rng.uniform(0.7, 1.2) * rng.normal(1, 0.05, 3),
        slope=(rng.normal(0, 0.15), rng.normal(0, 0.15)),
        backdrop=(rng.uniform(0.3, 0.95, (2, 1)) + rng.normal(0, 0.1, (2, 3))).clip(0, 1),
        furniture=rng.uniform(0.0, 1.0, (2, 7)),
        noise=rng.uniform(0.01, 0.04),
        seed=int(rng.integers(1 << 31)),
    )


def draw_garment(style: Style, shot: Shot) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The picture, uint8 (112, 112, 3) RGB, and the garment's box in it (x1, y1, x2, y2)."""
    canvas = _Canvas(shot)
    _draw_background(canvas, shot)
    _draw_person(canvas, shot)
    cover = canvas.polygons(_outline(style, shot))
    canvas.paint(cover, _cloth(canvas, style, shot))
    return canvas.develop(shot), _box(cover)


class _Canvas:
    """A picture under construction, addressed in the garment's own coordinates."""

    def __init__(self, shot: Shot) -> None:
        ramp = (np.arange(SIZE, dtype=np.float32) + 0.5) / (SIZE / 2) - 1
        self.x, self.y = np.meshgrid(ramp, ramp)
        self._cos, self._sin = math.cos(shot.angle) * shot.zoom, math.sin(shot.angle) * shot.zoom
        self._origin = (shot.shift[0], shot.shift[1] - 0.45 * shot.zoom)
        x, y = self.x - np.float32(self._origin[0]), self.y - np.float32(self._origin[1])
        area = shot.zoom**2
        self.u = (self._cos * x + self._sin * y) / np.float32(area)
        self.v = (self._cos * y - self._sin * x) / np.float32(area)
        # Colours as planes: with the colour last, numpy takes five times as long.
        self.rgb = np.zeros((3, SIZE, SIZE), np.float32)

    def polygons(self, outlines: list[Points]) -> np.ndarray:
        """How much of each pixel the union of the outlines (in u, v) covers, (112, 112) 0..1."""
        from PIL import Image, ImageDraw

        side = SIZE * _OVERSAMPLING
        image = Image.new("L", (side, side))
        draw = ImageDraw.Draw(image)
        for outline in outlines:
            draw.polygon([self._to_pixels(u, v, side) for u, v in outline], fill=255)
        return np.asarray(image.reduce(_OVERSAMPLING), dtype=np.float32) / 255

    def paint(self, cover: np.ndarray, colour: np.ndarray) -> None:
        """Lay a colour (3,), or planes (3, 112, 112), over what `cover` covers."""
        planes = _planes(colour) if colour.ndim == 1 else colour
        self.rgb += cover * (planes - self.rgb)

    def develop(self, shot: Shot) -> np.ndarray:
        """The picture under its light and with noise, uint8."""
        light = 1 + shot.slope[0] * self.x + shot.slope[1] * self.y
        rgb = self.rgb * light.astype(np.float32) * _planes(shot.gain)
        noise = np.random.default_rng(shot.seed).standard_normal(rgb.shape, np.float32)
        rgb += np.float32(shot.noise) * noise
        levels = (rgb.clip(0, 1) * 255 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(1, 2, 0))

    def _to_pixels(self, u: float, v: float, side: int) -> tuple[float, float]:
        x = self._cos * u - self._sin * v + self._origin[0]
        y = self._sin * u + self._cos * v + self._origin[1]
        return (x + 1) / 2 * side, (y + 1) / 2 * side


def _draw_background(canvas: _Canvas, shot: Shot) -> None:
    height = (canvas.y + 1) / 2
    canvas.rgb[:] = _planes(shot.backdrop[0]) * (1 - height) + _planes(shot.backdrop[1]) * height
    for left, top, width, tall, *colour in shot.furniture:
        inside = np.minimum(
            np.minimum(canvas.x + 1 - 2 * left, 2 * left + width - canvas.x - 1),
            np.minimum(canvas.y + 1 - 2 * top, 2 * top + tall - canvas.y - 1),
        )
        canvas.paint(_soft(inside), np.array(colour))


def _draw_person(canvas: _Canvas, shot: Shot) -> None:
    turn = shot.turn
    legs = [_limb((side * 0.13 * turn, 0.6), 0.0, 1.5, 0.085) for side in (-1, 1)]
    arms = [_arm(side, shot, 0.85, 0.05) for side in (-1, 1)]
    trunk = [(-0.22 * turn, 0.05), (0.22 * turn, 0.05), (0.18 * turn, 0.8), (-0.18 * turn, 0.8)]
    neck = [(-0.07, -0.2), (0.07, -0.2), (0.09, 0.06), (-0.09, 0.06)]
    canvas.paint(canvas.polygons([*legs, *arms, trunk, neck]), shot.skin)
    canvas.paint(canvas.polygons([_ellipse((0, -0.30), (0.15, 0.19))]), shot.hair)
    if shot.view != "back":
        canvas.paint(canvas.polygons([_ellipse((0, -0.26), (0.11, 0.14))]), shot.skin)


def _outline(style: Style, shot: Shot) -> list[Points]:
    """The outlines of body and sleeves."""
    hem = LENGTHS[style.length]
    waist, at_hem = 0.23, 0.25 + (0.30 * hem if style.is_flared else 0.0)
    depth = 0.03 if shot.view == "back" else 0.28 if style.has_v_neck else 0.10
    right = [(0.12, 0.0), (0.30, 0.05), (0.27, 0.5 * hem), (waist, 0.7 * hem), (at_hem, hem)]
    neck = [(-0.12, 0.0), (0.0, depth)]
    if not style.has_v_neck:
        neck = [(-0.12, 0.0), (-0.08, 0.8 * depth), (0.0, depth), (0.08, 0.8 * depth)]
    left = [(-u, v) for u, v in reversed(right[1:])]
    body = [(u * shot.turn, v) for u, v in (*neck, *right, *left)]
    reach = SLEEVES[style.sleeves]
    return [body, *([_arm(side, shot, reach, 0.085) for side in (-1, 1)] if reach else [])]


def _arm(side: int, shot: Shot, reach: float, width: float) -> Points:
    shoulder = (side * 0.26 * shot.turn, 0.09)
    return _limb(shoulder, side * shot.arms[side > 0] * shot.turn, reach, width)


def _limb(start: tuple[float, float], angle: float, reach: float, width: float) -> Points:
    """A strip from `start` downwards, `angle` radians to the right."""
    along, across = (math.sin(angle), math.cos(angle)), (math.cos(angle), -math.sin(angle))
    ends = [(0.0, -width), (0.0, width), (reach, 0.8 * width), (reach, -0.8 * width)]
    return [
        (start[0] + a * along[0] + b * across[0], start[1] + a * along[1] + b * across[1])
        for a, b in ends
    ]


def _ellipse(centre: tuple[float, float], radii: tuple[float, float]) -> Points:
    steps = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    return [(centre[0] + radii[0] * math.cos(t), centre[1] + radii[1] * math.sin(t)) for t in steps]


def _cloth(canvas: _Canvas, style: Style, shot: Shot) -> np.ndarray:
    """The colour of the cloth everywhere, (3, 112, 112)."""
    printed = _pattern(style, canvas.u / np.float32(shot.turn), canvas.v)
    fold = 1 - 0.10 * np.abs(np.sin(9 * canvas.u + 2 * canvas.v + shot.seed % 7))
    colours = _planes(style.cloth) + printed * (_planes(style.print_) - _planes(style.cloth))
    return colours * fold.astype(np.float32)


def _pattern(style: Style, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How much of the print's colour there is everywhere, 0..1."""
    period = style.period
    if style.pattern == "rows":
        return _stripes(v, period)
    if style.pattern == "columns":
        return _stripes(u, period)
    if style.pattern == "diagonals":
        return _stripes((u + v) * math.sqrt(0.5), period)
    if style.pattern == "checks":
        return (_stripes(u, period) + _stripes(v, period)) / 2
    if style.pattern == "dots":
        a, b = ((w / period) % 1 - 0.5 for w in (u, v))
        return _soft(0.30 * period - period * np.sqrt(a * a + b * b))
    return _emblem(style.emblem, u, v - np.float32(0.34))


def _stripes(along: np.ndarray, period: float) -> np.ndarray:
    return _soft(period * (0.25 - np.abs((along / period) % 1 - 0.5)))


def _emblem(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A disc, a square, a ring or a triangle on the chest."""
    radius = np.sqrt(u * u + v * v)
    if kind == 0:
        return _soft(0.13 - radius)
    if kind == 1:
        return _soft(0.12 - np.maximum(np.abs(u), np.abs(v)))
    if kind == 2:
        return _soft(0.05 - np.abs(radius - 0.11))
    return _soft(np.minimum(0.11 - v, 0.09 - np.abs(u) + v / 2))


def _box(cover: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around what is more than half covered; the whole picture if nothing is."""
    rows, columns = (np.flatnonzero((cover > 0.5).any(axis)) for axis in (1, 0))
    if not len(rows):
        return 0, 0, SIZE - 1, SIZE - 1
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _paint(hue: float, saturation: float, value: float) -> Colour:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _planes(colour: Colour) -> np.ndarray:
    return colour.astype(np.float32)[:, None, None]


def _soft(distance: np.ndarray) -> np.ndarray:
    """1 inside (positive distance), 0 outside, an edge of about two pixels between them."""
    return (distance * np.float32(_EDGE) + np.float32(0.5)).clip(0, 1)
