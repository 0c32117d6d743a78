"""compare.html: several runs side by side. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared import page as html
from shared.errors import UserError
from shared.page import Page
from shared.report import cell, duration, known, put, seconds_of
from shared.report_curves import Curves, add_curves, charts
from shared.run_record import RunRecord, as_text


def write_comparison(run_dirs: list[Path], out: Path) -> Path:
    """Write the page that shows the runs side by side; its path.

    Raises UserError when one holds no run, or `out` cannot be written.
    """
    records = [known(path) for path in run_dirs]
    return put(out, _comparison(_named_apart(records)).render())


def _named_apart(records: list[RunRecord]) -> dict[str, RunRecord]:
    """The runs under the shortest ends of their paths that tell them apart."""
    paths = [record.run_dir.absolute().parts for record in records]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, records, strict=True))
    raise UserError("the same run is named twice: give different run directories")


def _comparison(runs: dict[str, RunRecord]) -> Page:
    page = Page(f"{len(runs)} runs side by side")
    page.section("Results")
    page.add(html.table(("", *runs), _rows_of({n: _outcome(r) for n, r in runs.items()})))
    for name, record in runs.items():
        for problem in record.problems:
            page.add(f"Not shown of {name}: {problem}.")
    page.section("Settings that differ")
    differing = _differing({name: record.settings for name, record in runs.items()})
    if differing:
        page.add(html.table(("setting", *runs), differing))
    else:
        page.add("None.")
    add_curves(page, _together(runs))
    page.section("Environment")
    page.add(html.table(("", *runs), _rows_of({n: r.environment for n, r in runs.items()})))
    return page


def _outcome(record: RunRecord) -> dict[str, Any]:
    """What the table of results says of a run."""
    said: dict[str, Any] = {"ended": record.state, "reason": record.text("reason")}
    result = record.mapping("result")
    if result:
        name = as_text(result.get("name"))
        said |= {f"{name}, {when}": result.get(when) for when in ("before", "after")}
    said["step"] = record.status.get("step")
    said["duration"] = duration(seconds) if (seconds := seconds_of(record)) else None
    for when in ("best", "last"):
        said |= {f"{when} {tag}": value for tag, value in record.mapping(when).items()}
    return said


def _rows_of(columns: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """A row for each name in any of the columns."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [[n, *(cell(column.get(n)) for column in columns.values())] for n in names]


def _differing(settings: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    return [row for row in sorted(_rows_of(settings)) if any(cell != row[1] for cell in row[2:])]


def _together(runs: dict[str, RunRecord]) -> Curves:
    """Curves by tag, with the lines of all runs."""
    found: Curves = {}
    for name, record in runs.items():
        for tag, lines in charts(record.curves).items():
            for split, series in lines.items():
                found.setdefault(tag, {})[f"{name} {split}".strip()] = series
    return found
