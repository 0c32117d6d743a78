"""The years that a text names, as archaeologists write them. Standard library only.

    years("second half of the 6th c. BC")    the years -550 to -501
    years("490-80 v. Chr."), years("500-450", era="bc"), years("公元前六世纪晚期")

`_WORDS` is the table of ways to write; what is left after it is read by one pattern, `_POINT`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_LENGTHS = {"": 1, "s": 10, "century": 100}  # years of a year, a decade, a century
_SHARES = {
    "first half": (0, 1 / 2), "second half": (1 / 2, 1), "last half": (1 / 2, 1),
    "first quarter": (0, 1 / 4), "second quarter": (1 / 4, 1 / 2), "third quarter": (1 / 2, 3 / 4),
    "fourth quarter": (3 / 4, 1), "last quarter": (3 / 4, 1),
    "first third": (0, 1 / 3), "second third": (1 / 3, 2 / 3), "last third": (2 / 3, 1),
    "early": (0, 1 / 3), "mid": (1 / 4, 3 / 4), "late": (2 / 3, 1), "all": (0, 1),
}  # fmt: skip
_ORDINALS = [
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth",
    "eighteenth", "nineteenth", "twentieth",
]  # fmt: skip
_ROMANS = [
    "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii", "xiii", "xiv", "xv",
    "xvi", "xvii", "xviii", "xix", "xx",
]  # fmt: skip
_ROMAN = "|".join(reversed(_ROMANS))
_CHINESE = "一二三四五六七八九"
_PIECE = r"(?=(?:half|quarter|third|halfte|viertel|moitie|quart)\b)"


def _ordinal(names: Sequence[str]) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{names.index(found[1]) + 1}th"


def _chinese(found: re.Match[str]) -> str:
    """The number of 六, 十二 or 二十."""
    tens, _, ones = found[0].rpartition("十")
    value = 10 * (_CHINESE.find(tens) + 1 or 1) if "十" in found[0] else 0
    return str(value + _CHINESE.find(ones) + 1 if ones else value)


_WORDS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"[‐‑‒–—―−~～]", "-"),
    (r"\d+\.\d+", " "),  # a height, not two years
    # Chinese
    (rf"[{_CHINESE}十]+(?=[世至到和或、/-])", _chinese),
    (r"[公西]元前|前(?=\d)", " bc "),
    (r"[公西]元后?", " ad "),
    (r"世纪", " century "),
    (r"年代", "s "),
    (r"[上前]半[叶期]?", " first half "),
    (r"[下后]半[叶期]?", " second half "),
    (r"早期|初[期叶]?|前期", " early "),
    (r"中[期叶]", " mid "),
    (r"晚期|末[期叶]?|后期", " late "),
    (r"[至到]", " to "),
    (r"[或和、]", " or "),
    (r"大约|约|左右|年", " "),
    # eras
    (r"(?<=\d)(?=(?:bce?|ce|ad|ac|dc)\b)", " "),
    (r"\bb\. ?c\.(?: ?e\.?)?|\bbce?\b\.?|\bbefore christ\b", " bc "),
    (r"\bv(?:or)?\.? ?chr(?:istus)?\b\.?|\bav(?:ant)?\.? ?j\.? ?-? ?c\b\.?", " bc "),
    (r"\ba\. ?c\.?(?!\w)|\bac\b|\bavanti cristo\b", " bc "),
    (r"\ba\. ?d\.?(?!\w)|\bad\b|\bc\. ?e\.(?!\w)|\bce\b|\banno domini\b", " ad "),
    (r"\bn(?:ach)?\.? ?chr(?:istus)?\b\.?|\bap(?:r|res)?\.? ?j\.? ?-? ?c\b\.?", " ad "),
    (r"\bd\. ?c\.?(?!\w)|\bdc\b|\bdopo cristo\b", " ad "),
    (r"\b(bc|ad)(?=\d)", r"\1 "),
    # about
    (r"\b(?:ca?|circa|about|around|approx(?:imately)?|roughly|um|vers|etwa)\b\.?\s*(?=-?\d)", " "),
    # parts of a century
    (rf"\b(?:1\.|1st|1er|erste[rsn]?|premiere?)\s*{_PIECE}", "first "),
    (rf"\b(?:2\.|2nd|2e|zweite[rsn]?|seconde?|deuxieme)\s*{_PIECE}", "second "),
    (rf"\b(?:3\.|3rd|3e|dritte[rsn]?|troisieme)\s*{_PIECE}", "third "),
    (rf"\b(?:4\.|4th|4e|vierte[rsn]?|quatrieme)\s*{_PIECE}", "fourth "),
    (rf"\b(?:final|letzte[rsn]?|derniere?)\s*{_PIECE}", "last "),
    (r"\b(?:halfte|moitie)\b", "half"),
    (r"\b(?:viertel|quart)\b", "quarter"),
    (r"\b(?:beginning|start|anfang|debut|earlier)\b", "early"),
    (r"\b(?:middle|mitte|milieu)\b", "mid"),
    (r"\b(?:end|ende|fin|later)\b", "late"),
    # centuries and decades
    (r"-?\s*\b(?:century|centuries|cent|jahrhunderts?|jhd?ts?|jhs?|siecles?)\b\.?", " century "),
    (rf"\b(?:siglos?|secol[oi]|sec|saec|s)\b\.?\s*({_ROMAN})\b", r"\1 century"),
    (rf"\b({_ROMAN})(?:th|eme|e)?\s+(?:secol[oi]|sec|s|c)\b\.?", r"\1 century"),
    (rf"\bcentury\s+({_ROMAN})\b", r"\1 century"),
    (
        rf"(?<!last )(?<!first )(?<!second )\b({'|'.join(_ORDINALS)})\b(?! half| quarter| third)",
        _ordinal(_ORDINALS),
    ),
    (r"\b(\d{1,2})(?:st|nd|rd|th|eme|e)\b", r"\1th"),
    (r"(?<=\dth)\s+c\b\.?", " century "),
    (
        rf"\b({_ROMAN})(?:th|eme|e)?\b"
        rf"(?=\s*(?:(?:-|to|or|and|/|bis|au)\s*(?:{_ROMAN})(?:th|eme|e)?\s*)?century)",
        _ordinal(_ROMANS),
    ),
    (r"\b(\d{1,2})\.?\s+(?=century)", r"\1th "),
    (r"(\d)(?:'s|er)\b", r"\1s"),
    # from one to another
    (r"\b(?:between|zwischen|entre)\b(.*?)\b(?:and|und|et)\b", r"\1 to "),
    (r"\b(?:or|and|und|et|oder|ou)\b|&", " or "),
    (r"(^|[^\w\s)]|\b(?:to|or|from))\s*-\s*(?=\d)", r"\1 minus "),
    (r"\s*[-/]\s*|\b(?:to|until|till|through|bis|au)\b", " to "),
    (r"\bto(?:\s+to\b)+", "to"),  # of "mid- to late"
    (r"\b(?:of|the|in|from|part|dated?|made|du|de|des|der|del|dell|le|la|im|am|years?)\b", " "),
    (r"\b(?:perhaps|probably|possibly|likely|it|is|was)\b|[(),.:;]", " "),
    (r"\s+", " "),
)
_SHARE = "|".join(_SHARES)
_POINT = re.compile(
    rf"(?:\b(?P<before>bc|ad) )?(?P<shares>(?:\b(?:{_SHARE}) (?:(?:to|or) )?)*)(?P<minus>minus )?"
    r"(?<![\w.])(?P<number>\d{1,4})(?![\d])(?P<ordinal>th)?(?P<unit>s\b| century\b)?"
    rf"(?: (?P<after>bc|ad)\b)?(?: (?P<share>{_SHARE})\b(?! (?:minus |bc |ad )?\d))?"
)


@dataclass(frozen=True)
class Point:
    """A year, decade or century that a text names; era: "bc", "ad" or "" where it says none."""

    digits: str
    unit: str
    era: str
    share: tuple[float, float] = (0, 1)
    is_signed: bool = False
    is_ordinal: bool = False

    def years(self, era: str) -> tuple[int, int]:
        """Its first and last year, BC below zero; `era` holds where the text says none."""
        number, length = int(self.digits), _LENGTHS[self.unit]
        is_bc = (self.era or era) == "bc"
        if self.unit == "century":
            first = -100 * number if is_bc else 100 * number - 99
        else:
            first = 1 - number - length if is_bc else number
        low, high = self.share
        return first + round(low * length), first + round(high * length) - 1


def plain(text: str) -> str:
    """`text` in lower case, in one width, without accents."""
    spread = unicodedata.normalize("NFKD", text).casefold()
    return "".join(char for char in spread if not unicodedata.combining(char))


def years(text: str, era: str = "") -> set[int]:
    """The years that `text` names, BC below zero; `era` ("bc" or "ad") where it says none."""
    named: set[int] = set()
    for span in _spans(text)[0]:
        ends = [point.years(era) for point in span]
        named.update(range(min(low for low, _ in ends), max(high for _, high in ends) + 1))
    return named


def era_of(text: str) -> str:
    """The era that `text` names first, or its descending years tell; "" for none."""
    return next((point.era for span in _spans(text)[0] for point in span if point.era), "")


def is_date(text: str) -> bool:
    """Whether `text` is a date: one with an era or a century, or years and nothing else."""
    spans, rest = _spans(text)
    has_kind = any(point.era or point.unit for span in spans for point in span)
    return bool(spans) and (has_kind or not re.search(r"\w", rest))


Span = list[Point]  # from its first to its last point


def _spans(text: str) -> tuple[list[Span], str]:
    """The dates of a text, and what else it says."""
    text = plain(text)
    for pattern, replacement in _WORDS:
        text = re.sub(pattern, replacement, text)
    groups, rest = _groups(text)
    spans = [span for group in groups for span in _completed(group)]
    return _certain(spans), rest


def _groups(text: str) -> tuple[list[list[Span]], str]:
    """Dates that "to" joins are a span, spans that "or" joins a group; and the words beside."""
    groups: list[list[Span]] = []
    rest, end = "", 0
    for found in _POINT.finditer(text):
        between = text[end : found.start()].strip()
        if groups and between == "to":
            groups[-1][-1].append(_point(found))
        elif groups and between == "or":
            groups[-1].append([_point(found)])
        else:
            groups.append([[_point(found)]])
            rest += between
        end = found.end()
    return groups, rest + text[end:]


def _point(found: re.Match[str]) -> Point:
    shares = re.findall(_SHARE, f"{found['shares']} {found['share'] or ''}")
    lows, highs = zip(*(_SHARES[share] for share in shares or ["all"]), strict=True)
    era = "bc" if found["minus"] else found["before"] or found["after"] or ""
    return Point(
        digits=found["number"],
        unit=(found["unit"] or "").strip(),
        era=era,
        share=(min(lows), max(highs)),
        is_signed=bool(found["minus"]),
        is_ordinal=bool(found["ordinal"]),
    )


def _completed(group: list[Span]) -> list[Span]:
    """What a point leaves out is said by its neighbour: century, first digits, era."""
    points = [point for span in group for point in span]
    for at in reversed(range(len(points) - 1)):
        points[at] = _as_before(points[at], points[at + 1])
    for at in range(1, len(points)):
        points[at] = _as_after(points[at], points[at - 1])
    spans, at = list[Span](), 0
    for span in group:
        kept = [p for p in points[at : at + len(span)] if p.unit or not p.is_ordinal]
        at += len(span)
        spans += [_falling(_whole(kept))] if kept else []
    return spans


def _as_before(point: Point, following: Point) -> Point:
    """6th in "6th to 5th century BC": a century, and BC."""
    could_be = point.is_ordinal or int(point.digits) <= len(_ORDINALS)
    if following.unit == "century" and not point.unit and could_be:
        point = replace(point, unit="century")
    return point if point.era else replace(point, era=following.era)


def _as_after(point: Point, before: Point) -> Point:
    """450 in "-500 to 450" is BC as 500 is; 50 in "-50 to 50" is AD, since BC years fall."""
    if point.era or not before.era:
        return point
    falls = int(point.digits) < int(before.digits)
    return replace(point, era="ad" if before.is_signed and not falls else before.era)


def _whole(span: Span) -> Span:
    """490-80 BC is 490-480, AD 120-30 is 120-130; in 120-90 BC nothing is left out."""
    first, last = span[0], span[-1]
    missing = len(first.digits) - len(last.digits)
    if missing <= 0 or first.unit or last.unit:
        return span
    digits = first.digits[:missing] + last.digits
    rises = int(digits) >= int(first.digits)
    falls = int(digits) <= int(first.digits)
    fits = {"bc": falls, "ad": rises, "": falls or len(first.digits) == 4}[last.era]
    return [*span[:-1], replace(last, digits=digits)] if fits else span


def _falling(span: Span) -> Span:
    """500-450 without an era is BC: years AD rise."""
    falls = int(span[-1].digits) < int(span[0].digits)
    return [replace(point, era="bc") for point in span] if falls and not span[0].era else span


def _certain(spans: list[Span]) -> list[Span]:
    """Without the numbers beside the date: of an inventory, of a catalogue.

    A range or century without an era takes the only one that the text names.
    """
    eras = {point.era for span in spans for point in span} - {""}
    if not eras:
        ranges = [span for span in spans if len(span) > 1 or span[0].unit]
        years = [span for span in spans if len(span[0].digits) >= 3]
        return ranges or (years if len(years) == 1 else [])
    if len(eras) == 1:
        (era,) = eras
        takes = [len(span) > 1 or span[0].unit != "" for span in spans]
        spans = [
            [replace(point, era=era) for point in span] if take else span
            for span, take in zip(spans, takes, strict=True)
        ]
    return [span for span in spans if span[0].era]
