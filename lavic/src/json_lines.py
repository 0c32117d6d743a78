"""Lines of JSON written by others: what is wrong is named with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import open_regular


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line of `path` that is not blank.

    A byte order mark and CRLF are taken as they come. Raises UserError, with file and line, for a
    line that is no JSON object, and for a file that cannot be read.
    """
    try:
        with open_regular(path) as lines:
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, _object(line, f"{path} line {number}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        raise UserError(f"{place} is no UTF-8 text: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place} is no JSON ({error.msg} at column {error.colno}): mend or remove the line"
        ) from None
    except RecursionError:
        raise UserError(f"{place} is nested too deeply: mend or remove the line") from None
    if not isinstance(value, dict):
        raise UserError(f"{place} holds a {type(value).__name__}, expected an object {{…}}")
    return value
