"""The documents' pages, taken apart: tables, code, links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("README.md", "README.zh-CN.md")
RECIPES = ("face_distill", "lavic", "vasevqa", "multimodal", "arcface")
DOCS = ("shared/docs/everyday.md", "shared/docs/scaling.md", "shared/docs/faults.md")
IN_BOTH_LANGUAGES = (
    "README.md",
    *(f"{room}/README.md" for room in (*RECIPES, "shared", "shared/tools", "shared/ddp_series")),
    *DOCS,
)


class Table(NamedTuple):
    """The heads of a table's columns, and the rows below them."""

    head: list[str]
    rows: list[list[str]]

    @property
    def records(self) -> list[dict[str, str]]:
        """The rows as head -> cell."""
        return [dict(zip(self.head, row, strict=True)) for row in self.rows]


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def chinese(page: str) -> str:
    """The name of a page's twin."""
    return page.removesuffix(".md") + ".zh-CN.md"


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks, without what is translated: comments, and remarks
    behind the names of a tree of files.
    """
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    remarks = {"bash": r"\s+#.*", "text": r"\s+#.*|(?<=[\w*/])\s{3,}\S.*"}
    return [
        (language, "\n".join(re.sub(remarks.get(language, "$^"), "", t) for t in b.splitlines()))
        for language, b in blocks
    ]


def commands(text: str) -> list[str]:
    """The lines of the shell blocks, without comments; lines that go on are one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    blocks = [re.sub(r"\s*\\\n\s*", " ", block) for block in blocks]
    lines = (re.sub(r"\s+# .*", "", line).strip() for block in blocks for line in block.split("\n"))
    return [line for line in lines if line]


def tables(text: str) -> list[Table]:
    """The tables of a page, in order."""
    found: list[Table] = []
    before, inside = "", False
    for line in text.splitlines():
        if re.match(r"\| :?-+:? \|", line):
            found.append(Table(_cells(before), []))
            inside = True
        elif inside and line.startswith("|"):
            found[-1].rows.append(_cells(line))
        else:
            inside = False
        before = line
    return found


def _cells(line: str) -> list[str]:
    parts = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    return [part.strip() for part in parts]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def links(text: str) -> set[str]:
    return set(re.findall(r"\]\(([^)]+)\)", text)) - set(LANGUAGES)
