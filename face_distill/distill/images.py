"""Face images: where they are on disk, their pixels, and what a network gets of them.

A source (faces_emore records, or a folder of folders) has `keys` (int64, one an image),
`labels(keys)`, `identities()`, `read(key)`, `where(key)` and `keep(keys)`; FaceDataset selects by
them. Pixels become a network's input a whole batch at a time: the same grey levels as the usual
per-image pipeline (Pillow bicubic resize, ToTensor, Normalize), within one level, on any device.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from face_distill.distill.recordio import RecordError, RecordReader
from shared.errors import UserError
from shared.files import read_bytes
from shared.images import SUFFIXES, decode_rgb, find_images

SIZE = 112  # pixels a side of a face crop
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FLOAT32_EXACT = 1 << 24  # from here on, not every key can be written as a float32 label


def open_source(root: Path) -> RecordSource | FolderSource:
    """The source that lies in `root`: train.rec with train.idx, or root/<identity>/<image>.

    Raises UserError when `root` is missing or holds neither.
    """
    if not root.is_dir():
        raise UserError(
            f"{root} is missing: expected faces_emore (train.rec, train.idx, property) or a folder "
            "of <identity>/<image>; unpack the data set there or pass --data-root"
        )
    if (root / "train.rec").exists() or (root / "train.idx").exists():
        return RecordSource(root)
    return FolderSource(root)


class RecordSource:
    """The image records of faces_emore.

    Record 0, when it is a header (two labels, no image), says [1, a) are the keys of images and
    [a, b) those of identity records, each of which names its image keys as a range. Float32 labels
    cannot name every key from 2**24 on; the border is then found in the records themselves.
    Without a header every record is an image.
    """

    def __init__(self, root: Path) -> None:
        self._reader = RecordReader(root / "train.rec", root / "train.idx")
        keys = self._reader.keys
        if keys[0] != 0 or not self._reader.is_bare(0):
            self.keys, self._identity_keys = keys, keys[:0]
            return
        border = self._border()
        self.keys, self._identity_keys = keys[1:border], keys[border:]
        if not self.keys.size:
            raise RecordError(f"{self._reader.where(0)}: the header leaves no image records")

    def labels(self, keys: np.ndarray) -> np.ndarray:
        """The identity of each image, int64 (len(keys),), in the files' own numbering.

        From the identity records when they are fewer than the images asked for, else from each
        image's own label; a record that cannot be read counts as the one before, it is left out
        later. Raises RecordError for a label that is no whole number.
        """
        if 0 < len(self._identity_keys) < len(keys) and self._ranges_are_exact():
            ranges = np.array([self._range(int(key)) for key in self._identity_keys])
            position = np.searchsorted(ranges[:, 0], keys, side="right") - 1
            if (position >= 0).all() and (keys < ranges[position, 1]).all():
                return position.astype(np.int64)
        labels: list[int] = []
        for key in keys.tolist():
            labels.append(self._own_label(key, labels[-1] if labels else 0))
        return np.array(labels, np.int64)

    def identities(self) -> Iterator[np.ndarray]:
        """The image keys of each identity, int64 (n,), in the order of the file."""
        if not self._identity_keys.size:
            yield from groups(self.keys, self.labels(self.keys))
        elif self._ranges_are_exact():
            yield from (np.arange(*self._range(int(key))) for key in self._identity_keys)
        else:  # identities lie one after the other where identity records exist
            runs = itertools.groupby((int(key) for key in self.keys), self._own_label)
            yield from (np.fromiter(run, np.int64) for _, run in runs)

    def read(self, key: int) -> bytes:
        """The encoded image of a key."""
        return self._reader.labelled(key).content

    def where(self, key: int) -> str:
        """The record's file, key and byte offset, for messages."""
        return self._reader.where(key)

    def identity_bytes(self, keys: np.ndarray) -> bytes:
        """What tells these images from others: their keys."""
        return keys.astype("<i8").tobytes()

    def keep(self, keys: np.ndarray) -> RecordSource:
        """The same source for these images alone, small to send to a worker."""
        kept = copy.copy(self)
        kept._reader = self._reader.select(keys)
        kept.keys, kept._identity_keys = kept._reader.keys, self._identity_keys[:0]
        return kept

    def _border(self) -> int:
        """The position, among the keys, of the first identity record."""
        reader = self._reader
        image_end, identity_end = (int(end) for end in np.asarray(reader.label_of(0)))
        if identity_end >= FLOAT32_EXACT:
            return self._searched_border()
        border = int(np.searchsorted(reader.keys, image_end))
        if border != image_end or len(reader.keys) != identity_end:
            raise RecordError(
                f"{reader.where(0)}: the header promises {image_end - 1} images and "
                f"{identity_end - image_end} identities under the keys 1 to {identity_end - 1}, "
                f"{reader.idx} has {len(reader.keys) - 1} up to {reader.keys[-1]}; fetch both "
                "files again"
            )
        return border

    def _searched_border(self) -> int:
        """The same by bisection: images come first, and identity records hold no image."""
        low, high = 1, len(self._reader.keys)
        while low < high:
            middle = (low + high) // 2
            if self._reader.is_bare(int(self._reader.keys[middle])):
                high = middle
            else:
                low = middle + 1
        return low

    def _ranges_are_exact(self) -> bool:
        return bool(self.keys[-1] < FLOAT32_EXACT)

    def _range(self, key: int) -> tuple[int, int]:
        labels = np.asarray(self._reader.label_of(key))
        if labels.shape != (2,) or not 0 <= labels[0] <= labels[1] <= self.keys[-1] + 1:
            raise RecordError(
                f"{self._reader.where(key)}: expected an identity record with a range of image "
                f"keys up to {self.keys[-1]}, got {labels.tolist()}; fetch the data set again"
            )
        return int(labels[0]), int(labels[1])

    def _own_label(self, key: int, unreadable: int = -1) -> int:
        try:
            label = float(np.asarray(self._reader.label_of(key)).flat[0])
        except RecordError:
            return unreadable
        if not label.is_integer() or label < 0:
            raise RecordError(
                f"{self._reader.where(key)}: the label is {label}, expected a whole number from 0"
            )
        return int(label)


