"""The teacher's stored features: one row an image, aligned with the images of a FaceDataset.

teacher_embedding.npy   (N, D) float16, float32 or float64
teacher_feat_map.npy    (N, 49), (N, 7, 7): a probability over the picture; or
                        (N, C, H, W), (N, H*W, C): features, H = W in the second form
teacher_labels.npy      optional: (N,) whole numbers, who is on each image
manifest.json           optional: "map", "selection", "selection_sha256"
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from face_distill.distill.images import number_by_appearance
from shared.errors import UserError, one_line
from shared.files import (
    check_regular,
    move_aside,
    open_regular,
    read_json,
    read_object,
    remove_stale_temporaries,
    write_atomic,
    write_json,
)
from shared.settings import differing

EMBEDDING, MAP = "teacher_embedding.npy", "teacher_feat_map.npy"
LABELS, MANIFEST = "teacher_labels.npy", "manifest.json"
UNFINISHED = "unfinished.json"  # beside the arrays while they are being extracted
KINDS = ("probability", "features")
_KNOWN = ("map", "selection", "selection_sha256")  # of the manifest
_CHUNK_BYTES = 64 * 1024 * 1024
_SUM_TOLERANCE = {2: 5e-3, 4: 1e-3, 8: 1e-3}  # by bytes a number: rounding of 49 numbers
_HOW = "put the folder teacher_features_12k there, or make it with extract_teacher.py"
_SHAPES = {
    EMBEDDING: "(N, D) numbers",
    MAP: "(N, 49), (N, 7, 7), (N, C, H, W) or (N, H*W, C) numbers",
    LABELS: "(N,) whole numbers",
}

log = logging.getLogger(__name__)


class Aligned(Protocol):
    """What `check_alignment` needs of a data set."""

    root: Path
    labels: np.ndarray

    def __len__(self) -> int: ...

    def selection_sha256(self) -> str:
        """What tells this selection of images from another."""
        ...


class TeacherFeatures:
    """Embeddings and maps by row, memory-mapped.

    `kind` is "probability" when no map is negative and each sums to 1, "features" otherwise.
    `map_shape` is (H, W) for probabilities, (C, H, W) for features; `dim` is D.
    Raises UserError, naming the file, what is expected and how to get it, for a file that is
    missing, cut off, of another shape or type, for rows with NaN or infinity, and for an
    extraction that has not finished.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        if self._has(UNFINISHED):
            raise UserError(
                f"{self.directory} is an extraction that was not finished "
                f"({read_object(self.directory / UNFINISHED).get('rows', 0)} rows so far): type "
                "its extract_teacher.py command again, it continues"
            )
        self._embeddings = self._open(EMBEDDING, "f", (2,))
        self._maps = self._open(MAP, "f", (2, 3, 4))
        self.labels = self._open(LABELS, "iu", (1,)) if self._has(LABELS) else None
        self.manifest = self._read_manifest()
        self._check_lengths()
        _survey(self.directory / EMBEDDING, self._embeddings)
        self.kind = self._find_kind()
        self.map_shape = self._find_map_shape()
        self.dim = int(self._embeddings.shape[1])

    def __len__(self) -> int:
        return len(self._embeddings)

    def rows(self, indices: Tensor | np.ndarray | list[int]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) and maps (B, H, W) or (B, C, H, W) of these images, float32, copies."""
        chosen = np.asarray(indices)
        embeddings = np.array(self._embeddings[chosen], np.float32)
        maps = np.array(self._maps[chosen], np.float32)
        if self.kind == "features" and maps.ndim == 3:  # tokens: channels last
            maps = np.ascontiguousarray(maps.transpose(0, 2, 1))
        shaped = maps.reshape(len(chosen), *self.map_shape)
        return torch.from_numpy(embeddings), torch.from_numpy(shaped)

    def check_alignment(self, dataset: Aligned) -> None:
        """Raise UserError, naming both sides, unless row i belongs to image i of `dataset`.

        Compared: the number of rows; who is on each image, whatever the numbering, when there is
        teacher_labels.npy; the selection's SHA-256 when the manifest has one.
        """
        if len(self) != len(dataset):
            raise UserError(
                f"{self.directory / EMBEDDING} has {len(self)} rows, {dataset.root} gives "
                f"{len(dataset)} images: select as many images, or extract the teacher's features "
                "again with extract_teacher.py"
            )
        self._check_labels(dataset)
        stored, found = self.manifest.get("selection_sha256"), dataset.selection_sha256()
        if stored is not None and stored != found:
            raise UserError(
                f"{self.directory / MANIFEST} says selection_sha256 {str(stored)[:12]}…, "
                f"{dataset.root} gives {found[:12]}…: the teacher saw other images; use the "
                f"selection {self.manifest.get('selection', 'it was made with')}, or extract the "
                "features again with extract_teacher.py"
            )

    def _check_labels(self, dataset: Aligned) -> None:
        if self.labels is None:
            return
        theirs, ours = number_by_appearance(self.labels), number_by_appearance(dataset.labels)
        different = np.flatnonzero(theirs != ours)
        if different.size:
            row = int(different[0])
            raise UserError(
                f"{self.directory / LABELS} puts row {row} to identity {theirs[row]} (counted in "
                f"the order of appearance), {dataset.root} puts image {row} to identity "
                f"{ours[row]}; {different.size} of {len(ours)} rows differ: "
                f"{_selection_of(self.labels)}, or extract the features again with "
                "extract_teacher.py"
            )

    def _has(self, name: str) -> bool:
        return (self.directory / name).exists()

    def _open(self, name: str, kinds: str, dimensions: tuple[int, ...]) -> np.ndarray:
        path = self.directory / name
        array = _map_array(path, _SHAPES[name])
        fits = array.dtype.kind in kinds and array.ndim in dimensions
        if not fits or array.dtype.itemsize > 8 or 0 in array.shape:
            raise UserError(
                f"{path} holds {array.dtype} {array.shape}: expected {_SHAPES[name]}; {_HOW}"
            )
        return array

    def _read_manifest(self) -> dict[str, Any]:
        path = self.directory / MANIFEST
        if not path.exists():
            return {}
        manifest = read_json(path)
        is_object = isinstance(manifest, dict) and not manifest.keys().isdisjoint(_KNOWN)
        if not is_object or manifest.get("map", KINDS[0]) not in KINDS:
            raise UserError(
                f"{path}: expected a JSON object with {', '.join(_KNOWN)}, whose map is one of "
                f"{', '.join(KINDS)}; delete it to do without its checks, or extract the features "
                "again"
            )
        return manifest

    def _check_lengths(self) -> None:
        counts = {MAP: len(self._maps)}
        if self.labels is not None:
            counts[LABELS] = len(self.labels)
        for name, count in counts.items():
            if count != len(self):
                raise UserError(
                    f"{self.directory / EMBEDDING} has {len(self)} rows, {self.directory / name} "
                    f"has {count}: the files are of different runs; {_HOW}"
                )

    def _find_kind(self) -> str:
        path = self.directory / MAP
        odd = _survey(path, self._maps)
        stated = self.manifest.get("map")
        may_be_probability = self._maps.ndim < 4 and (
            self._maps.ndim == 2 or _is_square(self._maps)
        )
        if may_be_probability and odd is None and stated != "features":
            return "probability"
        if stated == "probability" or self._maps.ndim == 2:
            raise UserError(
                f"{path} is no probability map: {odd or f'its shape is {self._maps.shape}'}; "
                "expected rows without negative numbers that sum to 1, or features (N, C, H, W)"
            )
        return "features"

    def _find_map_shape(self) -> tuple[int, ...]:
        shape = self._maps.shape[1:]
        if len(shape) == 3 or (len(shape) == 2 and self.kind == "probability"):
            return shape
        side = math.isqrt(shape[0])
        if side * side != shape[0]:
            raise UserError(
                f"{self.directory / MAP} has {shape[0]} places an image, which is no square; "
                f"expected {_SHAPES[MAP]}"
            )
        return (side, side) if self.kind == "probability" else (shape[1], side, side)


def _selection_of(labels: np.ndarray) -> str:
    """What to type for features of these people: as many images of each are a selection per_id."""
    counts = np.unique(np.unique(labels, return_counts=True)[1])
    if len(counts) == 1:
        return f"the rows are {counts[0]} of each: type --selection per_id --per-id {counts[0]}"
    return "use the selection the features were made with"


def _map_array(path: Path, expected: str) -> np.ndarray:
    try:
        with open_regular(path) as stream:
            start = stream.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise UserError(
                f"{path} is a Git LFS pointer, not the array itself: run 'git lfs pull' where it "
                f"came from; expected {expected}"
            )
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: expected {expected}; {_HOW}") from None
    except UserError:
        raise
    except Exception as error:  # a damaged header fails in any of a dozen ways, none of them a bug
        raise UserError(
            f"{path} cannot be read as an array ({one_line(error)}): expected {expected}; it may "
            f"be cut off, fetch it again; {_HOW}"
        ) from None


def _survey(path: Path, array: np.ndarray) -> str | None:
    """Why the rows are no probabilities, or None when they are; one pass in chunks.

    Raises UserError that counts and names the rows with NaN or infinity.
    """
    bad: list[int] = []
    odd: str | None = None
    tolerance = _SUM_TOLERANCE[array.dtype.itemsize]
    for first, rows in _chunks(array):
        sums = rows.sum(axis=1, dtype=np.float64)
        lowest = rows.min(axis=1)
        finite = np.isfinite(rows).all(axis=1)
        bad += (first + np.flatnonzero(~finite)).tolist()
        strange = np.flatnonzero((lowest < 0) | ~(np.abs(sums - 1) <= tolerance))
        if odd is None and strange.size:
            row = strange[0]
            odd = f"row {first + row} sums to {sums[row]:.4g}, its lowest is {lowest[row]:.4g}"
    if bad:
        raise UserError(
            f"{path}: {len(bad)} of {len(array)} rows hold NaN or infinity, the first are "
            f"{', '.join(str(row) for row in bad[:5])}; extract the features again"
        )
    return odd


def _chunks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows as (n, numbers)) of about 64 MB each."""
    step = max(1, _CHUNK_BYTES // (array[0].size * array.dtype.itemsize))
    for first in range(0, len(array), step):
        yield first, array[first : first + step].reshape(min(step, len(array) - first), -1)


def _is_square(maps: np.ndarray) -> bool:
    return maps.shape[-1] == maps.shape[-2]


# --- features that are being extracted ------------------------------------------------------------


class UnfinishedFeatures:
    """The files of an extraction under way: rows are written in order, each batch kept at once.

    The arrays have their full size from the start. Until `finish`, unfinished.json is beside them
    with the plan (the coming manifest.json) and how many rows are written, so a killed extraction
    continues and no training takes half the rows for all of them. One process writes.
    """

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        self.out, self.plan = out, plan
        self.num_rows: int = plan["num_images"]
        self._note = out / UNFINISHED
        self._arrays: list[np.ndarray] = []

    def begin(self) -> int | None:
        """Make `out` ready; the first row to write, or None when it holds all of this, finished.

        Rows of the same plan stay. Whatever else of an extraction is there is moved aside, with a
        line that says where and why; files of other names stay where they are.
        """
        manifest, note = read_json(self.out / MANIFEST), read_object(self._note)
        if manifest == self.plan and self._is_complete():
            self._note.unlink(missing_ok=True)
            return None
        rows = note.get("rows")
        goes_on = note.get("plan") == self.plan and type(rows) is int and 0 < rows <= self.num_rows
        if not (goes_on and self._open()):
            self._clear(manifest or note.get("plan"), is_empty=rows == 0)
            self._create()
            rows = 0
        remove_stale_temporaries(self.out)
        return rows

    def write(self, first: int, *rows: np.ndarray) -> None:
        """Keep the embeddings (n, D) and maps (n, …) of the rows from `first` on."""
        for array, new in zip(self._arrays, rows, strict=True):
            array[first : first + len(new)] = new
            cast(np.memmap, array).flush()
        self._write_note(first + len(rows[0]))

    def finish(self, labels: np.ndarray) -> None:
        """Complete the files, once all rows are written. labels: (N,) int64."""
        write_atomic(self.out / LABELS, lambda f: np.save(f, labels, allow_pickle=False))
        write_json(self.out / MANIFEST, self.plan)
        self._note.unlink()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            EMBEDDING: (self.num_rows, *self.plan["embedding_shape"]),
            MAP: (self.num_rows, *self.plan["map_shape"]),
        }

    def _write_note(self, rows: int) -> None:
        write_json(self._note, {"plan": self.plan, "rows": rows}, durable=not rows)

    def _open(self) -> bool:
        """Whether the arrays are there as they were made."""
        try:
            for name in self._shapes():
                check_regular(self.out / name)
            self._arrays = [np.load(self.out / name, mmap_mode="r+") for name in self._shapes()]
        except Exception:  # a damaged header fails in any of a dozen ways, none of them a bug
            return False
        return [(a.shape, a.dtype) for a in self._arrays] == [
            (shape, np.float32) for shape in self._shapes().values()
        ]

    def _create(self) -> None:
        """Reserve the arrays on the disk: writing to a map without room ends the process."""
        needed = 4 * sum(math.prod(shape) for shape in self._shapes().values())
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise UserError(
                f"{self.out}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for the "
                f"features of {self.num_rows} images; free some space, choose another --out, or "
                "lower --limit"
            )
        self._write_note(0)
        for name, shape in self._shapes().items():
            path = self.out / name
            self._arrays.append(np.lib.format.open_memmap(path, "w+", np.dtype("<f4"), shape))
            with path.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)

    def _clear(self, found: Any, *, is_empty: bool) -> None:
        """Move what an earlier extraction left aside, if it got as far as any features."""
        self._arrays = []
        names = (EMBEDDING, MAP, LABELS, MANIFEST, UNFINISHED, "status.json")
        names = [name for name in names if (self.out / name).exists()]
        if is_empty:
            for name in names:
                (self.out / name).unlink()
        elif set(names) - {UNFINISHED, "status.json"}:
            aside = move_aside(self.out, names)
            why = "they were not made by this command"
            if isinstance(found, dict):
                why = "; ".join(differing(found, self.plan)) or "they are not complete"
            log.info("the features that were in %s are now in %s: %s", self.out, aside, why)

    def _is_complete(self) -> bool:
        paths = [self.out / name for name in (EMBEDDING, MAP, LABELS)]
        try:
            for path in paths:
                check_regular(path)
            arrays = [np.load(path, "r", allow_pickle=False) for path in paths]
        except Exception:
            return False
        return all(len(array) == self.num_rows for array in arrays)
