"""What --max_samples says, the same in both stages. Standard library only."""

from __future__ import annotations

ALL = "all"


def most(text: str) -> int | None:
    """How many of a file's samples are used; None for all. Raises ValueError for anything else."""
    if text == ALL:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"max_samples must be a number above 0 or all, got {text}")
    return int(text)
