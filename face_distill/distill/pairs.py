"""Verification sets: pairs of faces in insightface's `.bin` form, or LFW's folder. N pairs.

A `.bin` file is a pickle, read without running its code. LFW's folder has pairs.txt beside
<name>/<name>_0001.jpg: a line `name 1 2` is a pair of one person, `name 1 other 3` of two.
"""

from __future__ import annotations

import io
import logging
import pickle
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from face_distill.distill.images import SIZE
from shared.errors import UserError, one_line
from shared.files import is_file, read_bytes, read_text
from shared.images import SUFFIXES, decode_rgb, printable, size_of

log = logging.getLogger(__name__)

FOLDS = 10
MAX_SIDE = 1024  # pixels; a small file can claim an image that takes gigabytes


@dataclass(frozen=True)
class Pairs:
    """Encoded images (JPEG or PNG) of N pairs, and whether each pair shows one person."""

    images: list[bytes]  # 2 N: first and second image of pair 0, of pair 1, …
    same: NDArray[np.bool_]  # (N,)


@dataclass(frozen=True)
class PairSet:
    """The pairs of one file that are judged, each of their images known to be whole."""

    name: str
    path: Path
    pairs: Pairs
    image_numbers: NDArray[np.int64]  # (2 N,): which images of the file `pairs.images` are
    num_images: int  # in the file


def read_set(path: Path, limit: int | None = None, name: str = "") -> PairSet:
    """The pairs in `path`, or `limit` of them: of each kind its share, spread over the file.

    name: of the set; the file's, or of LFW's folder, unless given.

    Every image is decoded once. Raises UserError for a file that `read_pairs` refuses,
    a broken image (by its number in the file), too few pairs for ten folds, and pairs of one kind
    alone.
    """
    pairs = read_pairs(path)
    try:
        check_kinds(pairs.same)
        chosen = _spread(pairs.same, limit or len(pairs.same))
        fold_numbers(len(chosen))
        numbers = np.stack((2 * chosen, 2 * chosen + 1), 1).ravel()
        images = [pairs.images[number] for number in numbers]
        _check_images(images, numbers)
    except UserError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    kept = Pairs(images, pairs.same[chosen])
    name = name or (path.parent.name if path.suffix == ".txt" else path.stem)
    return PairSet(printable(name), path, kept, numbers, 2 * len(pairs.same))


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
        height, width = decode([image], number).shape[2:]
        sizes.add((width, height))
        if len(sizes) > 1:
            raise UserError(f"image {number} has another size than those before: {sorted(sizes)}")
    width, height = sizes.pop()
    if (width, height) != (SIZE, SIZE):
        log.warning(
            "the pictures are %d x %d: aligned crops of %d x %d are expected, as in training; of "
            "others the figures say little", width, height, SIZE, SIZE,
        )  # fmt: skip


def check_kinds(same: NDArray[Any]) -> None:
    """Raise UserError unless some of the pairs are of one person and some of two."""
    if same.all() or not same.any():
        raise UserError(
            f"{int(same.sum())} pairs of one person and {int((~same).sum())} of two: "
            "TAR and FAR need some of both; give more pairs"
        )


def fold_numbers(count: int, folds: int = FOLDS) -> NDArray[np.int64]:
    """The fold (0 … folds - 1) of each of `count` pairs: contiguous, the first ones larger by one.

    Raises UserError for fewer pairs than folds.
    """
    if count < folds:
        raise UserError(f"{count} pairs cannot be split into {folds} folds: give more pairs")
    return np.repeat(np.arange(folds), [len(p) for p in np.array_split(np.arange(count), folds)])


def decode(images: Sequence[bytes], first: int = 0) -> Tensor:
    """RGB images, uint8 (N, 3, H, W).

    first: the number of the first of them in its set, for the error.
    Raises UserError for an image that is broken or above 1024 pixels a side, and for mixed sizes.
    """
    decoded = [_decoded(image, number) for number, image in enumerate(images, first)]
    sizes = {tuple(image.shape) for image in decoded}
    if len(sizes) != 1:
        raise UserError(f"images of a verification set must have one size, got {sorted(sizes)}")
    return torch.stack(decoded).contiguous()


def _decoded(image: bytes, number: int) -> Tensor:
    """One image (3, H, W)."""
    try:
        size = size_of(image)
        if max(size) > MAX_SIDE:
            raise ValueError(f"{size} pixels; at most {MAX_SIDE} a side are taken")
        return decode_rgb(image)
    except ValueError as error:
        raise UserError(f"image {number} of the pairs cannot be decoded: {error}") from None


