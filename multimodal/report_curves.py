"""The curves of a report: losses and recalls over the epochs, as pictures beside it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from shared.files import read_json_lines
from shared.page import write_chart

Series = dict[str, tuple[list[float], list[float]]]


def draw(metrics: Path, report: Path) -> list[dict[str, str]]:
    """Draw what metrics.jsonl holds; title and file name of each picture beside `report`."""
    train, held_out = _series(metrics, "train"), _series(metrics, "epoch")
    charts = {
        "loss": ("Training loss", "loss", {n: s for n, s in train.items() if n == "loss"}),
        "validation": (
            "Loss by epoch",
            "loss",
            {n: s for n, s in held_out.items() if n.startswith(("val/", "epoch/"))},
        ),
        "lr": ("Learning rate", "learning rate", {n: s for n, s in train.items() if n == "lr"}),
    }
    drawn: list[dict[str, str]] = []
    for name, (title, label, series) in charts.items():
        path = report.with_name(f"{report.stem}_{name}.svg")
        if series and write_chart(path, series, y_label=label, title=title):
            drawn.append({"title": title, "file": path.name})
    return drawn


def _series(metrics: Path, split: str) -> Series:
    """Tag → (steps, values) of one kind of rows."""
    found: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for row in read_json_lines(metrics):
        for tag, value in row.items() if row.get("split") == split else ():
            if isinstance(value, (int, float)) and tag not in ("step", "epoch", "time"):
                found[tag][0].append(row["step"])
                found[tag][1].append(value)
    return dict(found)
