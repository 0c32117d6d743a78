"""How well an answer about a vase fits the reference: exactly, after normalising, in part.

Attributes that archives record, each written in many ways: fabric (Athenian, Attic), technique
(black figure, BF, 黑绘), shape, provenance, date (ranges of years), attribution (… to the Berlin
Painter), decoration. Standard library only.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

ATTRIBUTES = (
    "fabric", "technique", "shape", "provenance", "date", "attribution", "decoration",
)  # fmt: skip
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_FORMAT = re.compile(
    r"\s*(?:<think>(?:(?!</?think>).)+</think>\s*)?<answer>(?:(?!</?answer>).)+</answer>\s*",
    re.DOTALL | re.IGNORECASE,
)
_WORD = re.compile(r"[a-z]+|\d+|[\u4e00-\u9fff]")
_ARTICLES = frozenset({"a", "an", "the", "of", "is", "it", "this", "to", "in", "on", "by", "and"})
_ARTICLES |= {"vase", "attributed", "answer", "c", "ca", "circa", "about"}
_CENTURY = re.compile(r"(\d+|[a-z]+)(?:st|nd|rd|th)?\s+century")
_ORDINALS = {
    "first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7,
    "eighth": 8, "ninth": 9, "tenth": 10,
}  # fmt: skip
_YEARS = re.compile(r"(\d{2,4})(?:\s*(?:-|–|—|to|/)\s*(\d{1,4}))?")
# Words that mean the same; the first is what the others become.
_SAME = (
    ("attic", "athenian"),
    ("black-figure", "black figure", "black-figured", "blackfigure", "黑绘", "黑像"),
    ("red-figure", "red figure", "red-figured", "redfigure", "红绘", "红像"),
    ("white-ground", "white ground", "whiteground", "白底"),
    ("lekythos", "lecythus", "lekythus", "lekythoi"),
    ("kylix", "cylix", "cup", "kylikes"),
    ("krater", "crater", "kraters"),
    ("amphora", "amphorae", "amphoras", "双耳瓶"),
    ("oinochoe", "oenochoe", "jug"),
    ("bc", "bce", "b.c.", "公元前"),
)
_SPELLINGS = {other: first for first, *others in _SAME for other in others}
_SPELLED = re.compile(
    "|".join(
        rf"(?<!\w){re.escape(text)}(?!\w)" if text.isascii() else re.escape(text)
        for text in sorted(_SPELLINGS, key=len, reverse=True)
    )
)


def answer_in(text: str) -> str:
    """The answer in a completion: inside <answer>, else all that is not thought."""
    found = _ANSWER.search(text)
    return (found[1] if found else _THOUGHT.sub("", text)).strip()


def has_format(text: str) -> bool:
    """Whether a completion is `<answer>…</answer>`, with at most `<think>…</think>` before it."""
    return _FORMAT.fullmatch(text) is not None


def normalise(text: str) -> str:
    """`text` in one way of writing: case, width, accents, punctuation, articles, synonyms."""
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """The words of `text` that carry meaning, normalised; one character each in Chinese."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    plain = _SPELLED.sub(lambda found: f" {_SPELLINGS[found[0]]} ", plain)
    return [word for word in _WORD.findall(plain) if word not in _ARTICLES]


def is_exact(answer: str, reference: str) -> bool:
    """Whether both are the same text, white space at the ends aside."""
    return answer.strip() == reference.strip()


def is_same(answer: str, reference: str) -> bool:
    """Whether both mean the same, however they are written."""
    return normalise(answer) == normalise(reference) != ""


def holds(answer: str, reference: str) -> bool:
    """Whether the reference is in the answer, whatever words stand before and after it."""
    wanted = normalise(reference)
    return wanted != "" and f" {wanted} " in f" {normalise(answer)} "


def credit(answer: str, reference: str) -> float:
    """How much of the reference the answer has, from 0 to 1.

    1 when both mean the same. Of dates, the years that both name over the years that either does
    (intersection over union). Of other answers the F1 of their words: what is missing and what is
    too much both cost.
    """
    if is_same(answer, reference):
        return 1.0
    ours, its = years(answer), years(reference)
    if its is not None:
        return _overlap(ours, its) if ours is not None else 0.0
    return _f1(words(answer), words(reference))


def years(text: str) -> tuple[int, int] | None:
    """The first and last year of a date, BC below zero; None when the text is no date.

    550-500 BC is (-550, -500), 480 BC (-480, -480), the fifth century BC (-500, -401).
    """
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = _SPELLED.sub(lambda found: f" {_SPELLINGS[found[0]]} ", plain)
    is_bc = re.search(r"(?<!\w)bc(?!\w)", plain) is not None
    if century := _CENTURY.search(plain):
        number = int(century[1]) if century[1].isdigit() else _ORDINALS.get(century[1], 0)
        if number:
            first, last = 100 * number - 99, 100 * number
            return (-last, -first) if is_bc else (first, last)
    found = _YEARS.search(plain)
    if not found or not (is_bc or re.search(r"(?<!\w)(ad|ce|year|years)(?!\w)", plain)):
        return None
    first, last = int(found[1]), int(found[2] or found[1])
    return tuple(sorted((-first, -last) if is_bc else (first, last)))  # type: ignore[return-value]


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> float:
    shared = min(one[1], other[1]) - max(one[0], other[0]) + 1
    return max(0, shared) / (one[1] - one[0] + other[1] - other[0] + 2 - max(0, shared))


def _f1(answer: list[str], reference: list[str]) -> float:
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0
