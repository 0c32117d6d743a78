"""What several models make of several verification sets: the pairs, the distances, the figures.

N pairs, D embedding width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from face_distill.distill import model, verification
from face_distill.distill.pair_files import Pairs, read_pairs
from face_distill.distill.verification import Accuracy
from shared.errors import UserError, one_line
from shared.files import check_regular
from shared.images import printable

FOLDS = 10
UNTRAINED, STUDENT, TEACHER = "untrained student", "student", "teacher"  # the order of the table
EVERY_SECONDS = 10.0

log = logging.getLogger(__name__)

Embed = Callable[[Tensor], Tensor]  # uint8 images (B, 3, H, W) → embeddings (B, D)


@dataclass(frozen=True)
class PairSet:
    """The pairs of one file that are judged, each of their images known to be whole."""

    name: str
    path: Path
    pairs: Pairs
    image_numbers: NDArray[np.int64]  # (2 N,): which images of the file `pairs.images` are
    num_images: int  # in the file


@dataclass(frozen=True)
class Figures:
    """How one model does on one set."""

    accuracy: Accuracy
    auc: float
    tar_at_far: list[verification.TarAtFar]  # the headline: exact, on the whole set
    folded_tar_at_far: list[verification.FoldedTarAtFar]
    curve: verification.Roc


Distances = Callable[[PairSet], NDArray[np.float64] | None]  # squared (N,); None: knows not the set
Results = dict[str, dict[str, Figures]]  # of each set's name, of each model


# --- the pairs ------------------------------------------------------------------------------------


def read_set(path: Path, limit: int | None = None) -> PairSet:
    """The pairs in `path`, or `limit` of them: of each kind its share, spread over the file.

    Every image is decoded once. Raises UserError for a file that `read_pairs` refuses,
    a broken image (by its number in the file), too few pairs for ten folds, and pairs of one kind
    alone.
    """
    pairs = read_pairs(path)
    try:
        verification.split_kinds(np.zeros(len(pairs.same)), pairs.same)
        chosen = _spread(pairs.same, limit or len(pairs.same))
        verification.fold_numbers(len(chosen), FOLDS)
        numbers = np.stack((2 * chosen, 2 * chosen + 1), 1).ravel()
        images = [pairs.images[number] for number in numbers]
        _check_images(images, numbers)
    except UserError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    kept = Pairs(images, pairs.same[chosen])
    return PairSet(printable(path.stem), path, kept, numbers, 2 * len(pairs.same))


def _spread(same: NDArray[np.bool_], limit: int) -> NDArray[np.int64]:
    """Which `limit` pairs to keep, ascending.

    LFW has 300 pairs of one person, 300 of two, and so on: its first hundred, and every 600th, are
    all of one kind.
    """
    if limit >= len(same):
        return np.arange(len(same))
    num_same = min(max(round(limit * same.mean()), 1), limit - 1)
    kinds = ((np.flatnonzero(same), num_same), (np.flatnonzero(~same), limit - num_same))
    chosen = [pairs[np.arange(number) * len(pairs) // number] for pairs, number in kinds]
    return np.sort(np.concatenate(chosen))


def _check_images(images: Sequence[bytes], numbers: NDArray[np.int64]) -> None:
    sizes = set()
    for image, number in zip(images, numbers.tolist(), strict=True):
        height, width = verification.decode([image], number).shape[2:]
        sizes.add((width, height))
        if len(sizes) > 1:
            raise UserError(f"image {number} has another size than those before: {sorted(sizes)}")


# --- the models -----------------------------------------------------------------------------------


def student_distances(
    tower: Path, checkpoint: Path, device: torch.device, amp: str, batch_size: int, *, tuned: bool
) -> Distances:
    """The student of `checkpoint`, opened now; without its adapters unless `tuned`.

    Raises UserError when a file is missing or damaged, or the tower is not the checkpoint's.
    """
    student = model.open_student(
        tower,
        checkpoint if tuned else None,
        image_size=model.stored_image_size(checkpoint),
    )
    embed = model.FaceEmbedder(student, device, amp)
    return lambda pair_set: embedded_distances(embed, pair_set, batch_size)


def check_checkpoint(checkpoint: Path) -> None:
    """Raise UserError when there are no adapters in `checkpoint`; quick, without the tower."""
    model.adapter_shape(model.read_trained(checkpoint), checkpoint)


def teacher_distances(
    path: Path, arch: str, sets: Sequence[PairSet], device: torch.device, batch_size: int
) -> Distances:
    """The teacher in `path`: its embeddings (a directory, a .npy file) or a network's weights."""
    if path.is_dir() or path.suffix == ".npy":
        return stored_distances(path, sets)
    return network_distances(path, arch, device, batch_size)


