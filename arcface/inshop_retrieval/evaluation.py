"""What the embedding is worth: every query against the whole gallery, and pages of the results."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from shared.files import write_json, write_text
from shared.loader import make_eval_loader
from shared.page import Page, Picture
from shared.retrieval import MAP_AT, RECALL_AT, Positives, Retrieval
from shared.rows_of_ranks import gather_rows
from shared.sampling import eval_indices

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


def evaluate(
    encoder: Encoder, preprocess: Preprocess, query: Split, gallery: Split, world: World, *,
    autocast: Context = nullcontext, recall_at: tuple[int, ...] = (), map_at: tuple[int, ...] = (),
) -> Outcome:  # fmt: skip
    """Recall@k and mAP@k of the query pictures in the gallery, the same on every rank.

    Both splits number their items alike (InShop). Pictures that cannot be read are left out.
    recall_at, map_at: depths beside those that are always reported, and before them in the order of
    the metrics. The encoder is left in the mode it came in. Raises UserError when no query has an
    item of the gallery.
    """
    began = time.monotonic()
    was_training = encoder.training
    encoder.eval()
    embed = Embedder(encoder, preprocess, world, autocast)
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


def metric_names(recall_at: tuple[int, ...], map_at: tuple[int, ...]) -> list[str]:
    """The names of the metrics of `evaluate`."""
    precision = sorted({*MAP_AT, *map_at})
    names = [f"Recall@{k}" for k in sorted({*RECALL_AT, *recall_at})]
    return names + [f"mAP@{k}{kind}" for k in precision for kind in ("", "_min")]


class Embedder:
    """Embeds splits with all ranks; waited, batches: of the split that came last."""

    def __init__(
        self, encoder: Encoder, preprocess: Preprocess, world: World, autocast: Context
    ) -> None:
        self._encoder, self._preprocess = encoder, preprocess
        self._world, self._autocast = world, autocast
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
        for batch in loader:
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
    """Write retrieval.json, retrieval.txt and contact_sheet.html into `out`; the files."""
    counts = _counts(outcome, query, gallery)
    written = {
        "schema": 1,
        "protocol": PROTOCOL,
        "metrics": in_percent(outcome.metrics),
        "counts": counts,
        "checkpoint": str(checkpoint),
        "data": data,
    }
    write_json(out / "retrieval.json", written)
    write_text(out / "retrieval.txt", text_table(outcome, query, gallery) + "\n")
    page = _sheet_of_figures(outcome, query, gallery, checkpoint.name, examples, seed)
    write_text(out / "contact_sheet.html", page)
    return [out / name for name in ("retrieval.json", "retrieval.txt", "contact_sheet.html")]


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


def _sheet_of_figures(
    outcome: Outcome, query: Split, gallery: Split, name: str, count: int, seed: int
) -> str:
    """`count` queries of this rank with the NEAREST results of each, as HTML with its pictures.

    Pictures are shown as the encoder sees them, cut and resized.
    """
    found = outcome.retrieval
    rows = choose(found.hits[:, 0], count, seed)
    wrong = int((~found.hits[:, 0]).sum())
    page = Page(f"Queries and their nearest pictures: {name}")
    figures = in_percent(outcome.metrics).items()
    page.table(["metric", "percent"], [[name, f"{value:.2f}"] for name, value in figures])
    page.text(
        f"{len(rows)} of {len(found.numbers)} queries, drawn at random, up to half of them from "
        f"the {wrong} whose nearest picture shows another item. Each row: the query, then its "
        f"{NEAREST} nearest gallery pictures with their cosine; ✓ same item, ✗ another one."
    )
    table = []
    for row in rows:
        number = int(outcome.query_places[found.numbers[row]])
        cells = [_cell(query.dataset, number, query.dataset.items[number])]
        for rank, place in enumerate(found.indices[row, :NEAREST].tolist()):
            if place >= 0:  # else of a gallery of fewer pictures
                mark, kind = _RIGHT if found.hits[row, rank] else _WRONG
                note = f"{mark} {float(found.scores[row, rank]):.3f}"
                number = int(outcome.gallery_places[place])
                cells.append(_cell(gallery.dataset, number, note, kind))
        table.append(cells)
    page.table(["query", *map(str, range(1, NEAREST + 1))], table)
    return page.render()


def _cell(dataset: InShop, number: int, note: str, kind: str = "") -> Picture:
    """A picture with a frame and a note below it."""
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
