"""The harmless part of foreign HTML: text, tables, inline pictures and SVG drawings.

    page.add(harmless(path.read_text()))

What is not on the lists below (scripts, styles, links, forms, outside addresses, event handlers)
is left out; text is escaped anew; what was left open is closed. Standard library only.
"""

from __future__ import annotations

import contextlib
import re
from html.parser import HTMLParser

from shared.page import Markup, escaped

_VOID = {"br", "hr", "img"}
_TEXT = {
    *("p", "div", "span", "h1", "h2", "h3", "h4", "b", "i", "em", "strong", "small", "code"),
    *("pre", "ul", "ol", "li", "dl", "dt", "dd", "figure", "figcaption", "details", "summary"),
    *("table", "thead", "tbody", "tfoot", "tr", "th", "td", "caption", "sub", "sup", *_VOID),
}
_DRAWING = {
    *("svg", "g", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text"),
    *("tspan", "title", "desc", "image"),
}
_ALLOWED = _TEXT | _DRAWING
# their content is no text either
_DROPPED_WHOLE = {"script", "style", "head", "title", "iframe", "object", "template", "noscript"}
_ATTRIBUTES = {
    *("alt", "width", "height", "colspan", "rowspan", "scope", "class", "role", "aria-label"),
    *("viewbox", "d", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "ry", "points"),
    *("fill", "stroke", "stroke-width", "stroke-opacity", "fill-opacity", "stroke-dasharray"),
    *("stroke-linecap", "stroke-linejoin", "opacity", "transform", "text-anchor", "font-size"),
    *("font-family", "font-weight", "dominant-baseline", "preserveaspectratio", "dx", "dy", "open"),
}
_WRITTEN = {"viewbox": "viewBox", "preserveaspectratio": "preserveAspectRatio"}
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]*")
_LEADS_OUT = re.compile(r"url\s*\(|javascript:|https?:|//", re.I)
_DEEPEST = 200  # levels of tags: no page that people read has more


def harmless(html: str) -> Markup:
    """What of `html` may stand in a page of ours; headings two levels lower."""
    reader = _Reader()
    with contextlib.suppress(AssertionError):  # html.parser's, for a declaration that is none
        reader.feed(html)
        reader.close()
    return Markup(reader.result())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._open: list[str] = []
        self._dropped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._dropped or (tag in _DROPPED_WHOLE and not self._draws(tag)):
            if tag in _DROPPED_WHOLE:
                self._dropped.append(tag)
        elif tag in _ALLOWED and len(self._open) < _DEEPEST:
            self._parts.append(f"<{_lowered(tag)}{_attributes(tag, attrs)}>")
            if tag not in _VOID:
                self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        before = len(self._open)
        if tag not in _DROPPED_WHOLE:
            self.handle_starttag(tag, attrs)
        if len(self._open) > before:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._dropped:
            if tag in self._dropped:
                del self._dropped[self._dropped.index(tag) :]
        elif tag in self._open:
            self._close_to(len(self._open) - 1 - self._open[::-1].index(tag))

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self._parts.append(escaped(data))

    def result(self) -> str:
        self._close_to(0)
        return "".join(self._parts)

    def _close_to(self, depth: int) -> None:
        while len(self._open) > depth:
            self._parts.append(f"</{_lowered(self._open.pop())}>")

    def _draws(self, tag: str) -> bool:
        """Whether the tag is a drawing's own: <title> names a part of it there."""
        return tag == "title" and "svg" in self._open


def _lowered(tag: str) -> str:
    """A heading two levels lower: the page has its own first and second."""
    return {"h1": "h3", "h2": "h4", "h3": "h5", "h4": "h6"}.get(tag, tag)


def _attributes(tag: str, attrs: list[tuple[str, str | None]]) -> str:
    kept = []
    for name, value in attrs:
        text = value or ""
        is_picture = tag in ("img", "image") and name in ("src", "href", "xlink:href")
        if is_picture and _PICTURE.fullmatch(text):
            kept.append(f' {"src" if tag == "img" else "href"}="{escaped(text)}"')
        elif name in _ATTRIBUTES and not _LEADS_OUT.search(text):
            kept.append(f' {_WRITTEN.get(name, name)}="{escaped(text)}"')
    return "".join(dict.fromkeys(kept))
