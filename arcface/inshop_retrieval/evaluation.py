"""What the embedding is worth: every query against the whole gallery, and pages of the results."""

from __future__ import annotations

import csv
import io
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from arcface.inshop_retrieval.encoders import Encoder, Preprocess
from arcface.inshop_retrieval.epochs import in_percent
from arcface.inshop_retrieval.inshop import LEFT_OUT, InShop, collate
from arcface.inshop_retrieval.pipeline import build_pipeline
from arcface.inshop_retrieval.recipe import Loader
from shared import retrieval
from shared.distributed import World
from shared.files import write_atomic, write_json, write_text
from shared.loader import eval_indices, make_eval_loader
from shared.nearest import search
from shared.page import Page, Picture
from shared.retrieval import MAP_AT, RECALL_AT, Positives, Retrieval
from shared.rows_of_ranks import gather_rows

if TYPE_CHECKING:
    from PIL.Image import Image

    from shared.run import Run

Context = Callable[[], AbstractContextManager[Any]]
PROTOCOL = {
    "unit": "percent",
    "Recall@k": "queries with a picture of their item among the k nearest of the gallery",
    "mAP@k": "precision at each hit among the k nearest, summed, over all relevant pictures",
    "mAP@k_min": "the same sum over min(k, relevant)",
    "similarity": "cosine of the embeddings",
}
NEAREST = 10
_HEIGHT = 96  # pixels of a thumbnail
_RIGHT, _WRONG = ("✓", "good"), ("✗", "bad")
_FRAMES = {"good": "#2a9d4a", "bad": "#d1495b", "": "#9aa0a6"}


@dataclass(frozen=True)
class Split:
    """Pictures to embed, and how many at a time in one process. numbers: which; None for all."""

    dataset: InShop
    batch_size: int
    workers: int
    numbers: Tensor | None = None

    @property
    def chosen(self) -> Tensor:
        """The numbers of the pictures to embed, int64 (N,)."""
        return torch.arange(len(self.dataset)) if self.numbers is None else self.numbers


def by_chance(*test: Split) -> dict[str, float]:
    """Recall@1 of a gallery in random order, in percent, and the number of queries.

    test: queries and gallery; nothing of them gives nothing.
    """
    if not test:
        return {}
    queries, gallery = (split.dataset.labels[split.chosen] for split in test)
    pictures = torch.bincount(gallery, minlength=int(queries.max()) + 1)  # of each item
    chance = 100 * pictures[queries].double().mean().item() / len(gallery)
    return {"chance": round(chance, 4), "n": len(queries)}


def open_split(loader: Loader, seed: int) -> Split:
    """The pictures that a configuration's loader describes. seed: see InShop.

    Raises UserError for what is missing or malformed.
    """
    assert loader.root is not None
    data = InShop(
        loader.root, loader.split, build_pipeline(loader.pipeline),
        prefix=loader.prefix, ann_file=loader.ann_file, seed=seed,
    )  # fmt: skip
    return Split(data, loader.batch_size, loader.workers)


@dataclass(frozen=True)
class Outcome:
    """The figures, and where the rows of `retrieval` are in the data sets.

    query_places, gallery_places: the number in its split of each row that could be read.
    waited, seconds: for batches, and in all. batches: of queries on this rank.
    """

    retrieval: Retrieval
    query_places: Tensor
    gallery_places: Tensor
    batches: int
    waited: float
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """Recall@k, mAP@k and mAP@k_min, in [0, 1]."""
        return self.retrieval.metrics


@dataclass(frozen=True)
class Row:
    """A query's number, and what was found, best first: number, cosine, whether the same item."""

    query: int
    found: list[tuple[int, float, bool | None]]  # None: not known


