"""The table of figures on the main page, out of figures.json: what was measured, when and how.

    python tests/full/figures.py                           # put the table into both main pages
    python tests/full/figures.py --record arcface 0 RUN    # first take a run's result as seed 0's

`seeds` holds before and after of each seed, in the unit; where a measurement gave only a mean,
`mean` holds before, after, lowest and highest after. --record reads the result in RUN/status.json
into the recipe's first figure, or into the one that --figure names by its place. A test compares
the pages with the file.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_suffix(".json")
PAGES = {"en": "README.md", "zh": "README.zh-CN.md"}
BEGIN, END = "<!-- figures: tests/full/figures.py -->", "<!-- end of figures -->"
WORDS = {
    "en": {
        "head": ("Recipe", "Documented", "Demo: before → after", "N", "Chance", "Real data", "GPU"),
        "spread": "{} → {} ({} to {})",
        "not": "not run yet",
    },
    "zh": {
        "head": ("配方", "文档", "演示：训练前 → 后", "N", "随机", "真实数据", "GPU"),
        "spread": "{} → {}（{} 到 {}）",
        "not": "尚未运行",
    },
}


def numbers(figure: dict[str, Any]) -> list[float]:
    """Mean before, mean after, lowest and highest after."""
    if "mean" in figure:
        return figure["mean"]
    before, after = zip(*figure["seeds"].values(), strict=True)
    return [statistics.mean(before), statistics.mean(after), min(after), max(after)]


def shown(value: float, unit: str) -> str:
    """Percentages with at most one place, others with two."""
    return f"{value:.1f}".removesuffix(".0") + " %" if unit == "%" else f"{value:.2f}"


def row(name: str, place: int, entry: dict[str, Any], language: str) -> list[str]:
    """The cells of a figure."""
    words, figure = WORDS[language], entry["demo"][place]
    cells = [shown(value, figure["unit"]) for value in numbers(figure)]
    colon, semicolon = (": ", "; ") if language == "en" else ("：", "；")
    demo = figure["what"][language] + colon + words["spread"].format(*cells)
    if "beside" in figure:
        demo += semicolon + figure["beside"][language]
    chance = "–" if figure["chance"] is None else shown(figure["chance"], figure["unit"])
    first = [f"`{name}`", entry["documented"][language]] if place == 0 else ["", ""]
    state = [words["not"], words["not"]] if place == 0 else ["", ""]
    return [*first, demo, str(figure["n"]), chance, *state]


def table(language: str) -> str:
    """The table in Markdown."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    rows = [list(WORDS[language]["head"]), [":--", ":--", ":--", "--:", "--:", ":--", ":--"]]
    for name, entry in content.items():
        rows += [row(name, place, entry, language) for place in range(len(entry["demo"]))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def written(page: str, language: str) -> str:
    """The page with the table between its marks."""
    inside = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.S)
    return inside.sub(lambda _: f"{BEGIN}\n{table(language)}\n{END}", page)


def record(name: str, seed: str, run: Path, place: int) -> None:
    """Take the result of a run into figures.json, with today's commit."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    result, figure = status["result"], content[name]["demo"][place]
    is_share = figure["unit"] == "%" and result.get("unit") != "%"
    pair = [round((100 if is_share else 1) * result[key], 2) for key in ("before", "after")]
    figure.pop("mean", None)
    figure.setdefault("seeds", {})[seed] = pair
    figure["n"] = result.get("n", figure["n"])
    figure["commit"] = subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True
    ).strip()
    FILE.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", nargs=3, metavar=("RECIPE", "SEED", "RUN"))
    parser.add_argument("--figure", type=int, default=0, help="which of the recipe's, from 0")
    args = parser.parse_args()
    if args.record:
        name, seed, run = args.record
        record(name, seed, Path(run), args.figure)
    for language, name in PAGES.items():
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        page.write_text(written(text, language), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
