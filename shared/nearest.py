"""The nearest rows by cosine, exactly: the same digits for any chunk, threads and device.

A float32 product of matrices gives other last digits for another number of rows, threads or kind
of device, and no order among equal scores, so it cannot decide a ranking alone. Here it only names
candidates, with the rounding error that it can have at most; these are scored once more without
any error. Unit rows are multiples of 2^-26: their products are multiples of 2^-52 and every partial
sum lies below 2, so float64 holds each sum exactly, in whatever order it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

from shared.errors import UserError
from shared.rows_of_ranks import first_few

_GRID = 2.0**26
_SLACK = 8  # candidates beyond k: enough that rows which need more are rare
_BLOCK = 1 << 23  # elements of a temporary array
_CACHED = 1 << 17  # the same where it pays to stay in a core's cache


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
            f"{name} row {first_few(bad)}: the embedding holds NaN or inf; look at that sample, "
            "and whether the model's weights are finite (a diverged run, an overflow in fp16)"
        )


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
