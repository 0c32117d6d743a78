import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from shared.page import (
    COLOURS,
    DARK_BACKGROUND,
    Markup,
    Page,
    line_chart,
    table,
    thumbnail,
)

HOSTILE = "<script>alert('1')</script> & \"quoted\""
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
SVG = "{http://www.w3.org/2000/svg}"


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


def full_page(text: str = "words") -> str:
    page = Page(text, text)
    page.add(text)
    page.section(text)
    page.add(table([text], [[text], [None]]), text)
    page.add(line_chart({text: ([0, 1], [0, 1])}, x_label=text, y_label=text, title=text), text)
    page.add(thumbnail(PNG, text, 40))
    return page.render()


def test_a_page_is_whole_html_with_its_title_as_heading():
    page = full_page("Results")
    read = Reader(page)
    assert page.startswith("<!doctype html>")
    assert read.texts["title"] == read.texts["h1"] == read.texts["h2"] == ["Results"]
    assert read.named("html") == [{"lang": "Results"}]
    assert {"charset": "utf-8"} in read.named("meta")


def test_text_is_escaped_wherever_it_comes_in():
    page = full_page(HOSTILE)
    read = Reader(page)
    assert not read.named("script")
    assert "<script" not in page
    assert "".join(read.texts["title"]) == HOSTILE
    for tag in ("h1", "h2", "p", "th", "figcaption"):
        assert HOSTILE in read.texts[tag], tag
    assert HOSTILE in read.texts["td"] and HOSTILE in read.texts["text"]
    assert read.named("img")[0]["alt"] == HOSTILE
    assert read.named("svg")[0]["aria-label"] == HOSTILE


def test_a_page_asks_nothing_of_the_world_outside():
    page = full_page()
    assert re.findall(r"https?://[^\"' ]+", page) == ["http://www.w3.org/2000/svg"]
    assert "//" not in page.replace("http://www.w3.org/2000/svg", "").replace("base64,", "")
    read = Reader(page)
    policy = next(m["content"] for m in read.named("meta") if "http-equiv" in m)
    assert policy is not None and policy.startswith("default-src 'none'")
    links = [tag.get("href") or tag.get("src") or "" for _, tag in read.tags]
    assert all(link.startswith("data:") for link in links if link)


def test_characters_that_no_file_can_hold_become_the_replacement_character():
    page = full_page("a\x00b\x1bc\udce9d\U0001f600")
    assert page.encode("utf-8")
    assert Reader(page).texts["h1"] == ["a\ufffdb\ufffdc\ufffdd\U0001f600"]
    ElementTree.fromstring(line_chart({"a\x00": ([1], [1])}, x_label="x", y_label="y"))


def test_a_table_shows_numbers_dashes_and_markup():
    read = Reader(table(["name", "value"], [["a", 0.25], ["b", None], [Markup("<b>c</b>"), True]]))
    assert read.texts["th"] == ["name", "value"]
    assert read.texts["td"] == ["a", "0.25", "b", "–", "True"]
    assert read.texts["b"] == ["c"]
    assert [cell.get("class") for cell in read.named("td")] == [None, "number", *[None] * 4]


def test_a_thumbnail_holds_the_bytes_themselves():
    image = Reader(thumbnail(PNG, "a dot")).named("img")[0]
    kind, data = (image["src"] or "").split(";base64,")
    assert (kind, base64.b64decode(data)) == ("data:image/png", PNG)
    jpeg = Reader(thumbnail(b"\xff\xd8\xff\xe0", "x", 40)).named("img")[0]
    assert (jpeg["src"] or "").startswith("data:image/jpeg;") and jpeg["width"] == "40"
    with pytest.raises(ValueError, match="must be a JPEG or PNG"):
        thumbnail(b"<svg onload=alert(1)>", "x")


# ---------------------------------------------------------------- charts


def chart(points, **options):
    svg = line_chart({"a": tuple(zip(*points, strict=True))}, x_label="x", y_label="y", **options)
    return ElementTree.fromstring(svg)


def lines(root):
    """The data's paths: those with a pen; the second of each is in the legend."""
    return [path.get("d") for path in root.iter(f"{SVG}path") if path.get("stroke-width")][::2]


def ticks(root, anchor):
    return [t.text for t in root.iter(f"{SVG}text") if t.get("text-anchor") == anchor]


