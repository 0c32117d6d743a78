"""How much of the reference an answer about a vase has: `credit(answer, reference)`, 0 to 1.

Dates are compared by the years that they name (dates.py), all else by its words, however they are
written: `SAME` and `PLURALS` are the tables. Standard library only.
"""

from __future__ import annotations

import re
from collections import Counter

from vasevqa.model import dates

ATTRIBUTES = (
    "fabric", "technique", "shape", "provenance", "date", "attribution", "decoration",
)  # fmt: skip
# Ways to write the same; the first is what the others become.
SAME = (
    ("athenian", "attic"),
    ("black figure", "black-figure", "black-figured", "blackfigure", "bf", "b.f.", "黑绘", "黑像"),
    ("red figure", "red-figure", "red-figured", "redfigure", "rf", "r.f.", "红绘", "红像"),
    ("white ground", "white-ground", "whiteground", "wg", "白底"),
    ("lekythos", "lecythus", "lekythus"),
    ("kylix", "cylix", "cup"),
    ("krater", "crater"),
    ("amphora", "双耳瓶"),
    ("oinochoe", "oenochoe", "jug"),
    ("painter", "ptr", "p"),
)
# Plurals that no rule makes; -oi is that of -os, -s that of no ending.
PLURALS = {
    "amphorae": "amphora", "hydriai": "hydria", "kylikes": "kylix", "krateres": "krater",
    "pyxides": "pyxis", "lekanides": "lekanis", "pinakes": "pinax", "psykteres": "psykter",
    "alabastra": "alabastron", "rhyta": "rhyton", "oinochoai": "oinochoe", "pelikai": "pelike",
    "phialai": "phiale", "vases": "vase", "boxes": "box", "dishes": "dish", "figures": "figure",
}  # fmt: skip
_EMPTY = frozenset([
    "a", "an", "the", "of", "is", "it", "this", "to", "in", "on", "by", "and", "vase",
    "attributed", "answer", "circa", "about", "around",
])  # fmt: skip
_NEGATIONS = frozenset([
    "not", "non", "no", "neither", "nor", "never", "without", "isn", "aren", "wasn", "不", "非",
    "无",
])  # fmt: skip

_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_FORMAT = re.compile(
    r"\s*(?:<think>(?:(?!</?think>).)+</think>\s*)?<answer>(?:(?!</?answer>).)+</answer>\s*",
    re.DOTALL | re.IGNORECASE,
)
_WORD = re.compile(r"[a-z]+|\d+|[\u4e00-\u9fff]")
_SINGULAR = re.compile(r"(?<=[a-z]{2}[^suoi])s$")  # of cups and kraters; not of glass, Paris
_OI = re.compile(r"(?<=[a-z]{2})oi$")
_SPELLINGS = {other: first for first, *others in SAME for other in others}
_SPELLED = re.compile(
    "|".join(
        rf"(?<!\w){re.escape(text)}(?!\w)" if text.isascii() else re.escape(text)
        for text in sorted(_SPELLINGS, key=len, reverse=True)
    )
)


def credit(answer: str, reference: str) -> float:
    """How much of the reference the answer has, from 0 to 1.

    1 when both mean the same. Of dates, the years that both name over the years that either does
    (intersection over union); an era that one leaves out is the other's. Of other answers the F1
    of their words: what is missing and what is too much both cost. An answer that denies has
    nothing of a reference that does not.
    """
    if is_same(answer, reference):
        return 1.0
    found, wanted = words(answer), words(reference)
    if _NEGATIONS.isdisjoint(found) != _NEGATIONS.isdisjoint(wanted):
        return 0.0
    if dates.is_date(reference):
        ours = dates.years(answer, dates.era_of(reference))
        its = dates.years(reference, dates.era_of(answer))
        return len(ours & its) / len(ours | its)
    return _f1(found, wanted)


def is_exact(answer: str, reference: str) -> bool:
    """Whether both are the same text, white space at the ends aside."""
    return answer.strip() == reference.strip()


def is_same(answer: str, reference: str) -> bool:
    """Whether both mean the same, however they are written."""
    return normalise(answer) == normalise(reference) != "" or _is_same_date(answer, reference)


def holds(answer: str, reference: str) -> bool:
    """Whether the reference is in the answer, whatever words stand before and after it."""
    wanted = normalise(reference)
    is_in = wanted != "" and f" {wanted} " in f" {normalise(answer)} "
    return is_in or _is_same_date(answer, reference)


def normalise(text: str) -> str:
    """`text` in one way of writing: case, width, accents, punctuation, articles, synonyms."""
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """The words of `text` that carry meaning, normalised; one character each in Chinese."""
    singular = " ".join(_singular(word) for word in re.split(r"\s+", dates.plain(text)))
    spelled = _SPELLED.sub(lambda found: f" {_SPELLINGS[found[0]]} ", singular)
    found = _WORD.findall(spelled)
    last = len(found) - 1  # of "Type A", where it is no article
    return [w for at, w in enumerate(found) if w not in _EMPTY or (w == "a" and at == last > 0)]


def _singular(word: str) -> str:
    """A word of a text as one of them, what is written beside it kept."""
    core = word.strip("()[],;:!?\"'")
    one = PLURALS.get(core) or _OI.sub("os", _SINGULAR.sub("", core))
    return word.replace(core, one)


def answer_in(text: str) -> str:
    """The answer in a completion: inside <answer>, else all that is not thought."""
    found = _ANSWER.search(text)
    return (found[1] if found else _THOUGHT.sub("", text)).strip()


def has_format(text: str) -> bool:
    """Whether a completion is `<answer>…</answer>`, with at most `<think>…</think>` before it."""
    return _FORMAT.fullmatch(text) is not None


def _is_same_date(answer: str, reference: str) -> bool:
    if not (dates.is_date(answer) and dates.is_date(reference)):
        return False
    ours, its = (dates.years(text) for text in (answer, reference))
    return ours == its


def _f1(answer: list[str], reference: list[str]) -> float:
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0
