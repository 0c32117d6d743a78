"""How many true pairs are accepted when few false ones may be: TAR at FAR, ROC, area under it.

A pair is accepted as one person when its squared distance is strictly below a threshold. FAR is the
share of the pairs of two people that are accepted, TAR the share of the pairs of one person.

Two figures of TAR at FAR exist. The headline is `tar_at_far`: the exact value on the whole set,
whose FAR is at most the one asked for. `ten_fold_tar_at_far` is the protocol of insightface's
validate: a threshold is set on nine folds and tried on the tenth, whose FAR is what it happens to
be. Of N pairs of two people FAR moves in steps of 1 / N: LFW has 3000, so 1e-3 means 3 pairs, and
1e-4 means none. What lies below one pair is not a number, here either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from face_distill.distill.verification import fold_numbers
from shared.errors import UserError

FAR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class TarAtFar:
    """TAR at the largest threshold whose FAR is at most `target`; None where no pair allows it."""

    target: float
    tar: float | None
    far: float | None  # what the threshold reaches
    threshold: float | None  # accepted is what is strictly below
    reason: str = ""  # why there is no number


@dataclass(frozen=True)
class FoldedTarAtFar:
    """Mean and deviation over folds of TAR, and mean FAR, at thresholds set on the other folds."""

    target: float
    tar: float | None
    tar_std: float | None
    far: float | None
    reason: str = ""


@dataclass(frozen=True)
class Roc:
    """The curve from (0, 0) to (1, 1), one point a distinct distance; (M,) each, ascending."""

    far: NDArray[np.float64]
    tar: NDArray[np.float64]


def roc(distances: NDArray[Any], same: NDArray[Any]) -> Roc:
    """FAR and TAR at every threshold that tells distances apart.

    distances: (N,), small for one person. same: (N,) bool.
    Raises UserError unless there are pairs of both kinds.
    """
    accepted, rejected = split_kinds(distances, same)
    thresholds = np.unique(np.concatenate((accepted, rejected)))
    counts = (np.searchsorted(kind, thresholds, side="right") for kind in (rejected, accepted))
    far, tar = (
        np.concatenate(([0.0], count / kind.size))
        for count, kind in zip(counts, (rejected, accepted), strict=True)
    )
    return Roc(far, tar)


def auc(distances: NDArray[Any], same: NDArray[Any]) -> float:
    """The probability that a pair of one person is nearer than one of two; ties count half.

    distances: (N,). same: (N,) bool. Equals the area under `roc`.
    Raises UserError unless there are pairs of both kinds.
    Source: the statistic of Mann & Whitney 1947.
    """
    of_one, of_two = split_kinds(distances, same)
    farther = of_two.size - np.searchsorted(of_two, of_one, side="right")
    not_nearer = of_two.size - np.searchsorted(of_two, of_one, side="left")
    return float((farther + not_nearer).sum() / (2 * of_one.size * of_two.size))


def tar_at_far(
    distances: NDArray[Any], same: NDArray[Any], targets: Sequence[float] = FAR_TARGETS
) -> list[TarAtFar]:
    """The exact TAR on all pairs at each FAR: the headline figure.

    distances: (N,). same: (N,) bool. targets: in (0, 1).
    Raises UserError unless there are pairs of both kinds.
    """
    of_one, of_two = split_kinds(distances, same)
    found = []
    for target in targets:
        threshold = _threshold(of_two, target)
        if threshold is None:
            found.append(TarAtFar(target, None, None, None, _unresolvable(target, of_two.size)))
            continue
        tar, far = _below(of_one, threshold), _below(of_two, threshold)
        found.append(TarAtFar(target, tar, far, threshold))
    return found


def ten_fold_tar_at_far(
    distances: NDArray[Any],
    same: NDArray[Any],
    targets: Sequence[float] = FAR_TARGETS,
    folds: int = 10,
) -> list[FoldedTarAtFar]:
    """TAR of each fold at the threshold of `tar_at_far` on the other folds: mean and deviation.

    distances: (N,). same: (N,) bool. Folds are those of `verification.ten_fold_accuracy`; one
    without pairs of a kind is left out of the mean of that kind.
    Raises UserError for fewer pairs than folds and unless there are pairs of both kinds.
    Source: the protocol of insightface's validate, with exact thresholds in place of interpolated.
    """
    split_kinds(distances, same)
    distances, same = np.asarray(distances), np.asarray(same, dtype=bool)
    fold_of = fold_numbers(len(same), folds)
    return [_folded(distances, same, fold_of, target) for target in targets]


def split_kinds(
    distances: NDArray[Any], same: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sorted distances of the pairs of one person, and of those of two.

    distances, same: (P,), numbers and whether a pair is of one person.
    Raises UserError unless there are pairs of both kinds, ValueError for lengths that differ.
    """
    distances, same = np.asarray(distances, np.float64), np.asarray(same, dtype=bool)
    if distances.shape != same.shape:
        raise ValueError(f"{distances.shape} distances, but {same.shape} flags")
    if same.all() or not same.any():
        raise UserError(
            f"{int(same.sum())} pairs of one person and {int((~same).sum())} of two: "
            "TAR and FAR need some of both; give more pairs"
        )
    return np.sort(distances[same]), np.sort(distances[~same])


def _folded(
    distances: NDArray[Any], same: NDArray[np.bool_], fold_of: NDArray[Any], target: float
) -> FoldedTarAtFar:
    tars, fars = [], []
    for fold in np.unique(fold_of):
        is_test = fold_of == fold
        of_two = np.sort(distances[~is_test & ~same])
        threshold = _threshold(of_two, target)
        if threshold is None:
            reason = _unresolvable(target, of_two.size) + " outside a fold"
            return FoldedTarAtFar(target, None, None, None, reason)
        tars.append(_below(np.sort(distances[is_test & same]), threshold))
        fars.append(_below(np.sort(distances[is_test & ~same]), threshold))
    tar, tar_std, far = np.nanmean(tars), np.nanstd(tars), np.nanmean(fars)
    return FoldedTarAtFar(target, float(tar), float(tar_std), float(far))


def _threshold(of_two: NDArray[np.float64], target: float) -> float | None:
    """The largest threshold that accepts at most this share; None when it allows not one pair."""
    # 0.29 * 100 is 28.999999999999996: a product that close to a whole number is meant to be it.
    allowed = int(target * of_two.size + 1e-9)
    # At the first distance that may not be accepted it is still rejected: below means strictly.
    return float(of_two[allowed]) if 1 <= allowed < of_two.size else None


def _below(ordered: NDArray[np.float64], threshold: float) -> float:
    """The share of these distances strictly below `threshold`; NaN of none at all."""
    if not ordered.size:
        return float("nan")
    return float(np.searchsorted(ordered, threshold, side="left") / ordered.size)


def _unresolvable(target: float, count: int) -> str:
    return f"FAR {target:g} is less than one of the {count} pairs of two people"