def evaluate(
    encoder: Encoder, preprocess: Preprocess, query: Split, gallery: Split, world: World, *,
    autocast: Context = nullcontext, recall_at: tuple[int, ...] = (), map_at: tuple[int, ...] = (),
    run: Run | None = None,
) -> Outcome:  # fmt: skip
    """Recall@k and mAP@k of the query pictures in the gallery, the same on every rank.

    Both splits number their items alike (InShop). Pictures that cannot be read are left out.
    recall_at, map_at: depths beside those that are always reported, and before them in the order of
    the metrics. run: may be stopped meanwhile. The encoder is left in the mode it came in. Raises
    UserError when no query has an item of the gallery.
    """
    began = time.monotonic()
    was_training = encoder.training
    encoder.eval()
    embed = Embedder(encoder, preprocess, world, autocast, run)
    gallery_rows, gallery_places = embed.all(gallery)
    query_rows, query_places = embed.all(query)
    encoder.train(was_training)
    positives = Positives.same_id(
        query.dataset.labels[query_places], gallery.dataset.labels[gallery_places]
    )
    found = retrieval.evaluate(
        query_rows, gallery_rows, positives, world,
        recall_at=tuple(sorted({*RECALL_AT, *recall_at})), map_at=tuple(sorted({*MAP_AT, *map_at})),
    )  # fmt: skip
    first = [*(f"Recall@{k}" for k in recall_at), *(f"mAP@{k}" for k in map_at)]
    found = replace(found, metrics={name: found.metrics[name] for name in (*first, *found.metrics)})
    seconds = time.monotonic() - began
    return Outcome(found, query_places, gallery_places, embed.batches, embed.waited, seconds)


class Embedder:
    """Embeds splits with all ranks; waited, batches: of the split that came last."""

    def __init__(
        self, encoder: Encoder, preprocess: Preprocess, world: World, autocast: Context,
        run: Run | None = None,
    ) -> None:  # fmt: skip
        self._encoder, self._preprocess = encoder, preprocess
        self._world, self._autocast, self._run = world, autocast, run
        self.waited, self.batches = 0.0, 0

    def all(self, split: Split) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) float32 of the pictures that could be read, and their places (N,)."""
        chosen = split.chosen
        total = len(chosen)
        rows, readable = self._own(split, chosen)
        places = torch.tensor(eval_indices(total, self._world), dtype=torch.int64)
        rows = gather_rows(rows, places, total, self._world)
        kept = gather_rows(readable[:, None], places, total, self._world)
        found = kept[:, 0].nonzero().flatten().cpu()
        return rows[found.to(rows.device)], chosen[found]

    def _own(self, split: Split, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's embeddings, in the order of the loader, and which pictures were readable."""
        pictures = Subset(split.dataset, chosen.tolist())
        loader = make_eval_loader(
            pictures, split.batch_size, self._world, workers=split.workers, collate=collate
        )
        device = self._world.device
        rows = [torch.empty(0, self._encoder.dim, device=device)]
        readable = [torch.empty(0, dtype=torch.uint8)]
        self.waited, self.batches, mark = 0.0, len(loader), time.monotonic()
        what = "validation: batch"
        for batch in self._run.watched(loader, what) if self._run else loader:
            self.waited += time.monotonic() - mark
            rows.append(self._embed(batch.images.to(device, non_blocking=True)))
            readable.append((batch.indices != LEFT_OUT).to(torch.uint8))
            mark = time.monotonic()
        return torch.cat(rows), torch.cat(readable).to(device)

    def _embed(self, images: Tensor) -> Tensor:
        # no_grad: inference mode's tensors could not be changed by a gather later
        with torch.no_grad(), self._autocast():
            return self._encoder(self._preprocess(images)).float()


# --- the figures as files -------------------------------------------------------------------------


