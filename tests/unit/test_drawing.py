"""Shapes, patterns and colours of the demos' pictures."""

import math
from itertools import combinations

import numpy as np
import pytest

from shared.drawing import COLOURS, SHAPES, mask, paint, pattern, to_image

# Areas for radius 1, by geometry: a ring of radii 1/2 and 1, a rhombus with half axes 1 and 1/1.6.
AREAS = {
    "circle": math.pi,
    "square": 2.0,
    "triangle": 3 * math.sqrt(3) / 4,
    "star": 10 * 0.42 * math.sin(math.pi / 5) / 2,
    "cross": 4 * 0.95 * 0.6 - 0.6 * 0.6,
    "ring": math.pi * (1 - 0.25),
    "diamond": 2 * 1 / 1.6,
}


def cover(shape, angle=0.0):
    return mask(shape, 160, 160, centre=(80, 80), radius=60.0, angle=angle)


@pytest.mark.parametrize("shape", AREAS)
def test_shapes_have_their_area(shape):
    assert cover(shape).sum() / 60**2 == pytest.approx(AREAS[shape], rel=0.02)


def test_no_two_shapes_look_alike():
    for shape, other in combinations(SHAPES, 2):
        assert np.abs(cover(shape) - cover(other)).mean() > 0.02


def test_a_shape_lies_where_it_is_put_and_turns_clockwise():
    y, x = np.nonzero(mask("square", 40, 80, centre=(10, 60), radius=6) > 0.5)
    assert (y.mean() + 0.5, x.mean() + 0.5) == pytest.approx((10, 60), abs=0.1)
    turned = cover("triangle", angle=math.pi / 2)
    assert np.allclose(turned, np.rot90(cover("triangle"), -1), atol=1e-3)


@pytest.mark.parametrize("name, share", [("striped", 0.5), ("dotted", math.pi * 0.28**2)])
def test_patterns_cover_their_share(name, share):
    canvas = pattern(name, 128, 128, COLOURS["white"], COLOURS["black"], period=16)
    white, black = COLOURS["white"][0], COLOURS["black"][0]
    assert (white - canvas.mean()) / (white - black) == pytest.approx(share, abs=0.02)


def test_checks_alternate():
    canvas = pattern("checked", 64, 64, (0, 0, 0), (200, 200, 200), period=16)[..., 0]
    middles = canvas[8::8, 8::8] > 100
    expected = (np.indices(middles.shape).sum(0) % 2 == 0) == middles[0, 0]
    assert np.array_equal(middles, expected)


def test_a_phase_moves_the_pattern():
    first = pattern("dotted", 32, 32, (0, 0, 0), (255, 255, 255), period=8)
    moved = pattern("dotted", 32, 32, (0, 0, 0), (255, 255, 255), period=8, phase=3)
    assert np.allclose(first[3:, 3:], moved[:-3, :-3], atol=1e-3)


def test_paint_mixes_by_the_mask_and_to_image_rounds():
    canvas = pattern("plain", 1, 3, (0, 0, 0), (0, 0, 0), period=1)
    paint(canvas, (100, 200, 255), np.array([[0, 0.5, 1]], np.float32))
    assert to_image(canvas).tobytes() == bytes([0, 0, 0, 50, 100, 128, 100, 200, 255])
