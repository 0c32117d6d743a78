"""The demo's products: pictures of one shape each, what they show in words, talks about them.

Everything a description or a request says can be seen in the picture; titles say nothing of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shared.drawing import COLOURS, mask, paint, pattern, to_image

PRODUCT_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
PRODUCT_SHAPES = ("circle", "square", "triangle", "cross", "ring")
PRODUCT_PATTERNS = ("plain", "striped", "dotted")
BACKGROUNDS = ("white", "grey", "black")
# (width, height): of 5, 5, 5, 3, 3, 4 and 4 views in a tower of 48 pixels
SIZES = ((96, 96), (110, 90), (84, 108), (80, 48), (48, 80), (180, 60), (60, 180))

_KINDS = ("Wall Sign", "Desk Tag", "Door Badge", "Shelf Charm", "Cabin Plate", "桌牌 ✨")
_STYLES = ("Classic", "Handmade", "Modern", "Compact", "Premium", "Vintage")
_REQUESTS = (
    "I am looking for something {colour} on {background}.",
    "Does anybody know a nice {colour} one on {background}?",
    "Our hall is {background}, a sign in {colour} would look good there.",
    "Please help me find one on {background}, it should be {colour}.",
)
_COMMENTS = (
    "Which size do you have in mind?",
    "There are many of these.",
    "I bought one last year and like it.",
    "Look at the pictures before you order.",
)
_REPLY = "This one would suit you."


class Look(NamedTuple):
    """What a picture shows."""

    colour: str
    shape: str
    pattern: str
    background: str

    @property
    def description(self) -> str:
        """The picture in words."""
        return f"A {self.colour} {self.pattern} {self.shape} on {self.background}."


@dataclass(frozen=True)
class Item:
    """A product: its id, its title, and its look, the same in all its pictures."""

    id: str
    title: str
    look: Look


def all_looks() -> list[Look]:
    """Every combination, in order."""
    parts = (PRODUCT_COLOURS, PRODUCT_SHAPES, PRODUCT_PATTERNS, BACKGROUNDS)
    return [Look(*words) for words in itertools.product(*parts)]


def make_items(looks: list[Look], rng: np.random.Generator) -> list[Item]:
    """One product a look. Of ten ids one is like a book's number, the others begin with B."""
    numbers = rng.choice(10**4, len(looks), replace=False)
    ids = [
        f"155860{number:04d}" if index % 10 == 9 else f"B0DEMO{number:04d}"
        for index, number in enumerate(numbers)
    ]
    titles = [f"{_one(rng, _STYLES)} {_one(rng, _KINDS)}" for _ in looks]
    return [Item(*parts) for parts in zip(ids, titles, looks, strict=True)]


def draw(look: Look, size: tuple[int, int], rng: np.random.Generator) -> Any:
    """A Pillow image of the look, (width, height) = size; place, size and phase vary a little."""
    width, height = size
    canvas = pattern("plain", height, width, COLOURS[look.background], (0, 0, 0), period=8)
    short = min(size)
    where = mask(
        look.shape,
        height,
        width,
        centre=(height / 2 + _shake(rng, short), width / 2 + _shake(rng, short)),
        radius=short * rng.uniform(0.36, 0.44),
    )
    second = tuple(int(channel * 0.25) for channel in COLOURS[look.colour])
    skin = pattern(
        look.pattern,
        height,
        width,
        COLOURS[look.colour],
        second,  # type: ignore[arg-type]
        period=short / 6,
        phase=rng.uniform(0, short / 6),
    )
    paint(canvas, skin, where)
    return to_image(canvas)


def conversation(
    item: Item, items: list[Item], rng: np.random.Generator, *, is_long: bool = False
) -> dict[str, Any]:
    """One talk in which somebody asks for colour and background of `item`, with two lists of ten.

    No other product on a list has both; several have one of them. The product asked for is missing
    from a quarter of the lists candidates_st and from a tenth of the lists candidates_gpt_large.
    """
    request = wish(item.look, int(rng.integers(len(_REQUESTS))))
    comments = "".join(
        f"<comment>{_one(rng, _COMMENTS)}</comment>\n" for _ in range(rng.integers(0, 3))
    )
    context = request + comments
    if is_long:  # longer than any prompt may be; the wish is said again at the end
        context = request + 120 * f"<comment>{_COMMENTS[0]}</comment>\n" + context
    return {
        "context": context,
        "context_items": [],
        "gt": f"<comment>{_REPLY} {item.id}</comment>",
        "gt_items": [item.id],
        "candidates_st": _candidates(item, items, rng, present=rng.random() < 0.75),
        "candidates_gpt_large": _candidates(item, items, rng, present=rng.random() < 0.9),
    }


def wish(look: Look, number: int) -> str:
    """A post that asks for a look's colour and background, in one of several ways."""
    words = {"colour": look.colour, "background": look.background}
    return f"<submission>{_REQUESTS[number % len(_REQUESTS)].format(**words)}</submission>\n"


def talk_texts() -> list[str]:
    """Every sentence that can occur in a talk."""
    wishes = [wish(look, number) for look in all_looks() for number in range(len(_REQUESTS))]
    return [*wishes, *(f"<comment>{text}</comment>\n" for text in (*_COMMENTS, _REPLY))]


def _candidates(
    item: Item, items: list[Item], rng: np.random.Generator, *, present: bool
) -> list[str]:
    same_colour = [i for i in items if _shared(i, item) == (True, False)]
    same_background = [i for i in items if _shared(i, item) == (False, True)]
    neither = [i for i in items if _shared(i, item) == (False, False)]
    count = 3 if present else 4
    chosen = [
        *([item] if present else []),
        *_some(rng, same_colour, 3),
        *_some(rng, same_background, 3),
        *_some(rng, neither, count),
    ]
    return [chosen[index].id for index in rng.permutation(len(chosen))]


def _shared(one: Item, other: Item) -> tuple[bool, bool]:
    """Whether two products have colour and background in common."""
    return one.look.colour == other.look.colour, one.look.background == other.look.background


def _some(rng: np.random.Generator, items: list[Item], count: int) -> list[Item]:
    return [items[int(index)] for index in rng.choice(len(items), count, replace=False)]


def _one(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _shake(rng: np.random.Generator, short: int) -> float:
    return short * rng.uniform(-0.06, 0.06)
