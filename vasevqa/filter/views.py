"""Views to vases, and of each vase the best view. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class View:
    """One readable picture of a vase."""

    vase: str
    number: int
    filename: str
    score: float

    @property
    def rank(self) -> tuple[float, int, str]:
        """The smallest is the best: the highest score, of equals the first view, then the name."""
        return -self.score, self.number, self.filename


@dataclass
class Vase:
    """A vase with its readable views, by number, and the names of those that cannot be read."""

    id: str
    views: list[View] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def best(self) -> View | None:
        """The selected view, or None when no view is readable."""
        return min(self.views, key=lambda view: view.rank, default=None)

    def result(self) -> dict[str, Any]:
        """The vase's entry in best_views_report.json."""
        best = self.best
        assert best is not None
        alone = len(self.views) == 1
        found: dict[str, Any] = {
            "vase_id": self.id,
            "selected_view": best.number,
            "selected_filename": best.filename,
            "clip_score": best.score,
            "total_views": len(self.views),
            "reason": "only_one_view" if alone else "best_clip_score",
        }
        if not alone:
            found["all_view_scores"] = [
                {"view_number": v.number, "filename": v.filename, "clip_score": v.score}
                for v in self.views
            ]
        return found | ({"unreadable_views": self.unreadable} if self.unreadable else {})


def parse_name(pattern: re.Pattern[str], filename: str) -> tuple[str, int] | None:
    """(vase, view) of a file, from the last part of its path; None when it does not match."""
    found = pattern.search(filename.rpartition("/")[2])
    if found is None or found[1] is None or not (found[2] or "").isdigit():
        return None
    return found[1], int(found[2])


def vases(rows: Iterable[dict[str, Any]]) -> Iterator[Vase]:
    """The vases of rows sorted by `vase`: {vase, written, view, filename, high} or {…, problem}.

    Vases whose names differ in case alone are the same: `vase` is in capitals, `written` as the
    file has it. A vase is called as its first file is.
    """
    for _, group in groupby(rows, key=lambda row: row["vase"]):
        found = list(group)
        name = found[0]["written"]
        vase = Vase(name)
        for row in found:
            if "problem" in row:
                vase.unreadable.append(row["filename"])
            else:
                vase.views.append(View(name, row["view"], row["filename"], row["high"]))
        vase.views.sort(key=lambda view: (view.number, view.filename))
        yield vase