def test_points_lie_where_a_hand_calculation_puts_them():
    # The plot reaches from 58 to 466 across and from 276 (bottom) to 26 (top); ticks 0, 2 … 10
    # and 0, 20 … 100. x = 5: 58 + 408 / 2 = 262. y = 30: 276 - 0.3 * 250 = 201.
    root = chart([(0, 0), (5, 30), (10, 100)])
    assert lines(root) == ["M58.0 276.0h0L262.0 201.0L466.0 26.0"]
    assert ticks(root, "middle") == ["0", "2", "4", "6", "8", "10", "x"]
    assert ticks(root, "end") == ["0", "20", "40", "60", "80", "100"]


def test_logarithmic_points_lie_where_a_hand_calculation_puts_them():
    # Decades from 0.001 to 1, 136 apart: 0.01 at 58 + 136 = 194. y: 1 to 100, 10 in the middle.
    root = chart([(0.001, 1), (0.01, 10), (1, 100)], log_x=True, log_y=True)
    assert lines(root) == ["M58.0 276.0h0L194.0 151.0L466.0 26.0"]
    assert ticks(root, "middle") == ["0.001", "0.01", "0.1", "1", "x"]
    assert ticks(root, "end") == ["1", "10", "100"]


def test_axes_end_at_ticks_around_all_values_of_all_series():
    svg = line_chart(
        {"a": ([1, 2], [-0.31, 0]), "b": ([3.9], [0.42])}, x_label="x", y_label="y", title="t"
    )
    root = ElementTree.fromstring(svg)
    assert ticks(root, "middle") == ["1", "2", "3", "4", "x"]
    assert ticks(root, "end") == ["-0.4", "-0.2", "0", "0.2", "0.4", "0.6"]
    assert [t.text for t in root.iter(f"{SVG}text") if t.text in ("a", "b", "t: y")] == [
        "t: y", "a", "b",
    ]  # fmt: skip


def test_values_without_a_place_leave_a_gap_and_a_lone_point_is_a_dot():
    nan, inf = float("nan"), float("inf")
    root = chart([(0, 0), (1, nan), (5, 5), (6, inf), (8, 8), (10, 10), (10, 9.9999)])
    assert lines(root)[0].count("M") == 3
    assert "M262.0 151.0h0M" in lines(root)[0]
    assert lines(root)[0].count("L") == 1  # what lies on the same spot is not drawn twice
    root = chart([(0, 1), (0.1, 1), (-1, 2), (1, 100)], log_x=True)
    assert lines(root)[0].count("M") == 2


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[], [0.0], [7.0], [-3.0, -3.0], [1e-320], [5e-324, 0], [1e200, -1e200], [1e308, 1e-308, 3.0],
     [10**400], [1.0, 1.0 + 2e-16], [1e-200, 1e200], [123456789, 123456790]],
)  # fmt: skip
def test_odd_values_still_give_a_chart_with_few_ticks_inside_it(values, log):
    svg = line_chart({"a": (values, values)}, x_label="x", y_label="y", log_x=log, log_y=log)
    root = ElementTree.fromstring(svg)
    assert 2 <= len(ticks(root, "end")) <= 10
    numbers = [float(n) for path in lines(root) for n in re.findall(r"-?\d+\.\d", path or "")]
    assert all(25.9 <= number <= 466.1 for number in numbers)
    assert all(len(tick or "") <= 10 for tick in ticks(root, "end"))


def test_colours_stand_out_from_a_light_and_a_dark_page():
    def luminance(colour):  # WCAG 2.1, relative luminance
        levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour in COLOURS:
        for background in ("#ffffff", DARK_BACKGROUND):
            light, dark = sorted((luminance(colour), luminance(background)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, background)


def test_a_chart_fits_any_width_and_takes_the_readers_text_colour():
    root = chart([(0, 0), (1, 1)])
    assert (root.get("width"), root.get("viewBox")) == ("100%", "0 0 480 349")
    assert {t.get("fill") for t in root.iter(f"{SVG}text")} == {"currentColor"}


def test_series_are_told_apart_by_colour_and_by_dashes():
    names = [str(number) for number in range(12)]
    svg = line_chart({n: ([0, 1], [0, 1]) for n in names}, x_label="x", y_label="y")
    paths = [p for p in ElementTree.fromstring(svg).iter(f"{SVG}path") if p.get("stroke-width")]
    assert len({(p.get("stroke"), p.get("stroke-dasharray")) for p in paths}) == 12
