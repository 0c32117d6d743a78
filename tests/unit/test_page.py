"""Pages of reports: text escaped, nothing fetched, charts that show what they are given."""

import base64
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shared.page import COLOURS, Page, Picture, line_chart

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert('1')</script> & \"quoted\" $x"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
SVG = "{http://www.w3.org/2000/svg}"
NAN = math.nan


class Reader(HTMLParser):
    """Every tag with its attributes, the text by the tag around it; fails on unbalanced tags."""

    VOID = ("meta", "link", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def full_page(text: str = "words") -> Page:
    page = Page(text)
    page.banner(text, "good")
    page.warnings([text])
    page.section(text)
    page.text(text)
    page.table([text], [[text], [None], [Picture(PNG, text, text)]], text)
    page.table([text], [[text]], fold=text)
    lines = {text: ([0, 1], [0, 1]), f"{text} 2": ([0, 1], [1, 0])}
    page.chart(text, lines, x_label=text, y_label=text, title=text, borders={0.5: text})
    page.pictures([Picture(PNG, text, text, text)])
    page.lines(text, [text], is_open=True)
    page.frame(text, text)
    return page


def test_text_is_escaped_wherever_it_comes_in():
    page = full_page(HOSTILE).render()
    read = Reader(page)
    assert page.startswith("<!doctype html>")
    assert {"charset": "utf-8"} in read.named("meta")
    assert not read.named("script")
    assert "<script" not in page
    assert "".join(read.texts["title"]) == HOSTILE
    for tag in ("h1", "h2", "p", "li", "th", "td", "figcaption", "summary", "pre"):
        assert HOSTILE in read.texts[tag], tag
    assert sum(HOSTILE in text for text in read.texts["text"]) == 6  # of the drawing, as text
    assert {image["alt"] for image in read.named("img")} == {HOSTILE}
    (frame,) = read.named("iframe")
    assert frame == {"sandbox": None, "title": HOSTILE, "srcdoc": HOSTILE}


def test_characters_that_no_file_can_hold_become_the_replacement_character():
    page = full_page("a\x00b\x1bc\udce9d\U0001f600").render()
    assert page.encode("utf-8")
    assert Reader(page).texts["h1"] == ["a\ufffdb\ufffdc\ufffdd\U0001f600"]


def test_a_table_shows_numbers_dashes_and_pictures():
    page = Page("x")
    rows = [["a", 0.1234567891], ["b", None], [[Picture(PNG, "c", "note"), "gone"], 12], ["d", []]]
    page.table(["name", "value"], rows)
    read = Reader(page.render())
    assert read.texts["th"] == ["name", "value"]
    assert read.texts["td"] == ["a", "0.123457", "b", "–", "gone", "12", "d", "none"]
    assert read.texts["figcaption"] == ["note"]
    assert read.named("img")[0]["alt"] == "c"


def test_a_picture_holds_the_bytes_themselves_and_is_one():
    jpeg, svg = b"\xff\xd8\xff\xe0", b"<?xml version='1.0'?><svg/>"
    for content, kind in ((PNG, "png"), (jpeg, "jpeg"), (svg, "svg+xml")):
        start, data = Picture(content, "a dot").address.split(";base64,")
        assert (start, base64.b64decode(data)) == (f"data:image/{kind}", content)
    with pytest.raises(ValueError, match="no PNG, JPEG or SVG"):
        Picture(b"<html><p onload=alert(1)>", "x")


# ---------------------------------------------------------------- charts


def chart(points, **options):
    return ElementTree.fromstring(line_chart({"a": tuple(zip(*points, strict=True))}, **options))


def paths(root: ElementTree.Element) -> list[str]:
    """The paths of the lines, in the order of their drawing."""
    colours = [f"stroke: {colour}" for colour in COLOURS]
    found = [(p.get("style") or "", p.get("d") or "") for p in root.iter(f"{SVG}path")]
    return [d for style, d in found if "fill: none" in style and any(c in style for c in colours)]


def places(path: str) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def dots(root: ElementTree.Element) -> int:
    """The marks in a line's colour."""
    style = f"fill: {COLOURS[0]}"
    return sum(style in (mark.get("style") or "") for mark in root.iter(f"{SVG}use"))


def test_points_lie_where_a_hand_calculation_puts_them():
    (line,) = paths(chart([(0, 0), (5, 30), (10, 100)]))
    (x0, y0), (x1, y1), (x2, y2) = places(line)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.5, abs=1e-4)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.3, abs=1e-4)
    assert x0 < x2 and y0 > y2  # upwards is smaller in SVG


