"""Procedural faces: who it is comes from a few latent numbers, how it was taken from others.

The latents (one row a person) set skin, hair, outline, eyes, brows, nose and mouth; a `Shot` sets
pose, light, background, clothes, expression and noise of one picture. Light and background change
the pixels far more than identity does, so raw pixels say little about who it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SIZE = 112  # pixels a side
NUM_LATENTS = 12
_EDGE = 28.0  # steepness of an outline: two pixels from outside to inside

Colour = np.ndarray  # (3,) float, 0..1


@dataclass(frozen=True)
class Look:
    """What one person's face is like; lengths in half picture widths, centre of the face at 0."""

    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    face_width: float
    jaw: float
    hair_volume: float
    hairline: float
    eye_distance: float
    eye_size: float
    brow_thickness: float
    brow_slope: float
    nose_length: float
    nose_width: float
    mouth_width: float


@dataclass(frozen=True)
class Shot:
    """How one picture was taken."""

    shift: tuple[float, float]  # half picture widths, right and down
    angle: float  # radians
    zoom: float
    yaw: float  # sideways shift of the features within the outline
    smile: float
    gain: Colour  # brightness and colour cast of the light
    slope: tuple[float, float]  # change of light across and down the picture
    backdrop: np.ndarray  # (2, 3) colours at the top and the bottom
    clothes: Colour
    noise: float  # standard deviation of the sensor noise
    seed: int


def look_of(latents: np.ndarray) -> Look:
    """The face of one row of latents (12,), each about standard normal."""
    # -1..1, so that no face falls apart; plain floats, so that the drawing stays in float32.
    s = np.tanh(latents / 1.5).tolist()
    light = 0.62 + 0.24 * s[0]
    skin = light * np.array([1.12, 0.86 + 0.06 * s[1], 0.70 - 0.12 * s[1]])
    hair = 0.30 + 0.26 * s[2] + np.array([0.10, 0.0, -0.12]) * (1 + 1.2 * s[3])
    return Look(
        skin=skin.clip(0, 1),
        hair=hair.clip(0.02, 1),
        iris=np.array([0.30 - 0.2 * s[4], 0.32, 0.30 + 0.3 * s[4]]),
        lips=(skin * np.array([0.95, 0.62, 0.66])).clip(0, 1),
        face_width=0.50 + 0.09 * s[5],
        jaw=0.25 * s[6],
        hair_volume=0.14 + 0.09 * s[3],
        hairline=-0.42 + 0.14 * s[7],
        eye_distance=0.23 + 0.055 * s[8],
        eye_size=0.085 + 0.025 * s[9],
        brow_thickness=0.035 + 0.018 * s[10],
        brow_slope=0.22 * s[6],
        nose_length=0.24 + 0.07 * s[11],
        nose_width=0.085 + 0.03 * s[5],
        mouth_width=0.20 + 0.07 * s[10],
    )


def draw_shot(rng: np.random.Generator) -> Shot:
    """A random way to take a picture."""
    return Shot(
        shift=(rng.uniform(-0.05, 0.05), rng.uniform(-0.05, 0.05)),
        angle=rng.normal(0, 0.06),
        zoom=rng.uniform(0.95, 1.06),
        yaw=rng.normal(0, 0.05),
        smile=rng.normal(0, 0.5),
        gain=rng.uniform(0.7, 1.2) * rng.normal(1, 0.04, 3),
        slope=(rng.normal(0, 0.15), rng.normal(0, 0.15)),
        backdrop=rng.uniform(0.2, 0.8, (2, 3)),
        clothes=rng.uniform(0.1, 0.9, 3),
        noise=rng.uniform(0.01, 0.04),
        seed=int(rng.integers(1 << 31)),
    )


def draw_face(look: Look, shot: Shot) -> np.ndarray:
    """The picture, uint8 (112, 112, 3) RGB."""
    canvas = _Canvas(shot)
    _draw_background(canvas, look, shot)
    _draw_head(canvas, look)
    for side in (-1.0, 1.0):
        _draw_eye(canvas, look, shot, side)
    _draw_nose_and_mouth(canvas, look, shot)
    return canvas.develop(shot)


