"""The figures of an evaluation as JSON, text and a contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arcface.contact_sheet import contact_sheet
from arcface.log_lines import in_percent
from arcface.trained import Tested
from shared.files import write_json, write_text

SCHEMA = 1
PROTOCOL = {
    "unit": "percent",
    "Recall@k": "queries with a picture of their item among the k nearest of the gallery",
    "mAP@k": "precision at each hit among the k nearest, summed, over all relevant pictures",
    "mAP@k_min": "the same sum over min(k, relevant)",
    "similarity": "cosine of the embeddings",
}


def write(out: Path, result: Tested, *, examples: int, seed: int) -> list[Path]:
    """Write retrieval.json, retrieval.txt and contact_sheet.html into `out`; the files."""
    sheet = contact_sheet(
        result.outcome,
        result.query,
        result.gallery,
        title=f"Queries and their nearest pictures: {result.checkpoint.name}",
        count=examples,
        seed=seed,
    )
    texts = {
        out / "retrieval.txt": text_table(result) + "\n",
        out / "contact_sheet.html": sheet,
    }
    for path, text in texts.items():
        write_text(path, text)
    write_json(out / "retrieval.json", record(result))
    return [out / "retrieval.json", *texts]


def record(result: Tested) -> dict[str, Any]:
    """Plain values for JSON; metrics in percent."""
    found = result.outcome.retrieval
    embedded = len(result.query.chosen)
    return {
        "schema": SCHEMA,
        "protocol": PROTOCOL,
        "metrics": in_percent(result.outcome.metrics),
        "counts": {
            "queries": found.num_queries,
            "queries_without_gallery_picture": len(found.without_positive),
            "queries_unreadable": embedded - len(result.outcome.query_places),
            "queries_in_list": len(result.query.dataset),
            "gallery": len(result.outcome.gallery_places),
            "gallery_unreadable": len(result.gallery.chosen) - len(result.outcome.gallery_places),
        },
        "checkpoint": str(result.checkpoint),
        "data": str(result.data),
    }


def text_table(result: Tested) -> str:
    """Metrics and counts, aligned."""
    figures = [(name, f"{value:.4f}") for name, value in in_percent(result.outcome.metrics).items()]
    counts = [(name, str(value)) for name, value in record(result)["counts"].items()]
    width = max(len(name) for name, _ in (*figures, *counts))
    return "\n".join(f"{name:<{width}}  {value:>9}" for name, value in (*figures, *counts))