def test_logarithmic_points_lie_where_a_hand_calculation_puts_them():
    root = chart([(0.001, 1), (0.01, 10), (1, 100)], log_x=True, log_y=True)
    (x0, y0), (x1, y1), (x2, y2) = places(paths(root)[0])
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 3, abs=1e-4)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(1 / 2, abs=1e-4)
    assert {"0.001", "0.01", "0.1", "1", "10", "100"} <= set(texts(root))


def test_no_line_crosses_a_gap_and_a_lone_point_is_a_dot():
    inf = math.inf
    values = [*range(60), NAN, 5.0, inf, *range(60)]
    root = chart(list(enumerate(values)))
    (line,) = paths(root)
    assert line.count("M") == 3 and dots(root) == 1
    root = chart([(0, 1), (0.1, 1), (-1, 2), (1, 100)], log_x=True)
    assert dots(root) == 2  # a short line's are dots, too; those at 0 and below have no place


def test_a_long_line_is_thinned_without_losing_extremes_ends_and_gaps():
    values = [math.sin(step / 1000) for step in range(100_000)]
    values[31_415], values[62_831], values[50_000] = 9.0, -9.0, NAN
    before = chart([(0, 9.0), (99_999, -9.0)])
    root = chart(list(enumerate(values)))
    (line,) = paths(root)
    found = places(line)
    assert len(found) <= 2000
    assert texts(root) == texts(before)  # the axes reach as far
    (left, top), (right, bottom) = places(paths(before)[0])
    heights = [y for _, y in found]
    assert (min(heights), max(heights)) == pytest.approx((top, bottom), abs=1e-3)
    assert (found[0][0], found[-1][0]) == pytest.approx((left, right), abs=1e-3)
    assert line.count("M") == 2


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[], [0.0], [-3.0, -3.0], [5e-324, 0], [1e200, -1e200], [1e308, 1e-308, 3.0], [10**400],
     [1.0, 1.0 + 2e-16], [NAN, NAN]],
)  # fmt: skip
def test_odd_values_still_give_a_chart(values, log):
    svg = line_chart({"a": (values, values)}, log_x=log, log_y=log)
    root = ElementTree.fromstring(svg)
    assert len(texts(root)) < 40
    assert all(0 <= x <= 400 and 0 <= y <= 300 for path in paths(root) for x, y in places(path))


def test_colours_stand_out_from_a_light_and_a_dark_page():
    def luminance(colour):  # WCAG 2.1, relative luminance
        levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(one, other):
        light, dark = sorted((luminance(one), luminance(other)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    page = full_page().render()
    assert "currentColor" in page and "#777777" not in page and "fill: #ffffff" not in page
    style = (ROOT / "shared" / "page.jinja").read_text()
    papers, inks, quiets = (re.findall(rf"--{n}: (#\w+)", style) for n in ("paper", "ink", "quiet"))
    assert len(papers) == 2
    for paper, ink, quiet in zip(papers, inks, quiets, strict=True):
        assert min(contrast(paper, ink), contrast(paper, quiet)) >= 4.5
        assert all(contrast(paper, colour) >= 3 for colour in COLOURS)


def test_a_chart_that_cannot_be_drawn_is_one_warning(caplog):
    page = Page("x")
    good, bad = {"lines": {"a": ([1, 2], [1, 2])}}, {"lines": {"a": ([1, 2], [1])}}
    page.charts({"one": bad, "two": good, "three": bad})
    read = Reader(page.render())
    assert len(read.named("svg")) == 1
    (said,) = read.texts["p"]
    assert said.startswith("Not drawn: one, three (")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.slow
def test_charts_are_drawn_where_no_cache_can_be_written_and_without_a_word(tmp_path):
    (tmp_path / "file").write_text("")
    code = (
        "import logging; logging.basicConfig();"
        "from shared.page import line_chart; print(line_chart({'数据': ([1, 2], [1, 2])})[:4])"
    )
    nowhere = str(tmp_path / "file" / "below")
    environ = os.environ | {"HOME": nowhere, "MPLCONFIGDIR": nowhere, "MPLBACKEND": "TkAgg"}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert (ended.stdout, ended.stderr) == ("<svg\n", "")