def write_figures(
    out: Path, outcome: Outcome, query: Split, gallery: Split, *,
    checkpoint: Path, data: str, examples: int, seed: int,
) -> list[Path]:  # fmt: skip
    """Write retrieval.json, retrieval.txt and the contact sheet into `out`; the files."""
    written = {
        "schema": 1,
        "protocol": PROTOCOL,
        "metrics": in_percent(outcome.metrics),
        "counts": _counts(outcome, query, gallery),
        "checkpoint": str(checkpoint),
        "data": data,
    }
    write_json(out / "retrieval.json", written)
    write_text(out / "retrieval.txt", text_table(outcome, query, gallery) + "\n")
    right = outcome.retrieval.hits[:, 0]
    chosen = choose(right, examples, seed)
    page = Page(f"Queries and their nearest pictures: {checkpoint.name}")
    figures = in_percent(outcome.metrics).items()
    page.table(["metric", "percent"], [[name, f"{value:.2f}"] for name, value in figures])
    page.text(
        f"{len(chosen)} of {len(right)} queries, drawn at random, up to half of them from "
        f"the {int((~right).sum())} whose nearest picture shows another item. Each row: the "
        f"query, then its {NEAREST} nearest gallery pictures with their cosine; ✓ same item, ✗ "
        "another one."
    )
    rows = _rows_of(outcome, chosen)
    sheets = _write_sheet(out, page, rows, query.dataset, gallery.dataset)
    return [out / "retrieval.json", out / "retrieval.txt", *sheets]


def text_table(outcome: Outcome, query: Split, gallery: Split) -> str:
    """Metrics and counts, aligned."""
    rows = [(name, f"{value:.4f}") for name, value in in_percent(outcome.metrics).items()]
    rows += [(name, str(value)) for name, value in _counts(outcome, query, gallery).items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>9}" for name, value in rows)


def _counts(outcome: Outcome, query: Split, gallery: Split) -> dict[str, int]:
    return {
        "queries": outcome.retrieval.num_queries,
        "queries_without_gallery_picture": len(outcome.retrieval.without_positive),
        "queries_unreadable": len(query.chosen) - len(outcome.query_places),
        "queries_in_list": len(query.dataset),
        "gallery": len(outcome.gallery_places),
        "gallery_unreadable": len(gallery.chosen) - len(outcome.gallery_places),
    }


def choose(first_is_right: Tensor, count: int, seed: int) -> list[int]:
    """The rows to show, ascending: failures at Recall@1 for up to half of `count`, at random."""
    order = random.Random(seed)
    wrong = (~first_is_right).nonzero().flatten().tolist()
    right = first_is_right.nonzero().flatten().tolist()
    shown = order.sample(wrong, min(len(wrong), max(count // 2, count - len(right))))
    return sorted(shown + order.sample(right, min(len(right), count - len(shown))))


def _rows_of(outcome: Outcome, rows: list[int]) -> list[Row]:
    """What the rows of an evaluation found."""
    found, shown = outcome.retrieval, []
    for row in rows:
        cells = zip(found.indices[row].tolist(), found.scores[row].tolist(),
                    found.hits[row].tolist(), strict=True)  # fmt: skip
        nearest = [(int(outcome.gallery_places[place]), score, hit)
                   for place, score, hit in list(cells)[:NEAREST] if place >= 0]  # fmt: skip
        shown.append(Row(int(outcome.query_places[found.numbers[row]]), nearest))
    return shown


# --- one's own pictures ---------------------------------------------------------------------------


def nearest(
    encoder: Encoder, preprocess: Preprocess, query: Split, gallery: Split, world: World,
    autocast: Context = nullcontext,
) -> list[Row]:  # fmt: skip
    """What of the gallery is nearest to each query that can be read, in the order of the queries.

    Whether both show the same item is known where the query's item has pictures in the gallery.
    Raises UserError for a gallery without a readable picture.
    """
    encoder.eval()
    embed = Embedder(encoder, preprocess, world, autocast)
    (gallery_rows, gallery_places), (query_rows, query_places) = map(embed.all, (gallery, query))
    scores, indices = search(query_rows, gallery_rows, NEAREST)
    known, rows = {*gallery.dataset.items} - {""}, []
    for place, found, cosines in zip(query_places, indices.tolist(), scores.tolist(), strict=True):
        item = query.dataset.items[int(place)]
        numbers = [int(gallery_places[one]) for one in found if one >= 0]
        same = [gallery.dataset.items[one] == item if item in known else None for one in numbers]
        rows.append(Row(int(place), list(zip(numbers, cosines, same, strict=False))))
    return rows


def write_neighbours(
    out: Path, rows: list[Row], query: Split, gallery: Split, *,
    checkpoint: Path, examples: int, seed: int,
) -> list[Path]:  # fmt: skip
    """Write neighbours.json, neighbours.csv and the contact sheet into `out`; the files."""
    entries = [
        {
            "query": str(query.dataset.paths[row.query]),
            "nearest": [
                {"picture": str(gallery.dataset.paths[one]), "score": round(score, 6), "same": same}
                for one, score, same in row.found
            ],
        }
        for row in rows
    ]
    unreadable = [*query.dataset.left_out(), *gallery.dataset.left_out()]
    written = {
        "schema": 1,
        "checkpoint": str(checkpoint),
        "similarity": PROTOCOL["similarity"],
        "gallery": len(gallery.dataset),
        "unreadable": unreadable,
        "queries": entries,
    }
    write_json(out / "neighbours.json", written)
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["query", "rank", "picture", "score", "same"])
    for entry in entries:
        for rank, found in enumerate(entry["nearest"], 1):
            lines.writerow([entry["query"], rank, *found.values()])
    write_text(out / "neighbours.csv", table.getvalue())
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(examples, len(rows))))
    page = Page(f"Queries and their nearest pictures: {checkpoint.name}")
    page.text(f"{len(chosen)} of {len(rows)} queries, each with its {NEAREST} nearest pictures.")
    sheets = _write_sheet(out, page, [rows[row] for row in chosen], query.dataset, gallery.dataset)
    return [out / "neighbours.json", out / "neighbours.csv", *sheets]


