"""A page of queries with their nearest gallery pictures, right and wrong ones marked."""

from __future__ import annotations

import io
import random

import torch
from torch import Tensor

from arcface.evaluation import Outcome, Split
from arcface.log_lines import in_percent
from shared.page import Page, Picture

NEAREST = 10
_HEIGHT = 96  # pixels of a thumbnail
_RIGHT, _WRONG = ("✓", "good"), ("✗", "bad")


def choose(first_is_right: Tensor, count: int, seed: int) -> list[int]:
    """The rows to show, ascending: failures at Recall@1 for up to half of `count`, at random."""
    order = random.Random(seed)
    wrong = (~first_is_right).nonzero().flatten().tolist()
    right = first_is_right.nonzero().flatten().tolist()
    shown = order.sample(wrong, min(len(wrong), max(count // 2, count - len(right))))
    return sorted(shown + order.sample(right, min(len(right), count - len(shown))))


def contact_sheet(
    outcome: Outcome, query: Split, gallery: Split, *, title: str, count: int = 24, seed: int = 0
) -> str:
    """The page as HTML, pictures inside: `count` queries of this rank, NEAREST results each.

    Pictures are shown as the encoder sees them, cut and resized.
    """
    found = outcome.retrieval
    rows = choose(found.hits[:, 0], count, seed)
    wrong = int((~found.hits[:, 0]).sum())
    page = Page(title)
    figures = in_percent(outcome.metrics).items()
    page.table(["metric", "percent"], [[name, f"{value:.2f}"] for name, value in figures])
    page.text(
        f"{len(rows)} of {len(found.numbers)} queries, drawn at random, up to half of them from "
        f"the {wrong} whose nearest picture shows another item. Each row: the query, then its "
        f"{NEAREST} nearest gallery pictures with their cosine; ✓ same item, ✗ another one."
    )
    headers = ["query", *map(str, range(1, NEAREST + 1))]
    page.table(headers, [_row(outcome, query, gallery, row) for row in rows])
    return page.render()


def _row(outcome: Outcome, query: Split, gallery: Split, row: int) -> list[Picture]:
    found = outcome.retrieval
    number = int(outcome.query_places[found.numbers[row]])
    cells = [_cell(query, number, query.dataset.items[number])]
    for rank in range(NEAREST):
        place = int(found.indices[row, rank])
        if place < 0:  # a gallery of fewer pictures
            break
        mark = _RIGHT if found.hits[row, rank] else _WRONG
        note = f"{mark[0]} {float(found.scores[row, rank]):.3f}"
        cells.append(_cell(gallery, int(outcome.gallery_places[place]), note, mark[1]))
    return cells


def _cell(split: Split, number: int, note: str, kind: str = "") -> Picture:
    """A picture with a frame and a note below it."""
    dataset = split.dataset
    alt = f"{dataset.items[number]}, {dataset.names[number]}"
    return Picture(_jpeg(dataset[number].image), alt, note, kind)


def _jpeg(image: Tensor) -> bytes:
    """A small JPEG of a picture, uint8 (3, H, W)."""
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).to(torch.uint8).contiguous().numpy())
    width = max(1, round(picture.width * _HEIGHT / picture.height))
    encoded = io.BytesIO()
    picture.resize((width, _HEIGHT)).save(encoded, "JPEG", quality=80)
    return encoded.getvalue()
