"""Face verification as in LFW: ten-fold accuracy, TAR at FAR, ROC and the area under it.

N pairs, D embedding width. A pair is accepted as one person when its squared distance is strictly
below a threshold. FAR is the share of the pairs of two people that are accepted, TAR the share of
the pairs of one person.

Two figures of TAR at FAR exist. The headline is `tar_at_far`: the exact value on the whole set,
whose FAR is at most the one asked for. `ten_fold_tar_at_far` is the protocol of insightface's
validate: a threshold is set on nine folds and tried on the tenth, whose FAR is what it happens to
be. Of N pairs of two people FAR moves in steps of 1 / N: LFW has 3000, so 1e-3 means 3 pairs, and
1e-4 means none. What lies below one pair is not a number, here either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from face_distill.distill.pairs import FOLDS, Pairs, PairSet, check_kinds, decode, fold_numbers
from shared.errors import UserError, one_line
from shared.files import check_regular

# Squared distances of unit vectors lie in 0 … 4.
THRESHOLDS = np.arange(0, 4, 0.01)
FAR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4)
EVERY_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accuracy:
    """Verification accuracy over folds, each judged at the threshold best on the other folds."""

    mean: float
    std: float
    folds: list[float]
    thresholds: list[float]  # squared distance below which a pair counts as one person
    threshold: float  # the lowest that is best on all pairs: the one to use on other faces


def flip_embeddings(
    embed: Callable[[Tensor], Tensor],
    images: Sequence[bytes],
    batch_size: int = 128,
    name: str = "",
) -> Tensor:
    """Unit embeddings (N, D) on the CPU: of each image plus of its mirror image, float32.

    embed: uint8 images (B, 3, H, W) → embeddings (B, D); it normalises, resizes and moves them.
    images: encoded; decoded a batch at a time. name: of the set, for a log line every ten seconds.
    """
    batches = []
    began = shown_at = time.monotonic()
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = decode(images[start : start + batch_size], start)
            batches.append((embed(batch).float() + embed(batch.flip(-1)).float()).cpu())
            if time.monotonic() - shown_at >= EVERY_SECONDS:
                shown_at = time.monotonic()
                done = start + len(batch)
                speed = done / (shown_at - began)
                log.info("%s: %d of %d images, %.4g a second", name, done, len(images), speed)
    return torch.nn.functional.normalize(torch.cat(batches))


def verify(embed: Callable[[Tensor], Tensor], pairs: Pairs, batch_size: int = 128) -> Accuracy:
    """Ten-fold accuracy on `pairs` of the `flip_embeddings` that `embed` gives.

    embed: uint8 images (B, 3, H, W) → embeddings (B, D).
    """
    embeddings = flip_embeddings(embed, pairs.images, batch_size, "verification").numpy()
    return accuracy_of(pair_distances(embeddings), pairs.same)


def accuracy_of(distances: NDArray[Any], same: NDArray[Any], folds: int = FOLDS) -> Accuracy:
    """Accuracy of "one person if the squared distance is below a threshold", over `folds` folds.

    distances: squared, of unit embeddings, (N,), 0 … 4. same: (N,) bool.
    Folds are contiguous; a fold is judged at the lowest of the thresholds 0, 0.01 … 3.99 that are
    best on the other folds. One histogram of the distances a fold answers all thresholds at once.
    Raises UserError for fewer pairs than folds.
    Source: the protocol of Huang et al. 2007 (LFW, view 2), in the form of insightface.
    """
    same = np.asarray(same, dtype=bool)
    fold_of = fold_numbers(len(same), folds)
    correct = _correct_at_thresholds(distances, same, fold_of, folds)
    best = (correct.sum(0) - correct).argmax(1)  # argmax gives the first, the lowest threshold
    accuracies = correct[np.arange(folds), best] / np.bincount(fold_of)
    return Accuracy(
        mean=float(accuracies.mean()),
        std=float(accuracies.std()),
        folds=accuracies.tolist(),
        thresholds=THRESHOLDS[best].tolist(),
        threshold=float(THRESHOLDS[correct.sum(0).argmax()]),
    )


def squared_distances(embeddings_a: NDArray[Any], embeddings_b: NDArray[Any]) -> NDArray[Any]:
    """Squared distances (N,) between the rows of two (N, D) arrays, each brought to unit length.

    Raises UserError when an embedding is not finite.
    """
    a, b = (np.asarray(rows, dtype=np.float64) for rows in (embeddings_a, embeddings_b))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("the model gives embeddings that are not finite: it has diverged")
    return np.square(_unit(a) - _unit(b)).sum(1)


def pair_distances(embeddings: NDArray[Any]) -> NDArray[Any]:
    """`squared_distances` (N,) of the first and second of N pairs in turn, (2 N, D)."""
    return squared_distances(embeddings[0::2], embeddings[1::2])


def stored_distances(path: Path, sets: Sequence[PairSet]) -> dict[str, NDArray[Any]]:
    """A teacher known by its embeddings alone, read now.

    path: a directory with <set>.npy, for example lfw.npy, or the .npy file of the only set. Row i,
    (2 N, D), is the embedding of image i of the set's file.
    Raises UserError for rows that do not fit their set, and when no set has a file.
    """
    if not path.is_dir() and len(sets) > 1:
        raise UserError(
            f"--teacher {path} is one file for {len(sets)} sets: give the directory of "
            f"{', '.join(f'{pair_set.name}.npy' for pair_set in sets)}"
        )
    files = {s.name: path / f"{s.name}.npy" if path.is_dir() else path for s in sets}
    known = [s for s in sets if files[s.name].exists()]
    if not known:
        raise UserError(f"--teacher {path} holds none of {', '.join(f'{n}.npy' for n in files)}")
    return {s.name: _distances_of_rows(files[s.name], s) for s in known}


def _distances_of_rows(path: Path, pair_set: PairSet) -> NDArray[Any]:
    try:
        check_regular(path)
        rows = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # a damaged array fails in any of a dozen ways, none of them a bug
        raise UserError(f"{path} is cut off or no array: {one_line(error)}") from error
    wanted = f"({pair_set.num_images}, D) floating-point numbers"
    if rows.ndim != 2 or rows.dtype.kind != "f" or len(rows) != pair_set.num_images:
        raise UserError(
            f"{path} holds {rows.dtype} {rows.shape}: expected {wanted}, one row for each image "
            f"of {pair_set.path}"
        )
    finite = np.isfinite(rows).all(1)
    if not (rows.shape[1] and finite.all()):
        raise UserError(f"{path}: row {int(finite.argmin())} is empty, NaN or infinity")
    return pair_distances(rows[pair_set.image_numbers])


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(lengths, np.finfo(np.float64).tiny)


def _correct_at_thresholds(
    distances: NDArray[Any], same: NDArray[np.bool_], fold_of: NDArray[Any], folds: int
) -> NDArray[np.int64]:
    """How many pairs of each fold are judged rightly at each threshold: (folds, thresholds)."""
    # The first threshold that a distance is strictly below; from there on the pair counts as same.
    first = np.searchsorted(THRESHOLDS, distances, side="right")
    columns = len(THRESHOLDS) + 1
    flat = fold_of * columns + first

    def accepted(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        counts = np.bincount(flat[chosen], minlength=folds * columns).reshape(folds, columns)
        return counts[:, :-1].cumsum(1)

    num_different = np.bincount(fold_of[~same], minlength=folds)[:, None]
    return accepted(same) + num_different - accepted(~same)


# --- true accepts at few false ones ---------------------------------------------------------------


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
    from sklearn.metrics import roc_curve

    split_kinds(distances, same)
    far, tar, _ = roc_curve(same, -np.asarray(distances, np.float64), drop_intermediate=False)
    return Roc(far, tar)


def auc(distances: NDArray[Any], same: NDArray[Any]) -> float:
    """The probability that a pair of one person is nearer than one of two; ties count half.

    distances: (N,). same: (N,) bool. Equals the area under `roc`.
    Raises UserError unless there are pairs of both kinds.
    Source: the statistic of Mann & Whitney 1947.
    """
    from sklearn.metrics import roc_auc_score

    split_kinds(distances, same)
    return float(roc_auc_score(same, -np.asarray(distances, np.float64)))


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
    folds: int = FOLDS,
) -> list[FoldedTarAtFar]:
    """TAR of each fold at the threshold of `tar_at_far` on the other folds: mean and deviation.

    distances: (N,). same: (N,) bool. Folds are those of `accuracy_of`; one
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
    Raises UserError unless there are pairs of both kinds.
    """
    distances, same = np.asarray(distances, np.float64), np.asarray(same, dtype=bool)
    check_kinds(same)
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


# --- all of them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """How one model does on one set."""

    accuracy: Accuracy
    auc: float
    tar_at_far: list[TarAtFar]  # the headline: exact, on the whole set
    folded_tar_at_far: list[FoldedTarAtFar]
    curve: Roc


def judge(distances: NDArray[np.float64], same: NDArray[np.bool_]) -> Figures:
    """All figures of one model on one set. distances: squared, of unit embeddings, (N,)."""
    return Figures(
        accuracy=accuracy_of(distances, same),
        auc=auc(distances, same),
        tar_at_far=tar_at_far(distances, same),
        folded_tar_at_far=ten_fold_tar_at_far(distances, same),
        curve=roc(distances, same),
    )