class _Canvas:
    """A picture under construction, addressed in the face's own coordinates (u right, v down)."""

    def __init__(self, shot: Shot) -> None:
        ramp = (np.arange(SIZE, dtype=np.float32) + 0.5) / (SIZE / 2) - 1
        self.x, self.y = np.meshgrid(ramp, ramp)
        cos, sin = math.cos(shot.angle) / shot.zoom, math.sin(shot.angle) / shot.zoom
        x, y = self.x - shot.shift[0], self.y - shot.shift[1]
        self.u, self.v = cos * x + sin * y, cos * y - sin * x
        # Colours as planes: with the colour last, numpy takes five times as long.
        self.rgb = np.zeros((3, SIZE, SIZE), np.float32)

    def paint(self, cover: np.ndarray, colour: Colour) -> None:
        """Lay a colour over the picture; `cover` (112, 112) in 0..1 hides what lay below."""
        self.rgb += cover * (_planes(colour) - self.rgb)

    def ellipse(
        self, centre: tuple[float, float], radii: tuple[float, float], tilt: float = 0.0
    ) -> np.ndarray:
        """How much of each pixel an ellipse covers; `tilt` lowers its right end."""
        u, v = self.u - centre[0], self.v - centre[1]
        v = v - tilt * u
        return _soft((1 - _norm(u / radii[0], v / radii[1])) * min(radii))

    def develop(self, shot: Shot) -> np.ndarray:
        """The picture under its light and with noise, uint8."""
        light = 1 + shot.slope[0] * self.x + shot.slope[1] * self.y
        rgb = self.rgb * light * _planes(shot.gain)
        noise = np.random.default_rng(shot.seed).standard_normal(rgb.shape, np.float32)
        rgb += shot.noise * noise
        levels = (rgb.clip(0, 1) * 255 + 0.5).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(1, 2, 0))


def _draw_background(canvas: _Canvas, look: Look, shot: Shot) -> None:
    height = (canvas.y + 1) / 2
    canvas.rgb[:] = _planes(shot.backdrop[0]) * (1 - height) + _planes(shot.backdrop[1]) * height
    canvas.paint(canvas.ellipse((0, 1.25), (0.85, 0.5)), shot.clothes)
    canvas.paint(canvas.ellipse((0, 0.75), (0.22, 0.4)), look.skin * 0.85)


def _draw_head(canvas: _Canvas, look: Look) -> None:
    volume, width = look.hair_volume, look.face_width
    long_hair = canvas.ellipse((0, -0.14 + volume), (width + volume, 0.62 + volume))
    canvas.paint(long_hair, look.hair)
    # A wider jaw: the lower half of the outline narrows less towards the chin.
    below = canvas.v.clip(0, 1)
    u = canvas.u / (width * (1 + look.jaw * below))
    face = _soft((1 - _norm(u, (canvas.v - 0.05) / 0.70)) * width)
    canvas.paint(face, look.skin)
    fringe = long_hair * _soft(look.hairline + 0.25 * canvas.u**2 - canvas.v)
    canvas.paint(fringe, look.hair)


def _draw_eye(canvas: _Canvas, look: Look, shot: Shot, side: float) -> None:
    u, v, size = side * look.eye_distance + shot.yaw, -0.08, look.eye_size
    canvas.paint(canvas.ellipse((u, v), (size * 1.35, size * 0.8)), np.array([0.93, 0.93, 0.9]))
    iris = canvas.ellipse((u + 0.3 * shot.yaw, v), (size * 0.62, size * 0.62))
    canvas.paint(iris, look.iris)
    canvas.paint(canvas.ellipse((u + 0.3 * shot.yaw, v), (size * 0.3, size * 0.3)), np.zeros(3))
    brow = canvas.ellipse(
        (u, v - 0.10 - size), (0.13, look.brow_thickness), tilt=-side * look.brow_slope
    )
    canvas.paint(brow, look.hair * 0.7)


def _draw_nose_and_mouth(canvas: _Canvas, look: Look, shot: Shot) -> None:
    tip = look.nose_length
    bridge = canvas.ellipse((1.3 * shot.yaw, tip / 2 - 0.02), (0.03, tip / 2 + 0.04))
    canvas.paint(0.5 * bridge, look.skin * 1.15)
    base = canvas.ellipse((1.3 * shot.yaw, tip), (look.nose_width, 0.035))
    canvas.paint(0.8 * base, look.skin * 0.68)
    u = canvas.u - shot.yaw
    bend = 0.6 * shot.smile * (u**2 - 0.5 * look.mouth_width**2)
    inside = 1 - _norm(u / look.mouth_width, (canvas.v - 0.44 + bend) / 0.055)
    canvas.paint(_soft(inside * 0.055), look.lips)


def _planes(colour: Colour) -> np.ndarray:
    return colour.astype(np.float32)[:, None, None]


def _norm(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v)  # np.hypot guards against overflow and takes five times as long


def _soft(distance: np.ndarray) -> np.ndarray:
    """1 inside (positive distance), 0 outside, an edge of about two pixels between them."""
    return (distance * _EDGE + 0.5).clip(0, 1)
