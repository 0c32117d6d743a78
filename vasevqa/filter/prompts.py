"""The prompts that pictures are compared with. Standard library only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UserError, did_you_mean, one_line
from shared.files import read_text

DEFAULT = Path(__file__).with_name("prompts.txt")
_GROUPS = ("high", "low")


@dataclass(frozen=True)
class Prompts:
    """Texts of good pictures and of bad ones."""

    high: tuple[str, ...]
    low: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Changes with every text and with their order."""
        return hashlib.sha256(repr((self.high, self.low)).encode()).hexdigest()[:16]


def read(path: Path) -> Prompts:
    """The prompts of a file: a text a line below [high] and [low], # begins a comment line.

    Raises UserError with the line for anything else, and for an empty group.
    """
    try:
        lines = read_text(path, "utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {one_line(error)}") from None
    groups: dict[str, list[str]] = {name: [] for name in _GROUPS}
    group = ""
    for number, text in enumerate((line.strip() for line in lines), 1):
        if text.startswith("[") and text.endswith("]"):
            group = text[1:-1].strip().lower()
            if group not in groups:
                near = did_you_mean(group, _GROUPS)
                raise UserError(
                    f"{path}:{number}: unknown group {text}; allowed: [high], [low]{near}"
                )
        elif text and not text.startswith("#"):
            if not group:
                raise UserError(f"{path}:{number}: write [high] or [low] above the first prompt")
            groups[group].append(text)
    for name, texts in groups.items():
        if not texts:
            raise UserError(f"{path} has no prompt below [{name}]: both groups need at least one")
    return Prompts(tuple(groups["high"]), tuple(groups["low"]))
