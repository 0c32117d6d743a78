"""What the embedding is worth: every query against the whole gallery, on any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from arcface.batches import Preprocess, collate
from arcface.encoders import Encoder
from arcface.inshop import LEFT_OUT, InShop
from shared import retrieval
from shared.distributed import World
from shared.loader import make_eval_loader
from shared.retrieval import MAP_AT, RECALL_AT, Positives, Retrieval
from shared.rows_of_ranks import gather_rows
from shared.sampling import eval_indices

Context = Callable[[], AbstractContextManager[Any]]


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


@dataclass(frozen=True)
class Outcome:
    """The figures, and where the rows of `retrieval` stand in the data sets.

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
    encoder: Encoder,
    preprocess: Preprocess,
    query: Split,
    gallery: Split,
    world: World,
    *,
    autocast: Context = nullcontext,
    recall_at: tuple[int, ...] = (),
    map_at: tuple[int, ...] = (),
) -> Outcome:
    """Recall@k and mAP@k of the query pictures in the gallery, the same on every rank.

    Both splits number their items alike (InShop). Pictures that cannot be read are left out.
    recall_at, map_at: depths beside those that are always reported. The encoder is left in the mode
    it came in. Raises UserError when no query has an item of the gallery.
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
    seconds = time.monotonic() - began
    return Outcome(found, query_places, gallery_places, embed.batches, embed.waited, seconds)


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
