"""The curves of a report: losses and recalls over the epochs, as pictures beside it.

matplotlib draws PNGs where it is installed; without it the curves are SVGs.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.files import read_json_lines, write_atomic, write_text
from shared.page import line_chart

_MOST_POINTS = 2000  # of a curve

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
    return [
        {"title": title, "file": _picture(report, name, title, label, series)}
        for name, (title, label, series) in charts.items()
        if series
    ]


def _series(metrics: Path, split: str) -> Series:
    """Tag → (steps, values) of one kind of rows; of very many, every n-th."""
    rows = [row for row in read_json_lines(metrics) if row.get("split") == split]
    found: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for row in rows[:: len(rows) // _MOST_POINTS + 1]:
        for tag, value in row.items():
            if isinstance(value, (int, float)) and tag not in ("step", "epoch", "time"):
                found[tag][0].append(row["step"])
                found[tag][1].append(value)
    return dict(found)


def _picture(report: Path, name: str, title: str, label: str, series: Series) -> str:
    """Write one chart; its file name."""
    try:
        content = _png(title, label, series)
    except ImportError:
        path = report.with_name(f"{report.stem}_{name}.svg")
        chart = line_chart(_plain(series), x_label="step", y_label=label, title=title)
        write_text(path, chart)
        return path.name
    path = report.with_name(f"{report.stem}_{name}.png")
    write_atomic(path, lambda stream: (stream.write(content), None)[1])
    return path.name


def _plain(series: Series) -> Mapping[str, Any]:
    return series


def _png(title: str, label: str, series: Series) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (steps, values) in series.items():
        axes.plot(steps, values, label=name, marker="." if len(steps) < 40 else None)
    axes.set(title=title, xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
