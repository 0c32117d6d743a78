"""The product files: item2meta_train.json, item2meta_valid.jsonl, and the pictures they name.

Two schemas, chosen by the file's extension:
    .json    one dictionary {item id: {title, image_descriptions_llava_cleaned: {image: text}, …}}
    .jsonl   a line a picture {title, image_name, image_description_llava_cleaned, …}
A byte-order mark, CRLF and blank lines are no errors; a line that is no JSON object is one, with
its file and line. Standard library only: entry scripts look here before anything slow is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.src.json_lines import read_objects
from shared.errors import UserError, one_line
from shared.files import read_bytes

NO_TITLE = "No Title"
_OF_ITEM, _OF_LINE = "image_descriptions_llava_cleaned", "image_description_llava_cleaned"
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Sample:
    """One picture of one product, and the description that the model is to learn."""

    title: str
    image_path: Path
    description: str


@dataclass(frozen=True)
class Samples:
    """What a product file and its folder of pictures give together, in the file's order."""

    usable: list[Sample]
    missing: list[str]  # names of pictures that the file describes and the folder lacks
    wordless: list[str]  # names of pictures whose description is empty

    def summary(self, images: Path) -> str:
        """One line: how many there are, and what was left out, with the first names."""
        parts = [f"{len(self.usable)} samples"]
        if self.missing:
            parts.append(
                f"{len(self.missing)} more have no picture in {images} ({_first(self.missing)})"
            )
        if self.wordless:
            parts.append(f"{len(self.wordless)} more have no words ({_first(self.wordless)})")
        return "; ".join(parts)


def read_samples(path: Path, images: Path) -> Samples:
    """The samples of a product file whose picture lies in the folder `images`.

    Raises UserError for a file that is missing, of another extension, or not in its schema (with
    the line or the item), and when not one sample has its picture.
    """
    described = list(_described(path))
    there = set(_names_in(images))
    found = Samples([], [], [])
    for title, name, text in described:
        if not text.strip():
            found.wordless.append(name)
        elif name in there:
            found.usable.append(Sample(title, images / name, text))
        else:
            found.missing.append(name)
    if not found.usable:
        first = f" (the first is {found.missing[0]})" if found.missing else ""
        raise UserError(
            f"{path} has no usable sample: it describes {len(described)} pictures{first}, and "
            f"{images} holds none of them; fetch them with src/crawl_images.py, or name the right "
            "folder"
        )
    return found


def read_titles(path: Path) -> dict[str, str]:
    """{item id: title} of a product file of either schema; of a line the id is the picture's name
    up to its last underscore (B08LYS9WYD_4.jpg → B08LYS9WYD).

    Raises UserError as `read_samples` does, and when no item has a title.
    """
    if _schema(path) == ".json":
        titles = {item: _title(meta) for item, meta in _items(path)}
    else:
        rows = ((_text(path, number, row, "image_name"), row) for number, row in read_objects(path))
        titles = {_item_of(name): _title(row) for name, row in rows}
    if not any(title != NO_TITLE for title in titles.values()):
        raise UserError(
            f"{path} gives none of its {len(titles)} items a title: expected a text under 'title'; "
            "check that it is the right file"
        )
    return titles


def _described(path: Path) -> Iterator[tuple[str, str, str]]:
    """(title, picture's name, description) in the file's order."""
    if _schema(path) == ".jsonl":
        for number, row in read_objects(path):
            name = _text(path, number, row, "image_name")
            yield _title(row), name, _text(path, number, row, _OF_LINE)
        return
    for item, meta in _items(path):
        texts = meta.get(_OF_ITEM) or {}
        if not isinstance(texts, dict):
            raise UserError(f"{path} item {item}: {_OF_ITEM} must map pictures to texts")
        for name, text in texts.items():
            if not isinstance(text, str):
                raise UserError(f"{path} item {item}: the description of {name} is no text")
            yield _title(meta), name, text


def _items(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(item id, its entry) of the dictionary form."""
    try:
        content = json.loads(_content(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {error.lineno} is no JSON ({error.msg} at column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; depth
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, expected one dictionary of items; a file "
            "with a line an item ends in .jsonl"
        )
    for item, meta in content.items():
        if not isinstance(meta, dict):
            raise UserError(f"{path} item {item}: a {type(meta).__name__}, expected a dictionary")
        yield item, meta


def _schema(path: Path) -> str:
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(
            f"{path}: product files end in .json (a dictionary of items) or .jsonl (a line a "
            "picture)"
        )
    return path.suffix


def _content(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): put the file there, or type its path"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it") from None


def _item_of(picture: str) -> str:
    stem = Path(picture).stem
    return stem.rpartition("_")[0] or stem


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")


def _title(row: dict[str, Any]) -> str:
    return str(row.get("title") or NO_TITLE)


def _text(path: Path, number: int, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        have = ", ".join(row) or "none"
        raise UserError(f"{path} line {number}: no text under {key!r} (keys there: {have})")
    return value


def _names_in(folder: Path) -> Iterator[str]:
    """The names of the plain files in a folder."""
    try:
        yield from (entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}): fetch the pictures with "
            "src/crawl_images.py, or name the right folder"
        ) from None
