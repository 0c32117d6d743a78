"""The product files: item2meta_train.json, item2meta_valid.jsonl, and the pictures they name.

Two schemas, chosen by the file's extension:
    .json    one dictionary {item id: {title, images: [{large: address}, …],
             image_descriptions_llava_cleaned: {picture: text}, …}}
    .jsonl   a line a picture {title, image_name, image: address,
             image_description_llava_cleaned, …}
Pictures of the first are called {item id}_{number}.jpg. A byte-order mark, CRLF and blank lines are
no errors; a line that is no JSON object is one, with its file and line. Standard library only:
entry scripts look here before anything slow is imported.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shared.errors import UserError, one_line
from shared.files import open_regular, read_bytes
from shared.settings import COUNTS, number

NO_TITLE = "No Title"
_OF_ITEM, _OF_LINE = "image_descriptions_llava_cleaned", "image_description_llava_cleaned"
_NAMES_SHOWN = 3


# --- samples: a picture and what is said of it ----------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One picture of one product, and the description that the model is to learn."""

    title: str
    image_path: Path
    description: str

    @property
    def text(self) -> str:
        """What tells it from others, wherever its file is."""
        return f"{self.image_path.name}\t{self.title}\t{self.description}"


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
    """The samples of a product file whose picture is in the folder `images`.

    Raises UserError for a file that is missing, of another extension, or not in its schema (with
    the line or the item), and when not one sample has its picture.
    """
    described = list(_described(path))
    there = _names_in(images)
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


def most(text: str) -> int | None:
    """How many samples --max_samples means; None for all. Raises UserError for anything else."""
    if text == "all":
        return None
    return number("max_samples (all or a number)", text, int, COUNTS)


def choose(samples: list[Sample], limit: int | None, seed: int | None) -> list[Sample]:
    """The first `limit` samples (None: all); with a seed as many at random, in order."""
    if limit is None or limit >= len(samples):
        return samples
    if seed is None:
        return samples[:limit]
    chosen = random.Random(seed).sample(range(len(samples)), limit)
    return [samples[index] for index in sorted(chosen)]


def _described(path: Path) -> Iterator[tuple[str, str, str]]:
    """(title, picture's name, description) in the file's order."""
    if _schema(path) == ".jsonl":
        for line, row in read_objects(path):
            name = _text(path, line, row, "image_name")
            yield _title(row), name, _text(path, line, row, _OF_LINE)
        return
    for item, meta in _items(path):
        entry = _entry(path, item, meta)
        texts = entry.get(_OF_ITEM) or {}
        if not isinstance(texts, dict):
            raise UserError(f"{path} item {item}: {_OF_ITEM} must map pictures to texts")
        for name, text in texts.items():
            if not isinstance(text, str):
                raise UserError(f"{path} item {item}: the description of {name} is no text")
            yield _title(entry), name, text


# --- titles ---------------------------------------------------------------------------------------


def read_titles(path: Path) -> dict[str, str]:
    """{item id: title} of a product file of either schema; of a line the id is the picture's name
    up to its last underscore (B08LYS9WYD_4.jpg → B08LYS9WYD).

    Raises UserError as `read_samples` does, and when no item has a title.
    """
    if _schema(path) == ".json":
        titles = {item: _title(_entry(path, item, meta)) for item, meta in _items(path)}
    else:
        rows = ((_text(path, line, row, "image_name"), row) for line, row in read_objects(path))
        titles = {_item_of(name): _title(row) for name, row in rows}
    if not any(title != NO_TITLE for title in titles.values()):
        raise UserError(
            f"{path} gives none of its {len(titles)} items a title: expected a text under 'title'; "
            "check that it is the right file"
        )
    return titles


# --- addresses of pictures ------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture to fetch: its split, its file's name and its address, as the file says."""

    split: str
    name: str
    url: str

    @property
    def problem(self) -> str | None:
        """Why this picture cannot even be asked for, or None."""
        is_plain = Path(self.name).name == self.name and not self.name.startswith(".")
        if not self.name or not is_plain or "\0" in self.name or "\\" in self.name:
            return "its name is no plain file name"
        try:
            parts = urlsplit(self.url)
        except ValueError:
            return "its address cannot be read"
        is_web = parts.scheme in ("http", "https") and parts.netloc
        return None if is_web else "it has no http address"


def read_pictures(split: str, path: Path) -> list[Picture]:
    """The pictures that a product file names, each file name once (the first counts).

    An item or line without a name or an address is passed over or given an empty one.
    Raises UserError as `read_samples` does, and for a file that names no picture, or no address.
    """
    is_json = _schema(path) == ".json"
    pairs = _of_items(path) if is_json else _of_lines(path)
    found: dict[str, Picture] = {}
    for name, url in pairs:
        found.setdefault(name, Picture(split, name, url))
    if not found:
        raise UserError(f"{path} names no picture: check that it is the right file")
    if not any(picture.url for picture in found.values()):
        field = "images[].large" if is_json else "image"
        raise UserError(
            f"{path}: none of {len(found)} pictures has an address: expected one under {field}"
        )
    return list(found.values())


def _of_items(path: Path) -> Iterator[tuple[str, str]]:
    for item, meta in _items(path):
        images = meta.get("images") if isinstance(meta, dict) else None
        for index, image in enumerate(images if isinstance(images, list) else []):
            yield f"{item}_{index}.jpg", _word(image, "large")


def _of_lines(path: Path) -> Iterator[tuple[str, str]]:
    for _, row in read_objects(path):
        yield _word(row, "image_name"), _word(row, "image")


def _word(entry: Any, key: str) -> str:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value.strip() if isinstance(value, str) else ""


# --- the two schemas ------------------------------------------------------------------------------


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line of a JSON-lines file that is not blank.

    Raises UserError, with file and line, for a line that is no JSON object, and for a file that
    cannot be read.
    """
    try:
        with open_regular(path) as lines:
            for line_number, line in enumerate(lines, 1):
                if line_number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield line_number, _object(line, f"{path} line {line_number}")
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


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """(item id, its entry, of any kind) of the dictionary form."""
    try:
        content = json.loads(_content(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {error.lineno} is no JSON ({error.msg} at column {error.colno}); is the "
            "file whole?"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; depth
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, expected one dictionary of items; a file "
            "with a line an item ends in .jsonl"
        )
    yield from content.items()


def _entry(path: Path, item: str, meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict):
        raise UserError(f"{path} item {item}: a {type(meta).__name__}, expected a dictionary")
    return meta


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


def _text(path: Path, line: int, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        have = ", ".join(row) or "none"
        raise UserError(f"{path} line {line}: no text under {key!r} (keys there: {have})")
    return value


def _names_in(folder: Path) -> set[str]:
    """The names of the plain files in a folder."""
    try:
        return {entry.name for entry in folder.iterdir() if entry.is_file()}
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}): fetch the pictures with "
            "src/crawl_images.py, or name the right folder"
        ) from None