class FolderSource:
    """Images in root/<identity>/<image>, or deeper, in the order of their names; keys from 0.

    An image belongs to the first folder of its path. Hidden files and folders are no faces.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        inside = (name.split("/") for name in find_images(root) if "/" in name)
        self._names = ["/".join(parts) for parts in sorted(inside)]
        self.keys = np.arange(len(self._names))
        if not self._names:
            raise UserError(
                f"{root} holds neither train.rec with train.idx nor <identity>/<image> "
                f"({' '.join(sorted(SUFFIXES))}); unpack the data set there or pass --data-root"
            )

    def labels(self, keys: np.ndarray) -> np.ndarray:
        """The identity of each image, int64 (len(keys),), counted in the order of the folders."""
        people = [name.partition("/")[0] for name in self._names]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(people))}
        return np.array([numbers[people[key]] for key in keys], np.int64)

    def identities(self) -> Iterator[np.ndarray]:
        """The image keys of each folder, int64 (n,)."""
        yield from groups(self.keys, self.labels(self.keys))

    def read(self, key: int) -> bytes:
        """The encoded image of a key. Raises UserError when the file is gone."""
        path = self._root / self._names[key]
        try:
            return read_bytes(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    def where(self, key: int) -> str:
        """The image's file and key, for messages."""
        return f"{self._root / self._names[key]} (key {key})"

    def identity_bytes(self, keys: np.ndarray) -> bytes:
        """What tells these images from others: their paths below the root."""
        names = (self._names[key] for key in keys)
        return "\0".join(names).encode("utf-8", "surrogateescape")

    def keep(self, keys: np.ndarray) -> FolderSource:
        """This source: names are small, and keys are positions among all of them."""
        return self


def groups(keys: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """The keys (N,) of each label (N,), in the order in which the labels first appear."""
    numbers = number_by_appearance(labels)
    order = np.argsort(numbers, kind="stable")
    return np.split(keys[order], np.cumsum(np.bincount(numbers))[:-1])


def number_by_appearance(labels: np.ndarray) -> np.ndarray:
    """Labels renumbered 0, 1, 2, … in the order of their first appearance, int64.

    Two numberings of the same identities give the same result, so it also compares labels.
    """
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


# --- pixels ---------------------------------------------------------------------------------------


def decode(content: bytes) -> Tensor:
    """An encoded image as RGB, uint8 (3, 112, 112). Raises ValueError when it cannot be decoded."""
    return fitted(decode_rgb(content))


def fitted(image: Tensor) -> Tensor:
    """An image, uint8 (3, H, W), as uint8 (3, 112, 112)."""
    if image.shape[-2:] == (SIZE, SIZE):
        return image
    return resize(image[None], SIZE, SIZE)[0].to(torch.uint8).contiguous()


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images resized to whole grey levels, bicubic with antialias, as Pillow does it.

    images: (B, 3, H, W) uint8. Returns (B, 3, height, width), whole values 0..255, as uint8 from
    the integer kernel and as float32 otherwise. That kernel takes a seventh of the time, but exists
    for the CPU alone and is within one grey level only when the sides change by a whole factor.
    """
    if images.shape[-2:] == (height, width):
        return images
    pairs = zip(images.shape[-2:], (height, width), strict=True)
    if images.device.type == "cpu" and all(max(pair) % min(pair) == 0 for pair in pairs):
        # Interleaved colours: the kernel for that layout takes half the time.
        packed = images.contiguous(memory_format=torch.channels_last)
        return _bicubic(packed, height, width)
    return _resize_as_float(images, height, width)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Grey levels 0..255 as float32 (level / 255 - mean) / std, channel by channel.

    images: (B, 3, H, W), uint8 or float. mean, std: (3,), on the device of the images.
    """
    scale = (1.0 / (255.0 * std)).view(3, 1, 1)
    shift = (-mean / std).view(3, 1, 1)
    levels = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return levels.mul_(scale).add_(shift)


class Preprocess(nn.Module):
    """uint8 faces (B, 3, H, W) → the tower's float32 input (B, 3, size, size), on their device.

    size: pixels a side. mean, std: a channel's, in units of the full range; CLIP's by default.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int = 224,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
    ) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class. Raises ValueError for images that are not uint8 with three channels."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"expected uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        levels = resize(images, self.size, self.size)
        return normalise(levels, self.mean.to(images.device), self.std.to(images.device))


def _resize_as_float(images: Tensor, height: int, width: int) -> Tensor:
    # Pillow resizes the rows, rounds, then the columns; without the rounding and clamping between
    # the two, pixels beside sharp edges are up to 30 levels off.
    rows = _to_levels(_bicubic(images.float(), images.shape[-2], width))
    return _to_levels(_bicubic(rows, height, width))


def _to_levels(values: Tensor) -> Tensor:
    # Pillow rounds halves up, and halves are common: at 112 to 224 all weights are n / 128. The
    # ten-thousandth makes up for sums in float32 that fall a little short of one.
    return values.add_(0.5001).floor_().clamp_(0, 255)


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    return functional.interpolate(images, (height, width), mode="bicubic", antialias=True)
