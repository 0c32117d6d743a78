"""What --max_samples says, the same in both stages. Standard library only."""

from __future__ import annotations

from shared.settings import COUNTS, number

ALL = "all"


def most(text: str) -> int | None:
    """How many of a file's samples are used; None for all. Raises UserError for anything else."""
    if text == ALL:
        return None
    return number("max_samples (all or a number)", text, int, COUNTS)
