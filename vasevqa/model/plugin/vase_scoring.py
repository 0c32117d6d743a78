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
_ARTICLES |= {"vase", "attributed", "answer", "circa", "about", "around"}
_NEGATIONS = frozenset({"not", "non", "no", "neither", "nor", "不"})
_CIRCA = re.compile(r"(?<!\w)(?:ca?|approx)\b\.?\s*(?=\d)")
_SINGULAR = re.compile(r"(?<=[a-z]{2}[^suoi])s$")  # not of kylix's kind: glass, lekythos, Paris
_ORDINALS = {
    "first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7,
    "eighth": 8, "ninth": 9, "tenth": 10,
}  # fmt: skip
_ORDINALS |= {numeral: number for number, numeral in enumerate("一二三四五六七八九十", 1)}
_ORDINAL = rf"(\d{{1,2}}(?=st|nd|rd|th|\s|世)|{'|'.join(_ORDINALS)})(?:st|nd|rd|th)?"
_CENTURY = re.compile(rf"(?<![十\d]){_ORDINAL}\s*(?:century|cent\b|c\b|世纪)")
# Which share of a century the words before it mean, from its first year on.
_PARTS = {
    "first half": (0, 1 / 2), "second half": (1 / 2, 1), "last half": (1 / 2, 1),
    "first quarter": (0, 1 / 4), "second quarter": (1 / 4, 1 / 2), "third quarter": (1 / 2, 3 / 4),
    "fourth quarter": (3 / 4, 1), "last quarter": (3 / 4, 1),
    "first third": (0, 1 / 3), "last third": (2 / 3, 1),
    "early": (0, 1 / 3), "mid": (1 / 4, 3 / 4), "late": (2 / 3, 1),
}  # fmt: skip
_PART = re.compile(rf"(?<!\w)({'|'.join(_PARTS)})[\s-]*(?:of\s+)?(?:the\s+)?$")
_YEARS = re.compile(
    r"(?P<minus>(?<![\w.])-)?(?P<first>\d{2,4})(?P<decade>s\b)?"
    r"(?:(?:\s*bc)?\s*(?:-|–|—|\bto\b|\band\b|/)\s*-?(?P<last>\d{1,4}))?"
)
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
    ("bc", "bce", "b.c.", "b.c.e.", "v. chr.", "v.chr.", "v. chr", "公元前"),
)
_SPELLINGS = {other: first for first, *others in _SAME for other in others}
_SPELLED = re.compile(
    "|".join(
        rf"(?<!\w){re.escape(text)}s?(?!\w)" if text.isascii() else re.escape(text)
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
    found = _WORD.findall(_CIRCA.sub("", _spelled(text)))
    return [_SINGULAR.sub("", word) for word in found if word not in _ARTICLES]


def _spelled(text: str) -> str:
    """`text` in lower case, without accents, in one spelling of what has several."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    return _SPELLED.sub(lambda found: f" {_first_spelling(found[0])} ", plain)


def _first_spelling(text: str) -> str:
    return _SPELLINGS.get(text) or _SPELLINGS[text.removesuffix("s")]


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
    too much both cost, and an answer that denies has nothing of one that does not.
    """
    if is_same(answer, reference):
        return 1.0
    ours, its = years(answer), years(reference)
    if its is not None:
        return _overlap(ours, its) if ours is not None else 0.0
    found, wanted = words(answer), words(reference)
    if _NEGATIONS.isdisjoint(found) != _NEGATIONS.isdisjoint(wanted):
        return 0.0
    return _f1(found, wanted)


def years(text: str) -> tuple[int, int] | None:
    """The first and last year of a date, BC below zero; None when the text is no date.

    550-500 BC, 500 to 550 BC and -550 to -500 are (-550, -500), so is 550-500 alone, since years
    AD rise; 490-80 BC is (-490, -480), 480 BC (-480, -480), the 550s BC (-559, -550), the fifth
    century BC (-500, -401), its first half (-500, -451), early and late a third of it.
    """
    plain = _spelled(text)
    is_bc = re.search(r"(?<!\w)bc(?!\w)", plain) is not None
    if century := _CENTURY.search(plain):
        return _of_century(century, _PART.search(plain[: century.start()]), is_bc=is_bc)
    found = _YEARS.search(plain)
    if not found:
        return None
    first, last = _both(found)
    is_ad = re.search(r"(?<!\w)(ad|ce|year|years)(?!\w)", plain) is not None
    is_bc = is_bc or (not is_ad and (found["minus"] is not None or last < first))
    if not is_bc and not is_ad:
        return None
    span = sorted((-first, -last) if is_bc else (first, last))
    return (span[0], span[1])


def _of_century(
    century: re.Match[str], part: re.Match[str] | None, *, is_bc: bool
) -> tuple[int, int]:
    number = _ORDINALS.get(century[1]) or int(century[1])
    first = -100 * number if is_bc else 100 * number - 99
    low, high = _PARTS[part[1]] if part else (0, 1)
    return first + round(100 * low), first + round(100 * high) - 1


def _both(found: re.Match[str]) -> tuple[int, int]:
    """The years that are written: of 490-80 the second is 480, the 550s are 550 to 559."""
    first, last = found["first"], found["last"] or found["first"]
    if len(last) < len(first):
        last = first[: -len(last)] + last
    return int(first), int(last) + 9 * (found["decade"] is not None)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> float:
    shared = min(one[1], other[1]) - max(one[0], other[0]) + 1
    return max(0, shared) / (one[1] - one[0] + other[1] - other[0] + 2 - max(0, shared))


def _f1(answer: list[str], reference: list[str]) -> float:
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0
