"""Recall@k and mAP@k of retrieval by cosine, on any number of ranks: those of one, to the digit."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared import distributed
from shared.distributed import World
from shared.errors import UserError
from shared.nearest import non_finite_rows, refuse_rows, search
from shared.rows_of_ranks import first_few, first_occurrences

RECALL_AT = (1, 10, 20, 30, 40)
MAP_AT = (10,)

_FRACTION = 2.0**40  # precision values are summed as integers of this unit: any order, one sum


@dataclass(frozen=True)
class Positives:
    """Which gallery rows are relevant to which query: queries belong to groups that share them.

    groups: (Q,) the group of every query. keys: group · num_gallery + row, ascending and unique.
    """

    groups: Tensor
    keys: Tensor
    num_gallery: int

    @classmethod
    def same_id(
        cls, query_ids: Sequence[Hashable] | Tensor, gallery_ids: Sequence[Hashable] | Tensor
    ) -> Positives:
        """Relevant are the gallery rows that bear the query's id (numbers, texts; 1-D tensors)."""
        numbers: dict[Hashable, int] = {}
        query, gallery = (
            torch.tensor([numbers.setdefault(one, len(numbers)) for one in _plain(ids)])
            for ids in (query_ids, gallery_ids)
        )
        keys = gallery.long() * len(gallery) + torch.arange(len(gallery))
        return cls(query.long(), keys.sort().values, len(gallery))

    @classmethod
    def listed(cls, rows_of_queries: Sequence[Sequence[int]], num_gallery: int) -> Positives:
        """Relevant are the gallery rows listed for each query (an image's captions)."""
        counts = torch.tensor([len(rows) for rows in rows_of_queries])
        starts = torch.cat([torch.zeros(1), counts]).long().cumsum(0)
        rows = torch.tensor([row for rows in rows_of_queries for row in rows])
        return cls.csr(starts, rows, num_gallery)

    @classmethod
    def csr(cls, starts: Tensor, rows: Tensor, num_gallery: int) -> Positives:
        """Relevant to query q are rows[starts[q]:starts[q + 1]]; a row listed twice counts once.

        Raises ValueError for starts that do not ascend to len(rows), and rows outside the gallery.
        """
        starts, rows = starts.long().cpu(), rows.long().cpu()
        counts = starts.diff()
        if starts[0] != 0 or starts[-1] != len(rows) or bool((counts < 0).any()):
            raise ValueError(f"starts must ascend from 0 to the number of rows, {len(rows)}")
        groups = torch.arange(len(counts))
        owners = groups.repeat_interleave(counts)
        outside = ((rows < 0) | (rows >= num_gallery)).nonzero().flatten().tolist()
        if outside:
            raise UserError(
                f"query {int(owners[outside[0]])} lists gallery row {int(rows[outside[0]])} as "
                f"relevant; the gallery has rows 0 to {num_gallery - 1}"
            )
        return cls(groups, (owners * num_gallery + rows).unique(), num_gallery)

    def __len__(self) -> int:
        return len(self.groups)

    def of(self, numbers: Tensor) -> Positives:
        """The same for the queries `numbers`, int64 (n,), alone, in that order."""
        return Positives(self.groups[numbers], self.keys, self.num_gallery)

    def hits(self, indices: Tensor) -> Tensor:
        """Which of the gallery rows `indices` (Q, k) are relevant, bool (Q, k); -1 never is."""
        wanted = self.groups.unsqueeze(1) * self.num_gallery + indices
        if not len(self.keys):
            return torch.zeros_like(wanted, dtype=torch.bool)
        place = torch.searchsorted(self.keys, wanted).clamp_(max=len(self.keys) - 1)
        return (self.keys[place] == wanted) & (indices >= 0)

    def counts(self, exclude: Tensor | None = None) -> Tensor:
        """How many gallery rows are relevant to each query, (Q,) int64; the excluded one is not."""
        starts, ends = self.groups * self.num_gallery, (self.groups + 1) * self.num_gallery
        found = torch.searchsorted(self.keys, ends) - torch.searchsorted(self.keys, starts)
        return found if exclude is None else found - self.hits(exclude.unsqueeze(1))[:, 0].long()


def _plain(ids: Sequence[Hashable] | Tensor) -> Sequence[Hashable]:
    return ids.tolist() if isinstance(ids, Tensor) else ids


