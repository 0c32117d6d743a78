"""Whether training's pictures can be decoded: a sample at once, all of them beside each other.

With swift, a picture that cannot be decoded is replaced by another row, and training continues.
Results are kept, by path, size and time of change.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shared.files import read_object, write_json
from shared.images import problem

SAMPLE = 64
_BLOCK = 256

Report = Callable[[int, int], None]  # of how many so far, and in all


def sample(paths: Sequence[Path], seed: int = 0) -> list[Path]:
    """64 of the paths, the same ones every time; all of them when there are no more."""
    chosen = random.Random(seed).sample(range(len(paths)), min(SAMPLE, len(paths)))
    return [paths[index] for index in sorted(chosen)]


def check(paths: Iterable[Path], workers: int = 8) -> dict[Path, str]:
    """{path: reason} of the pictures that cannot be decoded."""
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes outside Python's lock
        paths = list(paths)
        found = zip(paths, pool.map(problem, paths), strict=True)
        return {path: reason for path, reason in found if reason}


def _is_note(name: str, row: object) -> bool:
    """Whether this is what `check_all` writes of a picture: [stamp, reason or None]."""
    if not (isinstance(row, list) and len(row) == 2 and isinstance(row[1], str | None)):
        return False
    try:
        return bool(json.dumps([name, row], ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError):
        return False


def check_all(paths: Sequence[Path], memory: Path, report: Report) -> dict[Path, str]:
    """{path: reason} over all pictures; those that `memory` knows unchanged are not read again.

    report: called after every block with the number checked and the number to check.
    """
    known = {n: row for n, row in read_object(memory).items() if _is_note(n, row)}
    stamps = {path: _stamp(path) for path in paths}
    todo = [path for path in paths if known.get(str(path), [None])[0] != stamps[path]]
    for start in range(0, len(todo), _BLOCK):
        block = todo[start : start + _BLOCK]
        bad = check(block)
        known |= {str(path): [stamps[path], bad.get(path)] for path in block}
        report(start + len(block), len(todo))
    if todo:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, known, durable=False)
    return {path: known[str(path)][1] for path in paths if known[str(path)][1]}


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]