def read_pairs(path: Path) -> Pairs:
    """The pairs in `path`: LFW's pairs.txt, or insightface's `.bin` form (lfw.bin, …).

    Raises UserError when a file is missing, cut off, refused or of another form.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: expected a verification set such as lfw.bin")
    return _read_list(path) if path.suffix == ".txt" else _read_bin(path)


# --- LFW's folder ---------------------------------------------------------------------------------


def _read_list(path: Path) -> Pairs:
    """The pairs of a pairs.txt, whose first line counts them, with the pictures beside it."""
    images: list[bytes] = []
    same: list[bool] = []
    for number, line in enumerate(read_text(path, errors="replace").splitlines()[1:], 2):
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) == 3:
            fields.insert(2, fields[0])
        if len(fields) != 4 or not (fields[1].isdecimal() and fields[3].isdecimal()):
            raise UserError(
                f"{path} line {number}: expected 'name number number' or 'name number name "
                f"number', got {line[:60]!r}"
            )
        images += [_picture(path, number, *fields[i : i + 2]) for i in (0, 2)]
        same.append(fields[0] == fields[2])
    if not same:
        raise UserError(f"{path} lists no pairs: expected LFW's pairs.txt")
    return Pairs(images, np.array(same, dtype=bool))


def _picture(path: Path, line: int, name: str, number: str) -> bytes:
    """The encoded picture <name>/<name>_<number> beside pairs.txt."""
    stem = path.parent / name / f"{name}_{int(number):04d}"
    found = [file for suffix in sorted(SUFFIXES) if is_file(file := Path(f"{stem}{suffix}"))]
    if not found:
        raise UserError(f"{path} line {line}: {stem}.jpg is missing: unpack the whole of LFW there")
    return read_bytes(found[0])


# --- the .bin form --------------------------------------------------------------------------------


def _read_bin(path: Path) -> Pairs:
    """The pairs of a `.bin` file.

    The file is a pickle of (encoded images, same-person flags). It is read by an unpickler that
    builds bytes, lists, numbers and arrays of bytes or bools, and refuses everything else before
    any of it runs.
    """
    images, same = _unpickle(path)
    if len(images) != 2 * len(same) or not same:
        raise UserError(
            f"{path} is no verification set: expected two images for every flag, got "
            f"{len(images)} images and {len(same)} flags"
        )
    if not all(isinstance(flag, (bool, int, np.bool_)) for flag in same):
        raise UserError(f"{path}: same-person flags must be true or false")
    return Pairs([_encoded(image, path) for image in images], np.array(same, dtype=bool))


def _listed(value: list[Any] | tuple[Any, ...] | _Array) -> list[Any]:
    """`value` as a list, with real arrays in place of the stand-ins."""
    if isinstance(value, _Array):
        return list(value.rebuilt())
    return [v.rebuilt() if isinstance(v, _Array) else v for v in value]


def _encoded(image: Any, path: Path) -> bytes:
    """One image of the file as bytes."""
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, np.ndarray) and image.ndim == 1 and image.dtype == np.uint8:
        return image.tobytes()
    raise UserError(
        f"{path}: images must be encoded bytes (JPEG or PNG), got {type(image).__name__}"
    )


def _unpickle(path: Path) -> tuple[list[Any], list[Any]]:
    """The two lists of a pair file. Raises UserError when it holds anything else."""
    try:
        content = read_bytes(path)
        _check_memo(content)
        # Files written by Python 2 hold their images as its str: these come as bytes.
        images, same = _PairUnpickler(io.BytesIO(content), encoding="bytes").load()
        return _listed(images), _listed(same)
    except _RefusedError as error:
        raise UserError(
            f"{path} is refused: it asks for {error}, which a verification set does not need and "
            "which could run code; get the file from its original source"
        ) from error
    except Exception as error:  # a damaged pickle fails in any of a dozen ways, none of them a bug
        raise UserError(f"{path} is cut off or no verification set: download it again") from error


def _check_memo(content: bytes) -> None:
    """Raise ValueError for a memo number that no writer gives.

    Writers number their objects one after the other; the unpickler makes room for the number it
    reads, so five damaged bytes could ask for 32 GB.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > count:
            raise ValueError(f"memo number {argument} after {count} operations")


class _RefusedError(Exception):
    """The pickle names something outside the few that pair files need."""


class _Dtype:
    """Stands for numpy's dtype while unpickling; uint8 and bool only."""

    def __init__(self, code: Any, *_: Any) -> None:
        name = code.decode() if isinstance(code, bytes) else str(code)
        if name.lstrip("|") not in ("u1", "b1", "uint8", "bool"):
            raise _RefusedError(f"an array of {name}")
        self.kind = np.dtype(name)

    def __setstate__(self, _: Any) -> None:
        """Byte order and the like mean nothing to single bytes."""


class _Array:
    """Stands for numpy's array while unpickling: shape, kind and raw bytes."""

    def __init__(self, *_: Any) -> None:
        self.parts: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.parts = tuple(state[1:])  # version; shape, dtype, Fortran order, bytes

    def rebuilt(self) -> NDArray[Any]:
        """The array. Raises ValueError when its parts do not fit each other."""
        shape, dtype, is_fortran, raw = self.parts
        order = "F" if is_fortran else "C"
        return np.frombuffer(raw, dtype.kind).reshape(shape, order=order)


def _from_buffer(raw: Any, dtype: _Dtype, shape: Any, order: Any) -> _Array:
    """Stands for numpy's reader of arrays in pickle protocol 5."""
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _scalar(dtype: _Dtype, raw: bytes) -> bool | int:
    """Stands for numpy's scalars: one bool or byte."""
    return np.frombuffer(raw, dtype.kind)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for codecs.encode, by which Python 3 writes bytes into pickles of protocol 2."""
    if encoding != "latin1":
        raise _RefusedError(f"the text encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stands for bytes(), by which protocol 2 writes an empty value."""
    return b""


_NUMPY_CORES = ("numpy.core", "numpy._core")  # before and since numpy 2
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    **{(f"{core}.multiarray", "_reconstruct"): _Array for core in _NUMPY_CORES},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _NUMPY_CORES},
    **{(f"{core}.numeric", "_frombuffer"): _from_buffer for core in _NUMPY_CORES},
}


class _PairUnpickler(pickle.Unpickler):
    """Builds plain values; each name it meets becomes one of our own stand-ins or an error."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None
