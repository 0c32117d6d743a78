"""Which pictures the catalogue names: their files and addresses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lavic.src.json_lines import read_objects
from shared.errors import UserError, one_line
from shared.files import read_text


@dataclass(frozen=True)
class Picture:
    """One picture to have: its split, its file's name and its address, as the catalogue says."""

    split: str
    name: str
    url: str


def pictures_of(split: str, path: Path) -> list[Picture]:
    """The pictures of an item file, each file name once (the first counts).

    A .json file holds {asin: {"images": [{"large": url}, …]}}, whose pictures are called
    {asin}_{index}.jpg; a .jsonl file has a line {"image_name", "image": url} for each.
    Raises UserError for a file that is neither, and for a line that is no object.
    """
    if path.suffix == ".json":
        pairs = _of_items(path)
    elif path.suffix == ".jsonl":
        pairs = _of_lines(path)
    else:
        raise UserError(f"{path} must end in .json (all items) or .jsonl (a line a picture)")
    found: dict[str, Picture] = {}
    for name, url in pairs:
        found.setdefault(name, Picture(split, name, url))
    pictures = list(found.values())
    if not pictures:
        raise UserError(f"{path} names no picture: check that it is the right file")
    if not any(picture.url for picture in pictures):
        field = "images[].large" if path.suffix == ".json" else "image"
        raise UserError(
            f"{path}: none of {len(pictures)} pictures has an address: expected one under {field}"
        )
    return pictures


def why_unusable(picture: Picture) -> str | None:
    """Why this picture cannot even be asked for, or None."""
    plain = (
        picture.name
        and Path(picture.name).name == picture.name
        and not picture.name.startswith(".")
    )
    if not plain or "\0" in picture.name or "\\" in picture.name:
        return "its name is no plain file name"
    try:
        parts = urlsplit(picture.url)
    except ValueError:
        return "its address cannot be read"
    is_web = parts.scheme in ("http", "https") and parts.netloc
    return None if is_web else "it has no http address"


def _of_items(path: Path) -> Iterator[tuple[str, str]]:
    try:
        items = json.loads(read_text(path, "utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: {error.msg}; is the file whole?") from None
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise UserError(f"{path} cannot be read: {one_line(error)}; is the file whole?") from None
    if not isinstance(items, dict):
        raise UserError(f"{path} must hold one object of items, found {type(items).__name__}")
    for asin, item in items.items():
        images = item.get("images") if isinstance(item, dict) else None
        for index, image in enumerate(images if isinstance(images, list) else []):
            yield f"{asin}_{index}.jpg", _text(image, "large")


def _of_lines(path: Path) -> Iterator[tuple[str, str]]:
    for _, entry in read_objects(path):
        yield _text(entry, "image_name"), _text(entry, "image")


def _text(entry: Any, key: str) -> str:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value.strip() if isinstance(value, str) else ""
