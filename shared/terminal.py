"""Text for a terminal, a pipe or a file: its width, its colours, its columns.

Standard library only.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

_COLOURS = {"red": 31, "green": 32, "yellow": 33}


def width() -> int:
    """Columns of the terminal; 80 where stdout is none."""
    return max(40, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 80


def coloured(text: str, colour: str) -> str:
    """`text` in red, green or yellow where stdout is a terminal and NO_COLOR is not set."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if is_plain or colour not in _COLOURS or not sys.stdout.isatty():
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def fitted(text: str, columns: int, indent: int = 0) -> str:
    """One line of text on lines of at most `columns`, the later ones indented by so many.

    A longer word, a path or an address, stays whole: it can be copied.
    """
    lines = textwrap.wrap(
        text, columns, subsequent_indent=" " * indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines)


def command(text: str, columns: int, indent: int) -> str:
    """A shell command, indented; a long one is continued after backslashes and can be copied."""
    lines = textwrap.wrap(
        text, columns - indent - 2, break_long_words=False, break_on_hyphens=False
    )
    return " \\\n".join(" " * indent + line for line in lines)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], columns: int = 10_000) -> str:
    """Rows of cells as aligned columns below their headers and a line of dashes.

    Of a line that is longer than `columns` the last cell continues below.
    """
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    start = sum(widths[:-1]) + 2 * (len(headers) - 1)  # of the last column
    lines.insert(1, ["-" * width for width in (*widths[:-1], min(widths[-1], columns - start))])
    aligned = ([f"{c:<{w}}" for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(fitted("  ".join(cells).rstrip(), columns, start) for cells in aligned)
