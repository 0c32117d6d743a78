"""CSV files with a header, read with the line of every row."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from shared.errors import UserError
from shared.files import read_bytes


def read_table(path: Path, encoding: str, columns: list[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with a header, each with its line number.

    Raises UserError, with file and line, for one that is missing, in another encoding, without
    these columns or with a row of another length.
    """
    try:
        text = read_bytes(path).decode(encoding)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): download_datasets.py fetches it"
        ) from None
    except UnicodeDecodeError as error:
        line = read_bytes(path)[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not {encoding}; fetch the file again") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval=None)
    lacking = [column for column in columns if column not in _header(reader, path)]
    if lacking:
        raise UserError(f"{path} has no column {', '.join(lacking)}: is it the right file?")
    rows = []
    try:
        for row in reader:
            if "" in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num}: another number of columns")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; fetch the file again") from None
    return rows


def _header(reader: csv.DictReader[str], path: Path) -> list[str]:
    try:
        return list(reader.fieldnames or [])
    except csv.Error as error:
        raise UserError(f"{path}, line 1: {error}; fetch the file again") from None