def per_query(
    hits: Tensor,
    num_relevant: Tensor,
    recall_at: Sequence[int] = RECALL_AT,
    map_at: Sequence[int] = MAP_AT,
) -> dict[str, Tensor]:
    """Every metric of every query, name → (Q,) float64 in [0, 1]; NaN without a relevant row.

    hits: (Q, K) bool, whether the found row of each place is relevant; K at least the largest k.
    num_relevant: (Q,) how many relevant rows the gallery holds, |P|.
    "Recall@k": 1 when any of the k nearest is relevant, else 0 (the top-k retrieval accuracy of
    DeepFashion, Liu et al. 2016; the usual Recall@K of metric learning).
    "mAP@k": 1/|P| · Σ_{r<=k} hit_r · (hits among the first r)/r. The divisor counts all relevant
    rows, also when they are more than k: the definition of mmpretrain's RetrievalAveragePrecision,
    after Manning, Raghavan, Schütze 2008, section 8.4. Then 1 is out of reach where |P| > k.
    "mAP@k_min": the same sum over min(k, |P|), as Weyand et al. 2020 (arXiv:2004.01804) take it.
    Raises ValueError for a k that K does not hold.
    """
    wrong = [k for k in (*recall_at, *map_at) if not 1 <= k <= hits.shape[1]]
    if wrong:
        raise ValueError(
            f"depth {first_few(wrong)} is outside 1 to {hits.shape[1]}, what was searched"
        )
    hits, num_relevant = hits.cpu(), num_relevant.cpu()
    ranks = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64)
    precision = (hits.cumsum(1) / ranks * hits).unbind(1)
    without = num_relevant == 0
    values = {f"Recall@{k}": hits[:, :k].any(1).double() for k in recall_at}
    for k in map_at:
        area = sum(precision[:k], torch.zeros(len(hits), dtype=torch.float64))
        values[f"mAP@{k}"] = area / num_relevant
        values[f"mAP@{k}_min"] = area / num_relevant.clamp(max=k)
    return {name: value.masked_fill(without, torch.nan) for name, value in values.items()}


@dataclass(frozen=True)
class Retrieval:
    """The metrics of all queries, and what this rank found for its own.

    metrics: means in [0, 1] over the num_queries queries, of all ranks, that have a relevant row.
    without_positive: the numbers of the queries that have none, of all ranks, ascending.
    numbers: (n,) this rank's queries. scores, indices, hits: (n, K), see search() and Positives.
    values: name → (n,), see per_query().
    """

    metrics: dict[str, float]
    num_queries: int
    without_positive: list[int]
    numbers: Tensor
    scores: Tensor
    indices: Tensor
    hits: Tensor
    values: dict[str, Tensor]


def evaluate(
    queries: Tensor,
    gallery: Tensor,
    positives: Positives,
    world: World,
    *,
    numbers: Tensor | None = None,
    exclude: Tensor | None = None,
    recall_at: Sequence[int] = RECALL_AT,
    map_at: Sequence[int] = MAP_AT,
) -> Retrieval:
    """Recall@k and mAP@k of `queries` (Q, D) in `gallery` (G, D), which every rank holds whole.

    Each rank scores its share; the figures are those of one process, digit for digit.
    numbers: (n,) when a rank holds its own queries (n, D) alone: which they are among all; a number
    that comes twice, on one rank or on two, counts once. None: every rank holds all queries.
    positives, exclude (see search()): of all queries.
    Raises UserError on every rank when a query is missing or not finite, or none has a positive.
    """
    if numbers is None:
        _check_sizes(len(queries), gallery, positives)
        queries, numbers = (
            rows[world.rank :: world.size] for rows in (queries, torch.arange(len(queries)))
        )
    _check_sizes(len(positives), gallery, positives)
    queries, numbers = _counted_once(queries, numbers, len(positives), world)
    left_out = None if exclude is None else exclude.cpu()[numbers]
    deepest = max((*recall_at, *map_at))
    scores, indices = search(queries, gallery, deepest, exclude=left_out)
    scores, indices = scores.cpu(), indices.cpu()
    mine = positives.of(numbers)
    hits, counts = mine.hits(indices), mine.counts(left_out)
    values = per_query(hits, counts, recall_at, map_at)
    metrics, count = _means(values, world)
    without = _joined(numbers[counts == 0].tolist(), world)
    if not count:
        raise UserError(
            f"none of the {len(without)} queries has a relevant row in the gallery: check that "
            "both name their items the same way"
        )
    return Retrieval(metrics, count, without, numbers, scores, indices, hits, values)


def _counted_once(
    queries: Tensor, numbers: Tensor, total: int, world: World
) -> tuple[Tensor, Tensor]:
    """This rank's queries without those that come earlier too, and their numbers on the CPU."""
    shares = distributed.gather_objects(numbers.cpu(), world)
    own = first_occurrences(shares, total, "query")[world.rank]
    if not own.all():  # else spare the copy
        queries, numbers = queries[own.to(queries.device)], numbers[own.to(numbers.device)]
    numbers = numbers.cpu()
    refuse_rows("query", _joined(numbers[non_finite_rows(queries)].tolist(), world))
    return queries, numbers


def _joined(numbers: list[int], world: World) -> list[int]:
    """The numbers of all ranks, ascending."""
    return sorted(number for part in distributed.gather_objects(numbers, world) for number in part)


def _check_sizes(num_queries: int, gallery: Tensor, positives: Positives) -> None:
    if (num_queries, len(gallery)) != (len(positives), positives.num_gallery):
        raise ValueError(
            f"{num_queries} queries and {len(gallery)} gallery rows, but positives of "
            f"{len(positives)} and {positives.num_gallery}"
        )


def _means(values: dict[str, Tensor], world: World) -> tuple[dict[str, float], int]:
    """The means over the queries of all ranks that have a value, and how many those are."""
    table = torch.stack(list(values.values()))
    table = table[:, ~table[0].isnan()]
    units = (table * _FRACTION).round().long().sum(1)
    units = torch.cat([units, torch.tensor([table.shape[1]])])
    *sums, count = distributed.total(units, world).tolist()
    means = {
        name: part / _FRACTION / max(1, count) for name, part in zip(values, sums, strict=True)
    }
    return means, count
