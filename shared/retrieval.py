"""Exact retrieval: nearest gallery rows by cosine, Recall@k and mAP@k, on any number of ranks.

A float32 product of matrices gives other last digits for another number of rows, threads or kind
of device, and no order among equal scores, so it cannot decide a ranking alone. Here it only names
candidates, with the rounding error that it can have at most; these are scored once more without
any error. Unit rows are multiples of 2^-26: their products are multiples of 2^-52 and every partial
sum lies below 2, so float64 holds each sum exactly, in whatever order it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from shared import distributed
from shared.distributed import World
from shared.errors import UserError

RECALL_AT = (1, 10, 20, 30, 40)
MAP_AT = (10,)

_GRID = 2.0**26
_SLACK = 8  # candidates beyond k: enough that rows which need more are rare
_BLOCK = 1 << 23  # elements of a temporary array
_CACHED = 1 << 17  # the same where it pays to stay in a core's cache
_FRACTION = 2.0**40  # precision values are summed as integers of this unit: any order, one sum


@torch.no_grad()
def search(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    exclude: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine scores (Q, k) float32 and gallery rows (Q, k) int64 of every query, best first.

    queries: (Q, D), gallery: (G, D), on one device, of any length; a row of zeros scores 0.
    exclude: (Q,) the gallery row that a query must not find (itself), -1 for none.
    chunk: queries at once; memory grows with chunk · G, and nothing else changes.
    Equal scores stand by ascending gallery row. Where fewer than k rows can be found, the rest is
    -1 with score -inf. Rows are rounded to unit length with components that are multiples of 2^-26,
    and their scores are exact: the same digits for any chunk, number of threads and device.
    Raises UserError for an empty gallery and for rows with NaN or inf.
    """
    _check(queries, gallery, k, exclude)
    units = unit_rows(gallery)
    width = min(k, len(gallery))
    rows = chunk or max(16, _BLOCK // max(gallery.shape))
    scores = torch.full((len(queries), k), -torch.inf, device=queries.device)
    indices = torch.full((len(queries), k), -1, device=queries.device)
    with _ieee_float32(queries.device.type):
        for start in range(0, len(queries), rows):
            part = slice(start, start + rows)
            own = None if exclude is None else exclude[part].to(queries.device)
            found = _nearest(unit_rows(queries[part]), units, width, own)
            scores[part, :width], indices[part, :width] = found
    indices[scores == -torch.inf] = -1
    return scores, indices


def _check(queries: Tensor, gallery: Tensor, k: int, exclude: Tensor | None) -> None:
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        shapes = f"{tuple(queries.shape)} and {tuple(gallery.shape)}"
        raise ValueError(f"queries and gallery have shapes {shapes}, expected (Q, D) and (G, D)")
    if k < 1:
        raise ValueError(f"k is {k}, expected 1 or more")
    if exclude is not None and exclude.shape != queries.shape[:1]:
        shape = tuple(exclude.shape)
        raise ValueError(f"exclude has shape {shape}, expected one row a query: ({len(queries)},)")
    if exclude is not None and bool((exclude >= len(gallery)).any()):
        raise ValueError(f"exclude names row {int(exclude.max())} of {len(gallery)} gallery rows")
    if not len(gallery):
        raise UserError("the gallery is empty: there is nothing to retrieve; check the data set")
    for name, rows in (("query", queries), ("gallery", gallery)):
        refuse_rows(name, non_finite_rows(rows))


def non_finite_rows(rows: Tensor) -> list[int]:
    """The numbers of the rows of (N, D) that hold NaN or inf."""
    blocks = rows.split(_block_rows(rows))
    bad = torch.cat([~block.float().isfinite().all(1) for block in blocks])
    return bad.nonzero().flatten().tolist()


def refuse_rows(name: str, bad: Sequence[int]) -> None:
    """Raise UserError when there are rows with NaN or inf; name: "query" or "gallery"."""
    if bad:
        raise UserError(
            f"{name} row {_some(bad)}: the embedding holds NaN or inf; look at that sample, and "
            "whether the model's weights are finite (a diverged run, an overflow in fp16)"
        )


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:5])
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"


def _block_size(rows: Tensor) -> int:
    return _CACHED if rows.device.type == "cpu" else _BLOCK


