"""filtering_report.json, its rows as JSON lines, the contact sheet, and a sample's analysis.

The report is written row after row: its length takes no memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from shared.files import write_atomic, write_json, write_text
from shared.page import Page
from vasevqa.filter import contact_sheet, decision
from vasevqa.filter.decision import Threshold
from vasevqa.filter.ledger import Ledger
from vasevqa.filter.prompts import Prompts
from vasevqa.filter.rows import Row

log = logging.getLogger(__name__)

SHOWN = 24  # pictures of a kind on the contact sheet
_DECIDED = ("accepted", "rejected")


@dataclass(frozen=True)
class Report:
    """What a run decided, and where it is told."""

    input_dir: Path
    output_dir: Path
    threshold: Threshold
    seconds: float

    def write(self, ledger: Ledger, prompts: Prompts) -> list[Path]:
        """Write every file; their paths."""
        head = self._head(ledger, prompts)
        names = ("filtering_report.json", "filtering_report.jsonl", "contact_sheet.html")
        paths = [self.output_dir / name for name in names]
        results = lambda: (_result(row, ledger) for row in ledger.rows(_DECIDED))  # noqa: E731
        unreadable = [
            {"filename": row["filename"], "reason": row["problem"]}
            for row in ledger.rows(("quarantine",))
        ]
        head["unreadable"] = unreadable
        write_stream(paths[0], head, results())
        write_lines(paths[1], (_line(row, ledger) for row in ledger.rows()))
        write_text(paths[2], self._sheet(ledger, head).render())
        return paths

    def _head(self, ledger: Ledger, prompts: Prompts) -> dict[str, Any]:
        counts = ledger.counts()
        accepted, total = counts.get("accepted", 0), len(ledger)
        head = {
            "input_directory": str(self.input_dir),
            "output_directory": str(self.output_dir),
            "total_images": total,
            "accepted_images": accepted,
            "rejected_images": counts.get("rejected", 0),
            "acceptance_rate": accepted / total if total else 0.0,
            "threshold": self.threshold.value,
            "processing_time_seconds": self.seconds,
            "unreadable_images": counts.get("quarantine", 0),
            "threshold_source": self.threshold.source,
        }
        lowest, highest = ledger.range()
        if lowest is not None:
            head["histogram"] = decision.histogram(ledger.scores(), lowest, highest)
        head["prompts"] = {"high": list(prompts.high), "low": list(prompts.low)}
        return head

    def _sheet(self, ledger: Ledger, head: dict[str, Any]) -> Page:
        page = Page("CLIP filter")
        page.text(
            f"{head['accepted_images']} of {head['total_images']} pictures of {self.input_dir} "
            f"accepted: score at least {self.threshold.value:.4f} ({self.threshold.source}). "
            f"{head['rejected_images']} rejected, {head['unreadable_images']} unreadable."
        )
        if "histogram" in head:
            lines = contact_sheet.score_lines(head["histogram"], self.threshold.value)
            page.chart("Scores", lines, x_label="score", y_label="pictures")
        shown = {
            "Borderline: nearest to the threshold": ledger.nearest(self.threshold.value, SHOWN),
            "Accepted, the best": _first(ledger.rows(("accepted",), "best")),
            "Accepted, the worst": _first(ledger.rows(("accepted",), "worst")),
            "Rejected, the best": _first(ledger.rows(("rejected",), "best")),
            "Rejected, the worst": _first(ledger.rows(("rejected",), "worst")),
        }
        for heading, rows in shown.items():
            page.section(heading)
            captions = ((row["filename"], _caption(row)) for row in rows)
            page.pictures(contact_sheet.gallery(self.input_dir, captions))
        if head["unreadable"]:
            page.section("Unreadable")
            rows = [(item["filename"], item["reason"]) for item in head["unreadable"][:200]]
            page.table(("file", "reason"), rows)
        return page


def write_analysis(
    path: Path, scores: Sequence[float], ledger: Ledger, chosen: Threshold, drawn: int
) -> None:
    """Print and store how the scores of a sample lie and what that recommends."""
    statistic = decision.statistics(scores)
    unreadable = {row["filename"]: row["problem"] for row in ledger.rows() if "problem" in row}
    log.info("scores of %d pictures (%d of the sample unreadable):", len(scores), len(unreadable))
    log.info("\n%s", decision.text_histogram(scores, chosen.value))
    log.info("mean %(mean).4f | std %(std).4f | min %(min).4f | median %(median).4f | "
             "max %(max).4f", statistic)  # fmt: skip
    for line in decision.advice(statistic):
        log.info("threshold %(threshold).4f keeps about %(keeps).0f%%",
                 line | {"keeps": 100 * line["keeps"]})  # fmt: skip
    log.info("proposed threshold: %.4f (%s)", chosen.value, chosen.source)
    content = {
        "statistics": statistic,
        "recommendations": decision.advice(statistic),
        "threshold": chosen.value,
        "threshold_source": chosen.source,
        "sample_size": drawn,
        "unreadable": unreadable,
        "histogram": decision.histogram(scores, statistic["min"], statistic["max"]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def write_stream(path: Path, head: dict[str, Any], results: Iterable[dict[str, Any]]) -> None:
    """One JSON object: `head`, and the `results` as its last member, a line each."""

    def write(stream: IO[bytes]) -> None:
        start = json.dumps(head, indent=2, ensure_ascii=False).rpartition("\n}")[0]
        stream.write(f'{start},\n  "results": ['.encode())
        separator = "\n    "
        for result in results:
            stream.write((separator + json.dumps(result, ensure_ascii=False)).encode())
            separator = ",\n    "
        stream.write(b"\n  ]\n}\n")

    write_atomic(path, write)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, atomically."""

    def write(stream: IO[bytes]) -> None:
        for row in rows:
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())

    write_atomic(path, write)


def _result(row: Row, ledger: Ledger) -> dict[str, Any]:
    """A scored row under the report's names."""
    found = {
        "filename": row["filename"],
        "quality_score": row["score"],
        "high_quality_similarity": row["high"],
        "low_quality_similarity": row["low"],
        "accepted": row["place"] == "accepted",
    }
    keeper = ledger.keeper_of(row["digest"])
    return found | ({"same_content_as": keeper} if keeper not in (None, row["filename"]) else {})


def _line(row: Row, ledger: Ledger) -> dict[str, Any]:
    """A row of the JSON lines: of scored files the prompts' cosines too."""
    if "problem" in row:
        return {"filename": row["filename"], "accepted": False, "problem": row["problem"]}
    return _result(row, ledger) | {"prompt_scores": row["prompts"], "content": row["digest"]}


def _caption(row: Row) -> str:
    return f"{row['score']:+.4f} {row['place']} {row['filename'].rpartition('/')[2]}"


def _first(rows: Iterator[Row]) -> list[Row]:
    return [row for row, _ in zip(rows, range(SHOWN), strict=False)]
