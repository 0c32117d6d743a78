"""Pictures of the demo: one to three shapes of one colour in one place, and what to say of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from shared.drawing import COLOURS, SHAPES, Floats, mask, paint

SIDE = 96  # pixels
COLOUR_NAMES = (
    *("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "brown", "pink"),
)
# Where the middle of the shapes lies, (y, x) as shares of the side.
PLACES = {
    "top left": (0.27, 0.27),
    "top right": (0.27, 0.73),
    "bottom left": (0.73, 0.27),
    "bottom right": (0.73, 0.73),
    "middle": (0.5, 0.5),
}
NUMBERS = ("one", "two", "three")
_RADIUS = (17.0, 10.5, 8.0)  # pixels, for one, two and three shapes
# COCO numbers its 80 categories from 1 to 90, with these left out.
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


@dataclass(frozen=True)
class Scene:
    """What a picture shows. count: 1 to 3."""

    count: int
    colour: str
    shape: str
    place: str

    @property
    def category(self) -> str:
        """The name of the scene's category, of 80."""
        return f"{self.colour} {self.shape}"


def all_scenes() -> list[Scene]:
    """Every scene there is, 1,200: no two have the same captions."""
    parts = (range(1, len(NUMBERS) + 1), COLOUR_NAMES, SHAPES, PLACES)
    return [Scene(*choice) for choice in itertools.product(*parts)]


def categories() -> dict[str, int]:
    """Name → id of the 80 categories, the ids with COCO's gaps."""
    names = (f"{colour} {shape}" for colour, shape in itertools.product(COLOUR_NAMES, SHAPES))
    ids = (number for number in range(1, 91) if number not in _UNUSED_IDS)
    return dict(zip(names, ids, strict=True))


def draw(
    scene: Scene, rng: np.random.Generator
) -> tuple[Floats, list[tuple[float, float, float, float]]]:
    """The picture, float32 (96, 96, 3), and a box (x, y, width, height) for every shape."""
    canvas = np.full((SIDE, SIDE, 3), rng.uniform(95, 175), np.float32)
    canvas += rng.normal(0, 5, canvas.shape).astype(np.float32)
    colour = np.array(COLOURS[scene.colour], np.float32) + rng.normal(0, 6, 3)
    radius = _RADIUS[scene.count - 1] * rng.uniform(0.9, 1.1)
    boxes = []
    for centre in _centres(scene, radius, rng):
        where = mask(
            scene.shape, SIDE, SIDE, centre=centre, radius=radius, angle=rng.normal(0, 0.1)
        )
        paint(canvas, np.broadcast_to(colour.astype(np.float32), canvas.shape), where)
        y, x = centre
        boxes.append((round(x - radius, 1), round(y - radius, 1), *(2 * [round(2 * radius, 1)])))
    return canvas, boxes


def _centres(scene: Scene, radius: float, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Where the shapes lie: side by side around the place."""
    y, x = (share * SIDE + rng.normal(0, 2) for share in PLACES[scene.place])
    step = 2.1 * radius
    first = x - step * (scene.count - 1) / 2
    return [(y + rng.normal(0, 1), first + step * number) for number in range(scene.count)]


def captions(scene: Scene) -> list[str]:
    """Five captions, each of which names number, colour, shape and place."""
    number, many = NUMBERS[scene.count - 1], scene.count > 1
    plural = {"cross": "crosses"}.get(scene.shape, f"{scene.shape}s")
    shape, verb = (plural, "are") if many else (scene.shape, "is")
    at = f"in the {scene.place}"
    return [
        f"{number} {scene.colour} {shape} {at}",
        f"A picture of {number} {shape} in {scene.colour}, {at}.",
        f"There {verb} {number} {scene.colour} {shape} {at} of the picture.",
        f"{scene.place}: {scene.colour} {shape}, {scene.count} in all",
        f"The {scene.place} shows {number} {scene.colour} {shape} on grey.",
    ]
