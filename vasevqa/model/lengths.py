"""Rows that are longer than `--max_length`, which swift would drop silently.

A row is counted as the model reads it: Qwen's chat format by the model's own tokenizer, and a
token for every 28 × 28 pixels of a picture (arXiv 2409.12191, section 2.1). torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from vasevqa.model.rows import TAG, Row

_CELL = 28  # pixels: a patch of 14, and 2 x 2 patches make a token
_FEWEST_PIXELS = 4 * _CELL * _CELL
_SYSTEM = "You are a helpful assistant."


class Counter:
    """Counts a row's tokens by the tokenizer.json of a model directory."""

    def __init__(self, model: Path, max_pixels: int, system: str = _SYSTEM) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._max_pixels, self._system = max_pixels, system

    def tokens(self, row: Row, sizes: Mapping[str, Sequence[int]]) -> int:
        """The tokens of `row`; sizes: width and height, in pixels, of its pictures as written."""
        turns = [(turn.role, turn.text.replace(TAG, "")) for turn in row.turns]
        if turns[0][0] != "system":
            turns.insert(0, ("system", self._system))
        chat = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
        written = len(self._tokenizer.encode(chat, add_special_tokens=False).ids)
        known = [sizes[name] for name in row.images if name in sizes]
        marks = 2 * len(known)  # one before and one after each picture
        return (
            written
            + marks
            + sum(picture_tokens(wide, high, self._max_pixels) for wide, high in known)
        )


def picture_tokens(width: int, height: int, max_pixels: int) -> int:
    """The tokens of a picture, after it is scaled to whole cells and at most `max_pixels`."""
    wide, high = (round(side / _CELL) for side in (width, height))
    pixels = wide * high * _CELL * _CELL
    if pixels > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        wide, high = (max(1, math.floor(side / scale / _CELL)) for side in (width, height))
    elif pixels < _FEWEST_PIXELS:
        scale = math.sqrt(_FEWEST_PIXELS / (width * height))
        wide, high = (math.ceil(side * scale / _CELL) for side in (width, height))
    return wide * high
