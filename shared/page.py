"""Self-contained HTML pages: text, tables, pictures, charts. One file, no script, nothing fetched.

    page = Page("Face verification")
    page.table(("set", "accuracy"), [("lfw", 0.98)])
    page.chart("ROC", {"student": (far, tar)}, log_x=True)
    page.write(path)

jinja2 fills page.jinja and escapes all text, matplotlib draws; both are imported when a page is
made. Light and dark follow the reader's system.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from shared.errors import MissingToolError, one_line
from shared.files import write_text

log = logging.getLogger(__name__)

# What neither XML nor UTF-8 can hold: control characters, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SIGNATURES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png"}

# Each colour has a contrast above 3 to the light and to the dark page; on a page, ink becomes the
# colour of its text.
COLOURS = ("#2878c8", "#c8640a", "#1e8a4c", "#b4469b", "#7a63d1", "#8a6d3b")
_DASHES = ("-", "--", "-.", ":")
_INK = "#777777"
_LOOK: dict[Any, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "page", "text.parse_math": False, "font.size": 11},
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color"), _INK),
    **{"xtick.color": _INK, "ytick.color": _INK, "grid.alpha": 0.2, "axes.grid": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_POINTS = 2000  # of a line, at most
_LARGEST = 1e200  # axes around larger values leave the range of numbers


@dataclass(frozen=True)
class Picture:
    """A PNG, JPEG or SVG file as part of a page; alt: what it shows; kind: good, bad or nothing.

    As a picture an SVG runs no script and fetches nothing. Raises ValueError for other content.
    """

    content: bytes = field(repr=False)
    alt: str
    note: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        """Refuse what no browser shows."""
        if not self._type:
            raise ValueError(f"no PNG, JPEG or SVG: it begins with {self.content[:8]!r}")

    @property
    def _type(self) -> str:
        known = (kind for start, kind in _SIGNATURES.items() if self.content.startswith(start))
        return next(known, "svg+xml" if b"<svg" in self.content[:2000] else "")

    @property
    def address(self) -> str:
        """The whole picture as a data: address."""
        return f"data:image/{self._type};base64,{base64.b64encode(self.content).decode()}"


class Page:
    """A page under construction: blocks that page.jinja renders. All text is escaped there."""

    def __init__(self, title: str) -> None:
        """Begin with the title, which is also the heading."""
        self.title = title
        self.blocks: list[dict[str, Any]] = []

    def section(self, heading: str) -> None:
        """Begin a new section."""
        self._add("section", text=heading)

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._add("text", text=text)

    def table(
        self,
        headers: Sequence[str],
        rows: Iterable[Sequence[Any]],
        caption: str = "",
        *,
        fold: str = "",
    ) -> None:
        """Add a table of texts, numbers, None (a dash), pictures, or lists of pictures.

        fold: the line that a click opens it by; without it the table is open.
        """
        self._add("table", headers=headers, rows=list(rows), caption=caption, fold=fold)

    def banner(self, text: str, colour: str) -> None:
        """Add a line that stands out; colour: good, bad or open."""
        self._add("banner", text=text, colour=colour)

    def warnings(self, lines: Sequence[str]) -> None:
        """Add warnings, if there are any."""
        if lines:
            self._add("warnings", lines=lines)

    def lines(self, caption: str, lines: Sequence[str], *, is_open: bool) -> None:
        """Add lines as they are, of a log for instance, which a click opens or closes."""
        self._add("lines", caption=caption, lines=lines, open=is_open)

    def frame(self, caption: str, html: str) -> None:
        """Add a foreign page in a frame of its own, where it runs no script and fetches nothing."""
        self._add("frame", caption=caption, html=html)

    def pictures(self, pictures: Iterable[Picture | str]) -> None:
        """Add pictures, or words in their place, beside each other where there is room."""
        self._add("pictures", pictures=list(pictures))

    def chart(self, caption: str, lines: Mapping[str, Any], **options: Any) -> None:
        """Add what `line_chart` draws."""
        self.charts({caption: {"lines": lines, **options}})

    def charts(self, charts: Mapping[str, dict[str, Any]]) -> None:
        """Add charts: caption → what `line_chart` takes. Those that fail are one warning."""
        drawn, failed = list[dict[str, str]](), dict[str, str]()
        for caption, options in charts.items():
            try:
                svg = line_chart(**options).replace(_INK, "currentColor")
                drawn.append({"caption": caption, "svg": svg})
            except Exception as error:
                failed[caption] = one_line(error)[:200]
        self._add("charts", charts=drawn)
        if failed:
            why = next(iter(failed.values()))
            self.text(f"Not drawn: {', '.join(failed)} ({why}).")
            log.warning("%d of %d charts cannot be drawn: %s", len(failed), len(charts), why)

    def render(self) -> str:
        """The page as HTML."""
        html = _template().render(title=self.title, blocks=self.blocks)
        return _printable(html)

    def write(self, path: Path) -> None:
        """Write the page."""
        write_text(path, self.render(), durable=False)

    def _add(self, kind: str, **content: Any) -> None:
        self.blocks.append({"kind": kind, **content})


@cache
def _template() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise MissingToolError("pages need jinja2: ./setup.sh installs it") from None
    environment = Environment(
        autoescape=True,
        finalize=_shown,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
    )
    return environment.get_template("page.jinja")


def _shown(value: Any) -> Any:
    """A value as a page shows it: None as a dash, a fraction to six digits."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:.6g}" if isinstance(value, float) else value


