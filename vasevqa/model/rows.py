"""The rows of a training file: read with the place of every mistake, checked, made ready.

    [{"images": ["a.jpg"], "caption": "…",
      "conversations": [{"from": "human", "value": "<image> …"}, {"from": "gpt", "value": "…"}]}]

JSON (a list) and JSON lines, with or without a byte-order mark, any line ends. `messages` with
role and content mean the same as `conversations`; so do the columns that swift knows: query and
response (prompt and completion, question and answer, …), history, and Alpaca's instruction, input,
output. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError, shortened
from shared.files import read_text

TAG = "<image>"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TURNS = ("conversations", "conversation", "messages")  # names of the list of messages
# Columns of rows without messages, in the order in which swift looks for them.
_QUESTIONS = ("query", "prompt", "input", "instruction", "question", "problem")
_ANSWERS = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers", "solution"),
    *("text", "completion", "content"),
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
_KNOWN_ROLES = ("system", "user", "assistant", "tool", "tool_call", "tool_response")
_ELSEWHERE = ("http://", "https://", "data:")
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_LONGEST_PATH = 4096  # what is longer is a picture in base64
_BASE64_HEADS = ("iVBORw0KGgo", "/9j/4", "R0lGOD", "UklGR")  # of PNG, JPEG, GIF, WebP


@dataclass(frozen=True)
class Turn:
    """One message: who speaks, the text, with a tag for each picture among its parts, and these."""

    role: str
    text: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One row as training reads it. `listed` are the images as written; `number` counts from 1."""

    number: int
    listed: tuple[str, ...]
    turns: tuple[Turn, ...]
    source: dict[str, Any] = field(repr=False)

    @property
    def images(self) -> tuple[str, ...]:
        """The images of the row: those listed, and those among the parts of its messages."""
        return self.listed + tuple(image for turn in self.turns for image in turn.images)

    @property
    def sounds_and_films(self) -> list[str]:
        """The paths in `audios` and `videos`."""
        named = (self.source.get(name) or [] for name in ("audios", "videos"))
        lists = (paths if isinstance(paths, list) else [paths] for paths in named)
        return [path for paths in lists for path in paths if isinstance(path, str)]

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
    for name, value in () if row.images else row.source.items():
        if isinstance(value, str) and value.lower().endswith(_PICTURES):
            raise RowError(f"names a picture under {name}: call it images")
    if not any(turn.role == "user" and turn.text.strip() for turn in row.turns):
        raise RowError("has no question: one turn must be the user's (from: human)")
    if not is_grpo and not row.answer.strip():
        raise RowError("has no answer: the last turn must be the assistant's (from: gpt)")
    if is_grpo and not row.images:
        raise RowError("has no images: GRPO asks about a picture")
    if is_grpo and not row.reference.strip():
        raise RowError("has nothing to reward by: add solution, caption or the assistant's answer")


def image_of(part: Any) -> str:
    """The image in a part of a message, '' when it is another part. Raises RowError."""
    if not isinstance(part, dict):
        raise RowError(f"a message has a part that is a {type(part).__name__}, expected an object")
    value = part.get("image", part.get("image_url"))
    value = value.get("url", value.get("path")) if isinstance(value, dict) else value
    if str(part.get("type", "")).startswith("image") and not isinstance(value, str):
        raise RowError(f"a part of a message has no image: {shortened(repr(part))}")
    return value if isinstance(value, str) else ""


def is_file(image: str) -> bool:
    """Whether an entry of `images` is a path, and no address and no picture in base64."""
    is_base64 = len(image) > _LONGEST_PATH or image.startswith(_BASE64_HEADS)
    return not image.startswith(_ELSEWHERE) and not is_base64


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
            raise RowError(f"images holds {shortened(repr(image))}, expected paths")
        paths.append(path)
    return tuple(paths)


def _turns(source: dict[str, Any]) -> tuple[Turn, ...]:
    for name in TURNS:
        if name in source:
            turns = source[name]
            if not isinstance(turns, list) or not turns:
                raise RowError(f"{name} is empty: swift would drop the row silently")
            return tuple(_turn(turn, name) for turn in turns)
    asked = _question_of(source)
    if asked is None:
        raise RowError("has no conversations (or messages, or query and response)")
    turns = [Turn("system", str(source["system"]))] if source.get("system") else []
    for pair in _history_of(source):
        turns += [Turn("user", str(pair[0])), Turn("assistant", str(pair[1]))]
    answer = next((source[name] for name in _ANSWERS if source.get(name)), None)
    answer = answer[0] if isinstance(answer, list) and answer else answer
    turns.append(Turn("user", asked))
    return tuple(turns + ([Turn("assistant", str(answer))] if answer else []))


def _question_of(source: dict[str, Any]) -> str | None:
    """What the columns of a row without messages ask; of Alpaca's, instruction and input."""
    if "instruction" in source and "input" in source:
        parts = (source["instruction"], source["input"])
        return "\n".join(str(part) for part in parts if part)
    return next((str(source[name]) for name in _QUESTIONS if source.get(name)), None)


def _history_of(source: dict[str, Any]) -> list[Any]:
    """The pairs of question and answer before the question. Raises RowError."""
    history = source.get("history") or []
    if isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history):
        return history
    raise RowError("history is no list of pairs [question, answer]")


def _turn(turn: Any, name: str) -> Turn:
    if not isinstance(turn, dict):
        raise RowError(f"{name} holds a {type(turn).__name__}, expected from and value")
    role = str(turn.get("from", turn.get("role")))
    role = _ROLES.get(role, role)
    if role not in _KNOWN_ROLES:
        raise RowError(f"{name} has a turn from {role!r}; allowed: human, gpt, system")
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list):
        images = [image for part in text if (image := image_of(part))]
        texts = [TAG if image_of(part) else str(part.get("text", "")) for part in text]
        return Turn(role, "".join(texts), tuple(images))
    if not isinstance(text, str):
        raise RowError(f"{name} has a turn from {turn.get('from', role)} without text")
    return Turn(role, text)