def _block_rows(rows: Tensor) -> int:
    return max(1, _block_size(rows) // max(1, math.prod(rows.shape[1:])))


def unit_rows(rows: Tensor) -> Tensor:
    """`rows` (N, D) at unit length, float32, every component the nearest multiple of 2^-26.

    A component moves by 2^-27 at most, a cosine by some 1e-8: less than a float32 product errs.
    Only element-wise steps and sums in a fixed order, so the digits depend on the row alone.
    """
    result = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    step = _block_rows(rows)
    for part, block in zip(result.split(step), rows.split(step), strict=True):
        wide = block.float().double()  # squares of float32 are exact in float64
        length = _sum_in_pairs(wide.square()).sqrt_().clamp_(min=torch.finfo(torch.float64).tiny)
        part.copy_(wide.div_(length).mul_(_GRID).round_().div_(_GRID))
    return result


def _sum_in_pairs(values: Tensor) -> Tensor:
    """The sums (N, 1) of the rows of (N, D), halving the row at every step."""
    width = values.shape[1]
    values = pad(values, (0, (1 << max(0, width - 1).bit_length()) - width))
    while values.shape[1] > 1:
        left, right = values.chunk(2, dim=1)
        values = left + right
    return values


@contextmanager
def _ieee_float32(device_type: str) -> Iterator[None]:
    """No autocast, TF32 or bfloat16 inside float32 products, whatever the program has set."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _nearest(
    queries: Tensor, gallery: Tensor, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """search() of unit rows, all queries at once, k at most the rows of the gallery.

    A float32 score is off by _product_error() at most, so the true k nearest lie no further than
    twice that below the k-th best of these scores. None of them is missed among the candidates
    when the last candidate lies further below; else every row of the gallery is looked at.
    """
    approximate = queries @ gallery.T
    if exclude is not None:
        rows = (exclude >= 0).nonzero().flatten()
        approximate[rows, exclude[rows]] = -torch.inf
    best, found = approximate.topk(min(k + _SLACK, len(gallery)))
    best = best.double()
    found = found.sort(1).values
    scores, indices = _in_order(_exact_scores(queries, gallery, found), found, k, exclude)
    if best.shape[1] < len(gallery):
        open_rows = best[:, -1] >= best[:, k - 1] - 2 * _product_error(queries.shape[1])
        for rows in open_rows.nonzero().flatten().split(max(1, _BLOCK // 4 // len(gallery))):
            own = None if exclude is None else exclude[rows]
            scores[rows], indices[rows] = _nearest_of_all(queries[rows], gallery, k, own)
    return scores, indices


def _product_error(width: int) -> float:
    """How far a float32 dot product of two unit rows of `width` may be off, in any order of sums.

    Source: Higham, Accuracy and Stability of Numerical Algorithms (2002), eq. 3.5, with
    |x|·|y| <= |x| |y| = 1 for the sum of the magnitudes; 1 % more for the lengths' rounding.
    """
    return 1.01 * width * 2.0**-24 / (1 - width * 2.0**-24) if width < 2**23 else torch.inf


def _exact_scores(queries: Tensor, gallery: Tensor, found: Tensor) -> Tensor:
    """Exact scores (Q, C) float64 of unit rows with the gallery rows `found` (Q, C)."""
    step = max(1, _block_size(queries) // (found.shape[1] * queries.shape[1]))
    # One result, not a list of parts: kept between the large temporaries, small parts would split
    # the memory that these free, and the process would grow by hundreds of MB.
    scores = torch.empty(found.shape, dtype=torch.float64, device=found.device)
    for part, rows, query in zip(
        scores.split(step), found.split(step), queries.split(step), strict=True
    ):
        picked = gallery.index_select(0, rows.flatten()).double().view(*rows.shape, -1)
        part.copy_(torch.bmm(picked, query.double().unsqueeze(2)).squeeze(2))
    return scores


def _in_order(
    scores: Tensor, found: Tensor, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k best by (score, lower row first); `found` must ascend, for the sort is stable."""
    if exclude is not None:
        scores = scores.masked_fill(found == exclude.unsqueeze(1), -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k].float(), found.gather(1, order[:, :k])


def _nearest_of_all(
    queries: Tensor, gallery: Tensor, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """_nearest() with every row of the gallery a candidate: for many (nearly) equal scores."""
    wide, step = queries.double(), max(1, _BLOCK // 4 // gallery.shape[1])
    scores = torch.empty(len(queries), len(gallery), dtype=torch.float64, device=gallery.device)
    for part, block in zip(scores.split(step, 1), gallery.split(step), strict=True):
        part.copy_(wide @ block.double().T)
    if exclude is not None:
        rows = (exclude >= 0).nonzero().flatten()
        scores[rows, exclude[rows]] = -torch.inf
    last = scores.topk(k).values[:, -1:]
    above, level = scores > last, scores == last
    vacant = k - above.sum(1, keepdim=True)
    chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= vacant))
    found = chosen.nonzero()[:, 1].view(-1, k)
    return _in_order(scores.gather(1, found), found, k, exclude)


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
        raise ValueError(f"depth {_some(wrong)} is outside 1 to {hits.shape[1]}, what was searched")
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
    exclude: Tensor | None = None,
    recall_at: Sequence[int] = RECALL_AT,
    map_at: Sequence[int] = MAP_AT,
) -> Retrieval:
    """Recall@k and mAP@k of `queries` (Q, D) in `gallery` (G, D); every rank holds all of both.

    Each rank scores its share; the figures are those of one process, digit for digit.
    Arguments and errors else as evaluate_share().
    """
    _check_sizes(len(queries), gallery, positives)
    own, numbers = (
        rows[world.rank :: world.size] for rows in (queries, torch.arange(len(queries)))
    )
    options = {"recall_at": recall_at, "map_at": map_at}
    return evaluate_share(own, numbers, gallery, positives, world, exclude=exclude, **options)


