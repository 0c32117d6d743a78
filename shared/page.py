"""Self-contained HTML pages: text, tables, line charts as inline SVG, thumbnails.

    page = Page("Training report")
    page.add("What happened, in plain words.")
    page.section("Loss")
    page.add(line_chart({"train": (steps, losses)}, x_label="step", y_label="loss"))
    write_text(path, page.render())

One file holds everything: no script, nothing fetched. Text is escaped wherever it comes in; only
`Markup`, which the functions here return, goes in as it stands. Light and dark follow the reader's
system. Standard library only.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

# What neither XML nor UTF-8 can hold: control characters, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SIGNATURES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}

# As dark as light: each has a contrast above 3 to white and to the dark background.
COLOURS = ("#2878c8", "#c8640a", "#1e8a4c", "#b4469b", "#7a63d1", "#8a6d3b")
DARK_BACKGROUND = "#16181c"
_DASHES = ("", "7 3", "2 3", "9 3 2 3")  # told apart without colours, too
# Of a chart, in units of its viewBox; text keeps a readable size on a screen 320 pixels wide.
WIDTH, PLOT_HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 26, 54
_ROW = 19
_GRID = 'stroke="currentColor" stroke-opacity="0.2"'
_LARGEST = 1e200  # beyond it (and below its inverse) ends of an axis leave the range of numbers

_STYLE = f"""
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 60rem; }}
figure {{ margin: 1rem 0; }} figcaption {{ opacity: .75; }}
svg {{ max-width: 45rem; }} img {{ max-width: 100%; vertical-align: middle; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #8886; padding: .25rem .75rem .25rem 0; text-align: left; }}
td {{ font-variant-numeric: tabular-nums; }} td.number {{ text-align: right; white-space: nowrap; }}
body {{ overflow-wrap: anywhere; }} td, th {{ min-width: 4em; }}
td:first-child {{ min-width: 7em; }}
.columns {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 0 1.5rem; }}
.banner {{ border-left: .4rem solid #888; padding: .3rem .8rem; font-size: 1.15rem; }}
.banner.good {{ border-color: #1e8a4c; }} .banner.bad {{ border-color: #c43c3c; }}
.banner.open {{ border-color: #c8640a; }}
.tile {{ display: inline-block; width: 8rem; margin: .4rem; vertical-align: top; }}
.tile figcaption {{ font-size: .75rem; }}
.frame {{ display: inline-block; border: 3px solid transparent; }}
.frame.good {{ border-color: #1e8a4c; }} .frame.bad {{ border-color: #c43c3c; }}
pre {{ overflow-x: auto; font-size: .8rem; padding: .5rem; border: 1px solid #8886; }}
summary {{ cursor: pointer; padding: .3rem 0; }}
@media (prefers-color-scheme: dark) {{ body {{ background: {DARK_BACKGROUND}; color: #e4e6ea; }} }}
"""


class Markup(str):
    """HTML that goes into a page as it stands; any other text is escaped."""

    __slots__ = ()


class Page:
    """A page under construction; `render()` is the whole file."""

    def __init__(self, title: str, language: str = "en") -> None:
        """Begin with the title, which is also the heading; language: a tag such as en, zh-CN."""
        self._title, self._language = escaped(title), escaped(language)
        self._parts: list[str] = []

    def section(self, heading: str) -> None:
        """Begin a new section."""
        self._parts.append(f"<h2>{escaped(heading)}</h2>")

    def add(self, content: str, caption: str = "") -> None:
        """Add a paragraph of text or, of Markup, a figure with an optional caption."""
        if not isinstance(content, Markup):
            self._parts.append(f"<p>{escaped(content)}</p>")
            return
        below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{content}{below}</figure>")

    def render(self) -> str:
        """The page as HTML."""
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        head = (
            f'<!doctype html>\n<html lang="{self._language}">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<link rel="icon" href="data:,">\n<title>{self._title}</title>\n'
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{self._title}</h1>\n"
        )
        return head + "\n".join(self._parts) + "\n</body>\n</html>\n"


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A table; numbers to the right, Markup (a thumbnail) as it stands, None as a dash."""
    head = "".join(f'<th scope="col">{_content(header)}</th>' for header in headers)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return Markup(
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def thumbnail(image: bytes, alt: str, width: int | None = None) -> Markup:
    """An encoded JPEG or PNG as part of the page; alt: what it shows; width: in pixels.

    Raises ValueError for bytes of another kind.
    """
    kind = next((kind for start, kind in _SIGNATURES.items() if image.startswith(start)), None)
    if kind is None:
        raise ValueError(f"a thumbnail must be a JPEG or PNG, these bytes begin {image[:8]!r}")
    size = f' width="{width}"' if width else ""
    data = base64.b64encode(image).decode()
    return Markup(f'<img src="data:{kind};base64,{data}" alt="{escaped(alt)}"{size}>')


def tile(content: Markup, caption: str) -> Markup:
    """A picture of at most 128 pixels with text below it; several stand beside each other."""
    text = escaped(caption)
    return Markup(f'<figure class="tile">{content}<figcaption>{text}</figcaption></figure>')


def framed(content: Markup, kind: str = "") -> Markup:
    """A picture in a frame; kind: good, bad, or nothing for one that is not seen."""
    return Markup(f'<span class="frame {escaped(kind)}">{content}</span>')


def drawing(svg: bytes, alt: str) -> Markup:
    """An SVG file as a picture: as such it runs no script and fetches nothing."""
    data = base64.b64encode(svg).decode()
    return Markup(f'<img src="data:image/svg+xml;base64,{data}" alt="{escaped(alt)}">')


def banner(text: str, kind: str) -> Markup:
    """A line that stands out; kind: good, bad or open."""
    return Markup(f'<p class="banner {escaped(kind)}">{escaped(text)}</p>')


def folded(summary: str, content: Markup) -> Markup:
    """What is shown when its summary is clicked; no script is needed for that."""
    return Markup(f"<details><summary>{escaped(summary)}</summary>{content}</details>")


def columns(contents: Iterable[Markup]) -> Markup:
    """Contents beside each other where the screen is wide enough, else below each other."""
    return Markup(f'<div class="columns">{"".join(f"<div>{c}</div>" for c in contents)}</div>')


def verbatim(lines: Iterable[str]) -> Markup:
    """Lines as they stand, of a log for instance."""
    return Markup(f"<pre>{escaped(chr(10).join(lines))}</pre>")


@dataclass(frozen=True)
class _Axis:
    """How values become places: the first tick lies at `start`, the last at `end`."""

    ticks: list[float]
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, here = (
            math.log10(v) if self.log else v for v in (self.ticks[0], self.ticks[-1], value)
        )
        return self.start + (here - low) / (high - low) * (self.end - self.start)


def line_chart(
    series: Mapping[str, tuple[Iterable[float], Iterable[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> Markup:
    """A chart as SVG, whole enough to be a file of its own; series: name → (x values, y values).

    Axes reach from one tick to another around all values. A value without a place (NaN, infinity,
    on a log axis 0 and below) leaves a gap in its line.
    """
    lines = {name: list(zip(*values, strict=True)) for name, values in series.items()}
    drawn = [p for points in lines.values() for p in points if _has_place(p, log_x, log_y)]
    bottom = TOP + PLOT_HEIGHT
    x = _axis([p[0] for p in drawn], LEFT, WIDTH - RIGHT, log_x)
    y = _axis([p[1] for p in drawn], bottom, TOP, log_y)
    above = f"{title}: {y_label}" if title else y_label  # upright: no reader turns the head
    parts = [*_frame(x, y), _label(LEFT, 16, above)]
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, bottom + 32, x_label, "middle"))
    for number, (name, points) in enumerate(lines.items()):
        pen = _pen(number)
        parts.append(f'<path d="{_path(points, x, y)}" {pen}/>')
        row = bottom + BOTTOM + _ROW * number
        parts.append(f'<path d="M{LEFT} {row}h24" {pen}/>' + _label(LEFT + 32, row, name))
    height = bottom + BOTTOM + _ROW * len(lines)
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="100%" '
        f'role="img" aria-label="{escaped(title or y_label)}" font-family="sans-serif" '
        f'font-size="13" style="color-scheme: light dark">\n' + "\n".join(parts) + "\n</svg>"
    )


def _axis(values: list[float], start: float, end: float, log: bool) -> _Axis:
    """An axis around `values` whose ends are ticks."""
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, math.ceil((last - first) / 8))
        last = first + max(1, math.ceil((last - first) / every)) * every
        ticks = [10.0**power for power in range(first, last + 1, every)]
    else:
        largest = max(abs(low), abs(high))
        if high - low <= max(1e-12 * largest, 1 / _LARGEST):  # one value: room on both sides
            room = largest / 10 if largest > 1 / _LARGEST else 1.0
            low, high = low - room, high + room
        step = _step((high - low) / 5)
        steps = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
        ticks = [number * step for number in steps]
    return _Axis(ticks, start, end, log)


def _step(atleast: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, … (and 0.5, 0.2, …) that is not below `atleast`."""
    power = 10.0 ** math.floor(math.log10(atleast))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= atleast * (1 - 1e-9))


def _frame(x: _Axis, y: _Axis) -> Iterator[str]:
    """Grid lines with the numbers of their ticks."""
    for tick, place in ((tick, f"{x(tick):.1f}") for tick in x.ticks):
        yield f'<path d="M{place} {TOP}V{TOP + PLOT_HEIGHT}" {_GRID}/>'
        yield _label(place, TOP + PLOT_HEIGHT + 16, _number(tick), "middle")
    for tick, place in ((tick, f"{y(tick):.1f}") for tick in y.ticks):
        yield f'<path d="M{LEFT} {place}H{WIDTH - RIGHT}" {_GRID}/>'
        yield _label(LEFT - 6, place, _number(tick), "end")


def _number(tick: float) -> str:
    text = f"{tick:.10g}"
    return text if len(text) <= 7 else f"{tick:.3g}"


def _path(points: list[tuple[float, float]], x: _Axis, y: _Axis) -> str:
    """Lines between the points that have a place, to a tenth of a unit, without standing still."""
    parts, before = [], ""
    for point in points:
        if not _has_place(point, x.log, y.log):
            before = ""
            continue
        place = f"{x(point[0]):.1f} {y(point[1]):.1f}"
        if place != before:
            parts.append(f"L{place}" if before else f"M{place}h0")  # h0: a lone point is a dot
        before = place
    return "".join(parts)


def _has_place(point: tuple[float, float], log_x: bool, log_y: bool) -> bool:
    pairs = zip(point, (log_x, log_y), strict=True)
    return all(abs(v) <= _LARGEST and (v >= 1 / _LARGEST or not log) for v, log in pairs)


def _pen(number: int) -> str:
    colour, dash = COLOURS[number % len(COLOURS)], _DASHES[number % len(_DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{colour}" stroke-width="2" stroke-linecap="round" fill="none"{dashes}'


def _label(x: object, y: object, text: str, anchor: str = "start") -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}"'
    return f'<text {place} dominant-baseline="middle" fill="currentColor">{escaped(text)}</text>'


def _cell(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    kind = ' class="number"' if is_number else ""
    return f"<td{kind}>{_content(value)}</td>"


def _content(value: object) -> str:
    return value if isinstance(value, Markup) else escaped("–" if value is None else str(value))


def escaped(text: str) -> str:
    """Text for HTML and XML, attributes too."""
    return escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text))
