"""From scores to a threshold: statistics of a sample and what they recommend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.errors import UserError

KEEP = 0.75  # the share of pictures that a run without a threshold keeps
_PERCENTILES = (10, 25, 50, 75, 90)
BINS = 24


@dataclass(frozen=True)
class Threshold:
    """What a score must reach, and where the number comes from."""

    value: float
    source: str


def statistics(scores: Sequence[float]) -> dict[str, float]:
    """count, mean, std, min, max, median and percentiles p10 … p90 of at least one score."""
    values = np.asarray(scores, np.float64)
    found = {"count": len(values), "mean": values.mean(), "std": values.std(), "min": values.min(),
             "max": values.max(), "median": np.median(values)}  # fmt: skip
    found |= {f"p{place}": np.percentile(values, place) for place in _PERCENTILES}
    return {name: value if name == "count" else float(value) for name, value in found.items()}


def advice(statistic: dict[str, float]) -> list[dict[str, Any]]:
    """Thresholds to choose from, with the share of pictures that each keeps."""
    return [
        {"threshold": statistic[f"p{place}"], "percentile": place, "keeps": (100 - place) / 100}
        for place in _PERCENTILES
    ]


def from_sample(scores: Sequence[float], keep: float) -> Threshold:
    """The threshold that keeps the share `keep` (0 to 1) of a sample. Raises UserError for none."""
    if not scores:
        raise UserError("no picture of the sample can be read: there is nothing to decide from")
    value = float(np.percentile(np.asarray(scores, np.float64), 100 * (1 - keep)))
    return Threshold(value, f"keeps {keep:.0%} of a sample of {len(scores)}")


def histogram(scores: Iterable[float], low: float, high: float) -> dict[str, Any]:
    """`edges` (BINS + 1) and `counts` (BINS) of scores from `low` to `high`, in little memory."""
    edges = np.linspace(low, high if high > low else low + 1e-6, BINS + 1)
    counts = np.zeros(BINS, np.int64)
    for block in _blocks(scores):
        counts += np.histogram(block, edges)[0]
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def text_histogram(scores: Sequence[float], threshold: float | None = None) -> str:
    """A histogram for a terminal, a line a bin; an arrow marks the threshold."""
    found = histogram(scores, min(scores), max(scores))
    most = max(found["counts"]) or 1
    lines = []
    for left, right, count in zip(
        found["edges"], found["edges"][1:], found["counts"], strict=False
    ):
        here = threshold is not None and left <= threshold < right
        bar = "#" * round(40 * count / most)
        lines.append(f"  {left:+.4f} {'>' if here else ' '} {bar} {int(count)}")
    return "\n".join(lines)


def _blocks(scores: Iterable[float]) -> Iterable[list[float]]:
    block: list[float] = []
    for score in scores:
        block.append(score)
        if len(block) == 65536:
            yield block
            block = []
    yield block