def network_distances(path: Path, arch: str, device: torch.device, batch_size: int) -> Distances:
    """The teacher in a weight file, opened now, in float32. Raises UserError for a wrong file."""
    from face_distill.distill.teacher_networks import open_teacher

    teacher = open_teacher(path, arch).to(device)
    return lambda pair_set: embedded_distances(
        lambda images: teacher(images.to(device))[0], pair_set, batch_size
    )


def stored_distances(path: Path, sets: Sequence[PairSet]) -> Distances:
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
    distances = {s.name: _distances_of_rows(files[s.name], s) for s in sets}
    if all(found is None for found in distances.values()):
        raise UserError(f"--teacher {path} holds none of {', '.join(f'{n}.npy' for n in files)}")
    return lambda pair_set: distances[pair_set.name]


def _distances_of_rows(path: Path, pair_set: PairSet) -> NDArray[np.float64] | None:
    if not path.exists():
        return None
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
    chosen = rows[pair_set.image_numbers]
    return verification.squared_distances(chosen[0::2], chosen[1::2])


def embedded_distances(
    embed: Embed, pair_set: PairSet, batch_size: int = 128
) -> NDArray[np.float64]:
    """Squared distances (N,) of the `verification.flip_embeddings` that `embed` gives."""
    images = pair_set.pairs.images
    embeddings = verification.flip_embeddings(_reporting(embed, pair_set), images, batch_size)
    rows = embeddings.numpy()
    return verification.squared_distances(rows[0::2], rows[1::2])


def _reporting(embed: Embed, pair_set: PairSet) -> Embed:
    """`embed` with a log line every ten seconds; the real tower takes hours on a CPU."""
    began = shown_at = time.monotonic()
    done, total = 0, 2 * len(pair_set.pairs.images)

    def reporting(images: Tensor) -> Tensor:
        nonlocal shown_at, done
        embeddings = embed(images)
        done += len(images)
        now = time.monotonic()
        if now - shown_at >= EVERY_SECONDS:
            shown_at = now
            speed = done / (now - began)
            log.info("%s: %d of %d images, %.4g a second", pair_set.name, done, total, speed)
        return embeddings

    return reporting


# --- the figures ----------------------------------------------------------------------------------


def judge(distances: NDArray[np.float64], same: NDArray[np.bool_]) -> Figures:
    """All figures of one model on one set. distances: squared, of unit embeddings, (N,)."""
    return Figures(
        accuracy=verification.accuracy_of(distances, same, FOLDS),
        auc=verification.auc(distances, same),
        tar_at_far=verification.tar_at_far(distances, same),
        folded_tar_at_far=verification.ten_fold_tar_at_far(distances, same, folds=FOLDS),
        curve=verification.roc(distances, same),
    )


def compare(models: dict[str, Callable[[], Distances]], sets: Sequence[PairSet]) -> Results:
    """The figures of every model on every set it knows; `models` says how each is opened.

    One model is open at a time: two of the real tower take 8 GB. The rows of the table come in the
    order UNTRAINED, STUDENT, TEACHER, whatever the order of `models`.
    """
    found = {name: _judge_all(name, opened, sets) for name, opened in models.items()}
    order = [name for name in (UNTRAINED, STUDENT, TEACHER) if name in found]
    return {
        s.name: {name: found[name][s.name] for name in order if s.name in found[name]} for s in sets
    }


def _judge_all(
    name: str, opened: Callable[[], Distances], sets: Sequence[PairSet]
) -> dict[str, Figures]:
    distances_of = opened()
    figures = {}
    for pair_set in sets:
        try:
            distances = distances_of(pair_set)
        except UserError as error:
            raise UserError(f"{name} on {pair_set.name}: {one_line(error)}") from error
        if distances is None:
            log.warning("no embeddings of the %s for %s: it is left out there", name, pair_set.name)
            continue
        figures[pair_set.name] = judge(distances, pair_set.pairs.same)
        accuracy = figures[pair_set.name].accuracy
        log.info("%s on %s: accuracy %.4f", name, pair_set.name, accuracy.mean)
    return figures