# --- contact sheets -------------------------------------------------------------------------------


def _write_sheet(
    out: Path, page: Page, rows: list[Row], query: InShop, gallery: InShop
) -> list[Path]:
    """Write contact_sheet.html, and its pictures alone as contact_sheet.jpg; the files.

    Pictures are shown as the encoder sees them, cut and resized.
    """
    from PIL import Image, ImageOps

    table: list[list[Picture]] = []
    strips = []
    for row in rows:
        cells = [(query, row.query, query.items[row.query], "")]
        for number, score, same in row.found:
            mark, kind = {True: _RIGHT, False: _WRONG, None: ("", "")}[same]
            cells.append((gallery, number, f"{mark} {score:.3f}".strip(), kind))
        thumbnails = [_thumbnail(data[number].image) for data, number, _, _ in cells]
        table.append([
            Picture(_jpeg(thumbnail), f"{data.items[number]}, {data.names[number]}", note, kind)
            for thumbnail, (data, number, note, kind) in zip(thumbnails, cells, strict=True)
        ])  # fmt: skip
        colours = [_FRAMES[kind] for _, _, _, kind in cells]
        strips.append([ImageOps.expand(one, 4, colour)
                       for one, colour in zip(thumbnails, colours, strict=True)])  # fmt: skip
    page.table(["query", *map(str, range(1, NEAREST + 1))], table)
    write_text(out / "contact_sheet.html", page.render())
    width = max(sum(one.width for one in strip) for strip in strips)
    sheet = Image.new("RGB", (width, len(strips) * strips[0][0].height), "white")
    for place, strip in enumerate(strips):
        left = 0
        for one in strip:
            sheet.paste(one, (left, place * one.height))
            left += one.width
    write_atomic(out / "contact_sheet.jpg", lambda stream: sheet.save(stream, "JPEG", quality=80))
    return [out / "contact_sheet.html", out / "contact_sheet.jpg"]


def _thumbnail(image: Tensor) -> Image:
    """A small picture of one, uint8 (3, H, W)."""
    from PIL import Image

    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((max(1, round(picture.width * _HEIGHT / picture.height)), _HEIGHT))


def _jpeg(picture: Image) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=80)
    return encoded.getvalue()
