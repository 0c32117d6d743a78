"""The curves of a report: which lines share a chart, and how much of a long one is drawn.

Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from shared import page as html
from shared.page import Markup, Page
from shared.run_record import Series

Curves = dict[str, dict[str, Series]]  # tag → line → series

_POINTS = 300  # buckets of a long series; each keeps its lowest and its highest value
_TAGS = 60  # curves of one page
_SPEED = ("steps_per_s", "samples_per_s")
_PREFIX = re.compile(r"^(train|val|valid|validation|eval|epoch)[/_]")


def charts(curves: Curves) -> Curves:
    """The lines of each chart: training and validation of one thing stand in one.

    Recipes tell them apart by the split or by the name (loss and val/loss, train_loss and
    val_loss). `best` repeats points of other splits, so it stands there only where it is alone.
    """
    found: Curves = {}
    for tag, splits in curves.items():
        prefix = _PREFIX.match(tag)
        lines = found.setdefault(_PREFIX.sub("", tag) or tag, {})
        for split, series in splits.items():
            name = prefix[1] if prefix and split not in ("train", "val", "best") else split
            lines[name if name not in lines else f"{name} ({tag})"] = series
    for tag, lines in found.items():
        if len(lines) > 1:
            lines.pop("best", None)
        found[tag] = dict(sorted(lines.items(), key=lambda line: line[0] != "train"))
    return found


def add_curves(page: Page, curves: Curves) -> None:
    """A chart a tag, and a logarithmic one beside it where the values span more than a decade.

    What is the same at every step is named in a line.
    """
    if not curves:
        return
    page.section("Curves")
    flat = {tag: value for tag in curves if (value := _only_value(curves[tag])) is not None}
    if flat:
        page.add(f"Never changed: {', '.join(f'{tag} {flat[tag]:.6g}' for tag in sorted(flat))}.")
    moving = [tag for tag in curves if tag not in flat]
    tags = sorted(moving, key=lambda tag: (tag in _SPEED, "loss" not in tag.lower()))
    drawn: list[Markup] = []
    for tag in tags[:_TAGS]:
        lines = {name or "value": thinned(*series) for name, series in curves[tag].items()}
        drawn.append(html.line_chart(lines, x_label="step", y_label=tag))
        if _spans_a_decade(lines.values()):
            label = f"{tag}, logarithmic"
            drawn.append(html.line_chart(lines, x_label="step", y_label=label, log_y=True))
    page.add(html.columns(drawn))
    if len(tags) > _TAGS:
        page.add(f"Not shown: {len(tags) - _TAGS} more curves of metrics.jsonl.")


def thinned(steps: list[float], values: list[float], buckets: int = _POINTS) -> Series:
    """The series as a chart can show it: of each of `buckets` parts the lowest and highest point.

    Ends and gaps (NaN) stay.
    """
    if len(steps) <= 2 * buckets:
        return steps, values
    kept = {0, len(steps) - 1}
    for part in range(buckets):
        places = range(len(steps) * part // buckets, len(steps) * (part + 1) // buckets)
        finite = [place for place in places if math.isfinite(values[place])]
        gaps = [place for place in places if not math.isfinite(values[place])]
        kept.update(gaps[:1])
        kept.update(pick(finite, key=values.__getitem__) for pick in (min, max) if finite)
    chosen = sorted(kept)
    return [steps[place] for place in chosen], [values[place] for place in chosen]


def _only_value(lines: dict[str, Series]) -> float | None:
    """The value that all of several points have, else None."""
    values = [value for _, line in lines.values() for value in line]
    is_flat = len(values) > 1 and len(set(values)) == 1 and math.isfinite(values[0])
    return values[0] if is_flat else None


def _spans_a_decade(lines: Iterable[Series]) -> bool:
    finite = [value for _, values in lines for value in values if math.isfinite(value)]
    return len(finite) > 1 and min(finite) > 0 and max(finite) > 10 * min(finite)
