"""Whether training's pictures can be used: a sample at once, all of them when time is taken for it.

With swift, a picture that cannot be used ends the run, or another row takes its place. What was
found is kept, by path, size and time of change.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from shared.files import read_object, write_json
from shared.images import problem

SAMPLE = 64
_BLOCK = 256
_LONGEST = 200  # times as long as wide: Qwen2-VL's resizing refuses more

Report = Callable[[int, int], None]  # of how many so far, and in all


class Seen(NamedTuple):
    """What a picture is: why it cannot be used, or None, and its width and height in pixels."""

    reason: str | None
    size: list[int]


def sample(paths: Sequence[Path], seed: int = 0) -> list[Path]:
    """64 of the paths, the same ones every time; all of them when there are no more."""
    chosen = random.Random(seed).sample(range(len(paths)), min(SAMPLE, len(paths)))
    return [paths[index] for index in sorted(chosen)]


def look(path: Path) -> Seen:
    """Decode a picture and measure it."""
    if reason := problem(path):
        return Seen(f"cannot be decoded ({reason}): replace it, or drop the row", [])
    with Image.open(path) as image:
        size = list(image.size)
    if max(size) > _LONGEST * min(size):
        wide, high = size
        return Seen(f"is {wide} × {high}: a side may be {_LONGEST} times the other at most", size)
    return Seen(None, size)


def check(paths: Iterable[Path], workers: int = 8) -> dict[Path, Seen]:
    """Each picture, decoded."""
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes outside Python's lock
        paths = list(paths)
        return dict(zip(paths, pool.map(look, paths), strict=True))


def unusable(seen: Mapping[Path, Seen]) -> dict[Path, str]:
    """{path: reason} of those that cannot be used."""
    return {path: found.reason for path, found in seen.items() if found.reason}


def check_all(paths: Sequence[Path], memory: Path, report: Report) -> dict[Path, Seen]:
    """Every picture; those that `memory` knows unchanged are not read again.

    report: called after every block with the number checked and the number to check.
    """
    known = {name: note for name, note in read_object(memory).items() if _is_note(name, note)}
    stamps = {path: _stamp(path) for path in paths}
    todo = [path for path in paths if known.get(str(path), [None])[0] != stamps[path]]
    for start in range(0, len(todo), _BLOCK):
        block = todo[start : start + _BLOCK]
        known |= {str(path): [stamps[path], *seen] for path, seen in check(block).items()}
        report(start + len(block), len(todo))
    if todo:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, known, durable=False)
    return {path: Seen(*known[str(path)][1:]) for path in paths}


def _is_note(name: str, note: object) -> bool:
    """Whether this is what `check_all` writes of a picture: [stamp, reason or None, size]."""
    if not (isinstance(note, list) and len(note) == 3 and isinstance(note[1], str | None)):
        return False
    size = note[2]
    if not (isinstance(size, list) and len(size) in (0, 2) and all(type(s) is int for s in size)):
        return False
    try:
        return bool(json.dumps([name, note], ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError):
        return False


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
