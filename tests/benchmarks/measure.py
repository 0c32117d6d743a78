"""What the benchmarks share: sides in turn within one run, median and range, one JSON line last."""

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def in_turn(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every side's figures: one of each side, then another of each, and so on.

    So a load that comes and goes falls on all sides alike. A first round is not counted.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for count in range(repeats + 1):
        for name, side in sides.items():
            figure = side()
            if count:
                figures[name].append(figure)
    return figures


def compare(
    title: str, unit: str, figures: Mapping[str, list[float]], base: str
) -> dict[str, dict[str, float]]:
    """Print a table: every side's median, range and ratio to `base`; the same as numbers.

    difference and ratio are medians over the rounds, each against the base of its own round.
    """
    print(f"\n{title}  ({len(figures[base])} rounds in turn)")
    print(f"  {'':<34} {'median':>10} {'range':>21}  {'ratio':>6}  {unit}")
    found = {}
    for name, values in figures.items():
        pairs = list(zip(values, figures[base], strict=True))
        found[name] = {
            "median": round(statistics.median(values), 4),
            "min": round(min(values), 4),
            "max": round(max(values), 4),
            "ratio": round(statistics.median(own / other for own, other in pairs), 4),
            "difference": round(statistics.median(own - other for own, other in pairs), 4),
        }
        row = found[name]
        span = f"{row['min']:.4g} to {row['max']:.4g}"
        print(f"  {name:<34} {row['median']:>10.4g} {span:>21}  {row['ratio']:>6.2f}")
    return found


def conclude(benchmark: str, unit: str, **figures: Any) -> None:
    """Print the machine and everything measured as one JSON line."""
    machine = {
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": sys.version.split()[0],
    }
    print(json.dumps({"benchmark": benchmark, "unit": unit, "machine": machine, **figures}))