def write_chart(path: Path, lines: Mapping[str, Any], **options: Any) -> list[Path]:
    """Write a `line_chart` as an SVG file: its path, or nothing and a warning when that fails."""
    try:
        write_text(path, line_chart(lines, **options))
    except Exception as error:  # a picture is not worth a run
        log.warning("%s cannot be drawn: %s", path, one_line(error))
        return []
    return [path]


def line_chart(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str = "step",
    y_label: str = "",
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    borders: Mapping[float, str] | None = None,
) -> str:
    """A chart as SVG, whole enough to be a file; lines: name → (x values, y values).

    A value without a place (NaN, infinity, on a logarithmic axis 0 and below) leaves a gap in its
    line. borders: x → what begins there. At most 2,000 points of a line are drawn.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of caches it cannot write
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signs that the measuring font lacks: browsers have them
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(_LOOK)
        rows = bool(title) + (len(lines) if len(lines) > 1 else 0)
        height = 2.9 + 0.22 * rows
        figure = Figure(figsize=(5.2, height))
        axes = figure.add_axes((0.14, 0.5 / height, 0.83, 2.3 / height))
        _scale(axes, "x", log_x)
        _scale(axes, "y", log_y)
        for place, (name, (xs, ys)) in enumerate(lines.items()):
            points = _thinned(_placed(xs, log_x), _placed(ys, log_y))
            _plot(axes, place, _printable(name), *points)
        for x, text in (borders or {}).items():
            axes.axvline(x, color=_INK, linestyle=":")
            axes.annotate(
                f" {_printable(text)}", (x, 1), xycoords=("data", "axes fraction"), va="top"
            )
        axes.set(xlabel=_printable(x_label), ylabel=_printable(y_label))
        if len(lines) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), borderaxespad=0)
        figure.text(0.02, 1 - 0.2 / height, _printable(title))
        FigureCanvasSVG(figure).print_svg(drawn, metadata=_NO_METADATA)
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]


def _scale(axes: Any, name: str, log: bool) -> None:
    """Few ticks with short numbers on the axis x or y."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set(**{f"{name}scale": "log" if log else "linear"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(numticks=8) if log else MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter("{x:.6g}")
    axis.set_minor_formatter(NullFormatter())


def _plot(axes: Any, place: int, name: str, xs: list[float], ys: list[float]) -> None:
    """One line; points without a neighbour, and those of a short line, are dots."""
    gap = [True, *(math.isnan(y) for y in ys), True]
    alone = [len(ys) <= 40 or (gap[at] and gap[at + 2]) for at in range(len(ys))]
    colour, dash = COLOURS[place % len(COLOURS)], _DASHES[place % len(_DASHES)]
    axes.plot(xs, ys, color=colour, linestyle=dash, label=name, marker=".", markevery=alone)


def _placed(values: Iterable[float], log: bool) -> list[float]:
    """The values, NaN for those that have no place on an axis."""
    lowest = 1 / _LARGEST if log else -_LARGEST
    return [float(v) if lowest <= v <= _LARGEST else math.nan for v in values]


def _thinned(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """Of each of many parts of a long line the lowest point, the highest and one gap; both ends."""
    count = len(ys)
    if count <= _POINTS:
        return xs, ys
    kept, parts = {0, count - 1}, _POINTS // 3 - 1
    for part in range(parts):
        places = range(count * part // parts, count * (part + 1) // parts)
        finite = [place for place in places if not math.isnan(ys[place])]
        kept.update([place for place in places if math.isnan(ys[place])][:1])
        kept.update(pick(finite, key=ys.__getitem__) for pick in (min, max) if finite)
    chosen = sorted(kept)
    return [xs[place] for place in chosen], [ys[place] for place in chosen]


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