def evaluate_share(
    queries: Tensor,
    numbers: Tensor,
    gallery: Tensor,
    positives: Positives,
    world: World,
    *,
    exclude: Tensor | None = None,
    recall_at: Sequence[int] = RECALL_AT,
    map_at: Sequence[int] = MAP_AT,
) -> Retrieval:
    """Recall@k and mAP@k when every rank holds the whole gallery and its own queries.

    queries: (n, D) of this rank. numbers: (n,) which they are among all; a number that comes twice,
    on one rank or on two, counts once. positives, exclude (see search()): of all queries.
    Raises UserError on every rank when a query is missing or not finite, or none has a positive.
    """
    _check_sizes(len(positives), gallery, positives)
    shares = distributed.gather_objects(numbers.cpu(), world)
    own = _first_occurrences(shares, len(positives), "query")[world.rank]
    if not own.all():  # else spare the copy
        queries, numbers = queries[own.to(queries.device)], numbers[own.to(numbers.device)]
    numbers = numbers.cpu()
    bad = distributed.gather_objects(numbers[non_finite_rows(queries)].tolist(), world)
    refuse_rows("query", sorted(number for part in bad for number in part))
    left_out = None if exclude is None else exclude.cpu()[numbers]
    deepest = max((*recall_at, *map_at))
    scores, indices = search(queries, gallery, deepest, exclude=left_out)
    scores, indices = scores.cpu(), indices.cpu()
    mine = positives.of(numbers)
    hits = mine.hits(indices)
    values = per_query(hits, mine.counts(left_out), recall_at, map_at)
    metrics, count = _means(values, world)
    lacking = numbers[mine.counts(left_out) == 0].tolist()
    without = sorted(
        number for part in distributed.gather_objects(lacking, world) for number in part
    )
    if not count:
        raise UserError(
            f"none of the {len(without)} queries has a relevant row in the gallery: check that "
            "both name their items the same way"
        )
    return Retrieval(metrics, count, without, numbers, scores, indices, hits, values)


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


def gather_rows(local_rows: Tensor, local_indices: Tensor, total: int, world: World) -> Tensor:
    """The `total` rows that the ranks have computed, by index, on every rank: (total, …).

    local_rows: (n, …) of this rank; n may differ. local_indices: (n,) their places. A row that came
    twice (a sampler's padding) is taken once, from the lowest rank. The result lies where
    local_rows lies; beside it, memory holds one rank's rows.
    Raises UserError on every rank when a row is missing; ValueError for rows that do not fit.
    """
    local_rows, indices = local_rows.detach(), local_indices.cpu()
    layout = (tuple(local_rows.shape), local_rows.dtype)
    everyone = distributed.gather_objects((layout, indices), world)
    shape, dtype = _common_layout([(*own, len(places)) for own, places in everyone])
    shares = [places for _, places in everyone]
    kept = _first_occurrences(shares, total, "row")
    result = torch.empty(total, *shape, dtype=dtype, device=local_rows.device)
    for rank, (places, first) in enumerate(zip(shares, kept, strict=True)):
        if rank == world.rank:
            part = local_rows[first.to(local_rows.device)].to(world.device)
        else:
            part = torch.empty(int(first.sum()), *shape, dtype=dtype, device=world.device)
        if world.size > 1 and len(part):
            dist.broadcast(part, src=rank)
        result[places[first].to(result.device)] = part.to(result.device)
    return result


def _common_layout(
    layouts: Sequence[tuple[tuple[int, ...], torch.dtype, int]],
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape of one row and dtype, which all ranks that have rows must share."""
    for shape, _, num_indices in layouts:
        if not shape or shape[0] != num_indices:
            raise ValueError(f"rows of shape {shape} come with {num_indices} indices")
    found = {(shape[1:], dtype) for shape, dtype, num in layouts if num}
    if len(found) > 1:
        raise ValueError(f"the ranks' rows differ in shape or dtype: {sorted(map(str, found))}")
    return found.pop() if found else (layouts[0][0][1:], layouts[0][1])


def _first_occurrences(shares: Sequence[Tensor], total: int, name: str) -> list[Tensor]:
    """For each share's numbers which of them occur there for the first time of all, bool.

    Raises UserError unless every number below `total` occurs, ValueError for one outside.
    """
    numbers = torch.cat([share.long() for share in shares])
    outside = numbers[(numbers < 0) | (numbers >= total)].tolist()
    if outside:
        raise ValueError(f"{name} number {_some(outside)} is outside 0 to {total - 1}")
    places = torch.arange(len(numbers))
    first = torch.full((total,), len(numbers)).scatter_reduce(0, numbers, places, "amin")
    missing = (first == len(numbers)).nonzero().flatten().tolist()
    if missing:
        raise UserError(
            f"{len(missing)} of {total} are on no rank ({name} {_some(missing)}): every sample "
            "must be computed; look for samples that the loader left out"
        )
    return list((first[numbers] == places).split([len(share) for share in shares]))
