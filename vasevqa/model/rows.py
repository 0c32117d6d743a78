"""The rows of a training file: read with the place of every mistake, checked, made ready.

    [{"images": ["a.jpg"], "caption": "…",
      "conversations": [{"from": "human", "value": "<image> …"}, {"from": "gpt", "value": "…"}]}]

JSON (a list) and JSON lines, with or without a byte-order mark, any line ends. `messages` with
role and content, and `query` with `response`, mean the same as `conversations`. Standard library
only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import read_text

TAG = "<image>"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
_KNOWN_ROLES = ("system", "user", "assistant", "tool", "tool_call", "tool_response")
_ELSEWHERE = ("http://", "https://", "data:")


@dataclass(frozen=True)
class Turn:
    """One message: who speaks, and the text (of several parts, those that are text)."""

    role: str
    text: str


@dataclass(frozen=True)
class Row:
    """One row as training reads it. `images` are the paths as written; `number` counts from 1."""

    number: int
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    source: dict[str, Any] = field(repr=False)

    @property
    def answer(self) -> str:
        """What the last turn, the assistant's, says; '' when it is another's."""
        last = self.turns[-1] if self.turns else Turn("", "")
        return last.text if last.role == "assistant" else ""

    @property
    def question(self) -> str:
        """The last thing the user says, without image tags."""
        asked = [turn.text for turn in self.turns if turn.role == "user"]
        return asked[-1].replace(TAG, "").strip() if asked else ""

    @property
    def reference(self) -> str:
        """What a reward compares with: solution, else the assistant's answer, else caption."""
        named = (self.source.get("solution"), self.answer, self.source.get("caption"))
        return next((str(text) for text in named if text), "")


class RowError(ValueError):
    """A row that training could not use; the message says what it lacks."""


def read(path: Path) -> list[dict[str, Any]]:
    """The objects in a .json or .jsonl file. Raises UserError naming file and line."""
    try:
        content = read_text(path, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    rows = _lines(path, content) if path.suffix == ".jsonl" else _list(path, content)
    if not rows:
        raise UserError(f"{path} holds no rows: expected a list of objects, see the README")
    return rows


def parse(source: Any, number: int) -> Row:
    """The row in a JSON object. Raises RowError."""
    if not isinstance(source, dict):
        raise RowError(
            f"is a {type(source).__name__}, expected an object with images, conversations"
        )
    return Row(number, _images(source), _turns(source), source)


def check(row: Row, *, is_grpo: bool) -> None:
    """Raise RowError for a row that swift would drop, misread or learn nothing from."""
    tags = sum(turn.text.count(TAG) for turn in row.turns)
    if tags not in (0, len(row.images)):  # without a tag swift puts the pictures in front
        raise RowError(
            f"has {len(row.images)} image(s) and {tags} {TAG} tag(s): write one tag for each, "
            "where it belongs in the question"
        )
    if not any(turn.role == "user" and turn.text.strip() for turn in row.turns):
        raise RowError("has no question: one turn must be the user's (from: human)")
    if not is_grpo and not row.answer.strip():
        raise RowError("has no answer: the last turn must be the assistant's (from: gpt)")
    if is_grpo and not row.images:
        raise RowError("has no images: GRPO asks about a picture")
    if is_grpo and not row.reference.strip():
        raise RowError("has nothing to reward by: add solution, caption or the assistant's answer")


def is_file(image: str) -> bool:
    """Whether an entry of `images` is a path (and no address or embedded picture)."""
    return not image.startswith(_ELSEWHERE)


def _lines(path: Path, content: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content.split("\n"), 1):  # a text may hold U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: no JSON: {error}") from None
    return rows


def _list(path: Path, content: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        hint = "; one object a line needs the ending .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{path}, line {error.lineno}: no JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}, expected a list of objects")
    return rows


def _images(source: dict[str, Any]) -> tuple[str, ...]:
    images = source.get("images", source.get("image"))
    if images is None:
        return ()
    images = [images] if isinstance(images, (str, dict)) else images
    if not isinstance(images, list):
        raise RowError(f"images is a {type(images).__name__}, expected a list of paths")
    paths: list[str] = []
    for image in images:
        path = image.get("path") if isinstance(image, dict) else image
        if not isinstance(path, str) or not path.strip():
            raise RowError(f"images holds {image!r}, expected paths")
        paths.append(path)
    return tuple(paths)


def _turns(source: dict[str, Any]) -> tuple[Turn, ...]:
    for name in ("conversations", "conversation", "messages"):
        if name in source:
            turns = source[name]
            if not isinstance(turns, list) or not turns:
                raise RowError(f"{name} is empty: swift would leave the row out without a word")
            return tuple(_turn(turn, name) for turn in turns)
    if "query" in source:
        answer = source.get("response")
        turns = [Turn("user", str(source["query"]))]
        return tuple(turns + ([Turn("assistant", str(answer))] if answer else []))
    raise RowError("has no conversations (or messages)")


def _turn(turn: Any, name: str) -> Turn:
    if not isinstance(turn, dict):
        raise RowError(f"{name} holds a {type(turn).__name__}, expected from and value")
    role = str(turn.get("from", turn.get("role")))
    role = _ROLES.get(role, role)
    if role not in _KNOWN_ROLES:
        raise RowError(f"{name} has a turn from {role!r}; allowed: human, gpt, system")
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list):  # parts of text and pictures, which carry no tags
        parts = [part.get("text", "") for part in text if isinstance(part, dict)]
        return Turn(role, " ".join(parts))
    if not isinstance(text, str):
        raise RowError(f"{name} has a turn from {turn.get('from', role)} without text")
    return Turn(role, text)
