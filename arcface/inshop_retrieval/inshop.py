"""DeepFashion In-shop, or a directory of classes, as uint8 pictures with numbers of their items.

    data = InShop(root, "train", build_pipeline(steps))
    image, label, position, flipped = data[0]

<root>/Eval/list_eval_partition.txt says what there is: the number of pictures, a header, then
`path item_id status` in each line; <root>/Img/<path> holds it. Without that file <root> holds
<class>/<image>, and a seed decides which classes are held out.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from shared.errors import UserError, did_you_mean, one_line
from shared.files import read_text
from shared.images import find_images, read_rgb

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset

    from arcface.inshop_retrieval.pipeline import Pipeline

    _Dataset = Dataset["Garment"]
else:
    _Dataset = object  # a Dataset by its methods: torch comes after the lists were read

LIST = "Eval/list_eval_partition.txt"  # below the data root
SPLITS = ("train", "query", "gallery")
HELD_OUT = 0.2  # share of a directory's classes of two and more pictures
LEFT_OUT = -1  # position of an item whose picture could not be read
_SHOWN = 5  # faults spelled out in the error's one line

log = logging.getLogger(__name__)


# --- which pictures there are ---------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture's path below the pictures' directory, and its item."""

    name: str
    item: str


@dataclass(frozen=True)
class Partition:
    """The pictures of each split, in order. is_folder: whether directories are the classes."""

    path: Path
    train: tuple[Picture, ...]
    query: tuple[Picture, ...]
    gallery: tuple[Picture, ...]
    is_folder: bool = False

    def split(self, name: str) -> tuple[Picture, ...]:
        """The pictures of `name`. Raises UserError for an empty split."""
        pictures: tuple[Picture, ...] = getattr(self, name)
        if not pictures:
            what = "holds no picture" if self.is_folder else "no line has the status"
            raise UserError(f"{self.path}: {what} {'for ' * self.is_folder}{name}")
        return pictures

    def labels(self, name: str) -> list[int]:
        """The item of each picture of a split as a number, by first appearance.

        train counts its own items; query and gallery count theirs together.
        """
        numbers: dict[str, int] = {}
        for picture in self.train if name == "train" else (*self.gallery, *self.query):
            numbers.setdefault(picture.item, len(numbers))
        return [numbers[picture.item] for picture in self.split(name)]

    def remarks(self) -> list[str]:
        """What a user should know of the list though it can be used, one line each."""
        train, query, gallery = ({p.item: None for p in getattr(self, name)} for name in SPLITS)
        lonely = [item for item in query if item not in gallery]
        seen = [item for item in train if item in query or item in gallery]
        found = []
        if self.is_folder:
            found.append(
                f"{self.path}: {len(self.train)} pictures of {len(train)} classes are trained on; "
                f"of {len(query)} held-out classes {len(self.query)} pictures are queries and "
                f"{len(self.gallery)} the gallery"
            )
        if lonely and gallery:
            found.append(
                f"{self.path}: {len(lonely)} query item(s) have no gallery picture, so their "
                f"queries cannot be answered: {_first(lonely)}"
            )
        if seen:
            found.append(
                f"{self.path}: {len(seen)} item(s) of the test are trained on, which flatters the "
                f"result: {_first(seen)}"
            )
        return found


def read(root: str | Path | None, ann_file: str = LIST, seed: int = 0) -> Partition:
    """The pictures of `root`: those of its list or, without one, of its directories of classes.

    Raises UserError for neither, and for a list as `read_list` does.
    """
    folder = Path(root or ".")
    if not (folder / ann_file).exists() and not (folder / "Img").exists():
        classes = read_classes(folder)
        if classes:
            return split_classes(folder, classes, seed)
    return read_list(folder / ann_file)


def read_classes(root: Path) -> dict[str, list[str]]:
    """The pictures of each directory <class> below `root`, by their paths below it, in order."""
    classes: dict[str, list[str]] = {}
    for name in find_images(root):
        if "/" in name:
            classes.setdefault(name.partition("/")[0], []).append(name)
    return classes


def split_classes(root: Path, classes: dict[str, list[str]], seed: int) -> Partition:
    """A fifth of the classes is held out, of each the first half of its pictures as queries.

    Which classes, and the order of pictures, follow from `seed` alone. A class of one picture is
    trained on.
    """
    order = random.Random(seed)
    able = [name for name, pictures in classes.items() if len(pictures) > 1]
    held_out = set(order.sample(able, max(1, round(HELD_OUT * len(able))) if able else 0))
    train, query, gallery = [], [], []
    for name, pictures in classes.items():
        if name not in held_out:
            train += [Picture(picture, name) for picture in pictures]
            continue
        shuffled = order.sample(pictures, len(pictures))
        half = len(shuffled) // 2
        query += [Picture(picture, name) for picture in sorted(shuffled[:half])]
        gallery += [Picture(picture, name) for picture in sorted(shuffled[half:])]
    return Partition(root, tuple(train), tuple(query), tuple(gallery), is_folder=True)


def read_list(path: Path) -> Partition:
    """The list in `path`, whatever its line ends and with or without a byte order mark.

    Raises UserError that names every malformed line by its number, and for a file that is missing,
    is no text, or has another number of pictures than its first line says.
    """
    lines = _lines(path)
    faults = _head_faults(lines)
    splits: dict[str, list[Picture]] = {name: [] for name in SPLITS}
    first_seen: dict[str, int] = {}
    for number, line in enumerate(lines[2:], 3):
        fields = line.split()
        reason = _fault(fields, first_seen) if fields else ""
        if reason:
            faults.append((number, reason))
        elif fields:
            first_seen[fields[0]] = number
            splits[fields[2]].append(Picture(fields[0], fields[1]))
    if faults:
        spelled = "; ".join(f"line {number}: {reason}" for number, reason in faults[:_SHOWN])
        others = ", ".join(str(number) for number, _ in faults[_SHOWN:])
        rest = f"; and lines {others}" if others else ""
        raise UserError(f"{path}: {len(faults)} malformed line(s): {spelled}{rest}")
    if int(lines[0]) != len(first_seen):
        raise UserError(
            f"{path}: line 1 says {int(lines[0])} pictures, {len(first_seen)} lines follow: the "
            "file was cut off or changed; fetch it again, or correct the number"
        )
    train, query, gallery = (tuple(splits[name]) for name in SPLITS)
    return Partition(path, train, query, gallery)


def _lines(path: Path) -> list[str]:
    try:
        text = read_text(path, "utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: the data root must hold Eval/list_eval_partition.txt and Img/img/ "
            "as In-shop's archives unpack, or <class>/<image>; put it there or give another "
            "--data-root"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return text.split("\n")  # str.splitlines would cut at signs that a path may hold


def _head_faults(lines: list[str]) -> list[tuple[int, str]]:
    """What is wrong with the first two lines."""
    faults = []
    if not lines[0].strip().isdecimal():
        faults.append((1, f"expected the number of pictures, found {_short(lines[0])}"))
    header = lines[1].split() if len(lines) > 1 else []
    if len(header) != 3 or header[2] in SPLITS:
        found = _short(lines[1]) if len(lines) > 1 else "the end of the file"
        faults.append((2, f"expected image_name item_id evaluation_status, found {found}"))
    return faults


def _fault(fields: list[str], first_seen: dict[str, int]) -> str:
    """What is wrong with a line of these fields, or ''."""
    if len(fields) != 3:
        found = f"{len(fields)} words: {_short(' '.join(fields))}"
        return f"expected path, item and status, found {found}"
    name, _, status = fields
    if status not in SPLITS:
        near = did_you_mean(status, SPLITS)
        return f"status {_short(status)}, allowed: {', '.join(SPLITS)}{near}"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        return f"{_short(name)} is no path below the pictures' directory"
    if name in first_seen:
        return f"{_short(name)} stands in line {first_seen[name]} already"
    return ""


def _first(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _short(text: str) -> str:
    return repr(text.strip()[:60])


# --- the pictures themselves ----------------------------------------------------------------------


class Garment(NamedTuple):
    """One picture as the loader hands it on."""

    image: Tensor  # uint8 (3, H, W)
    label: int
    position: int  # among the pictures of the split, LEFT_OUT where none could be read
    flipped: bool  # to be mirrored on the device


class Batch(NamedTuple):
    """Some pictures of one split; see Garment."""

    images: Tensor  # uint8 (B, 3, H, W), channels last in memory
    labels: Tensor  # int64 (B,)
    indices: Tensor  # int64 (B,)
    flipped: Tensor  # bool (B,)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and flips there."""
        images, labels, flipped = (
            tensor.to(device, non_blocking=True)
            for tensor in (self.images, self.labels, self.flipped)
        )
        return images, labels, flipped


def collate(garments: Sequence[Garment]) -> Batch:
    """The pictures as one batch; the loader's `collate`."""
    import torch

    images, *others = zip(*garments, strict=True)
    # Interleaved colours stay so: stacking them as planes takes ten times as long.
    interleaved = torch.stack([image.permute(1, 2, 0) for image in images])
    return Batch(interleaved.permute(0, 3, 1, 2), *(torch.tensor(values) for values in others))


class InShop(_Dataset):
    """The pictures of one split, decoded, resized and cut as the pipeline says.

    split: "train", "query" or "gallery". prefix: directory of the pictures below root: "Img", or
    "Img_highres" for the large ones (also found in Img/img_highres, as their archive unpacks).
    seed: of the split of a directory without list. max_bad: share of the pictures that may be
    missing or broken; each is named once in the log. A training picture gives way to another of its
    item; a query or gallery picture becomes a black one with position LEFT_OUT, which an evaluation
    passes over.
    Attributes: `names`, `items` (ids), `labels` (int64, by first appearance; query and gallery
    share theirs), `num_classes`.
    Raises UserError for a list that is missing or malformed, and above the share of bad pictures.
    """

    def __init__(
        self, root: str | Path, split: str, pipeline: Pipeline, *, prefix: str = "Img",
        ann_file: str = LIST, seed: int = 0, max_bad: float = 0.01,
    ) -> None:  # fmt: skip
        partition = read(root, ann_file, seed)
        for remark in partition.remarks() if split == "query" else ():
            log.warning(remark)
        pictures = partition.split(split)
        folder = partition.path if partition.is_folder else None
        paths = [folder / p.name for p in pictures] if folder else _locate(root, prefix, pictures)
        self._fill(split, pipeline, pictures, paths, partition.labels(split), max_bad)

    @classmethod
    def of_files(cls, root: Path, pipeline: Pipeline, max_bad: float = 0.01) -> InShop:
        """All pictures below `root` as a gallery; their items are the directories that hold them.

        Pictures that are in `root` itself have the item "". Raises UserError for no picture.
        """
        names = find_images(root)
        if not names:
            raise UserError(f"{root} holds no picture: name a directory of pictures")
        pictures = [Picture(n, n.partition("/")[0] if "/" in n else "") for n in names]
        numbers = {item: place for place, item in enumerate(sorted({p.item for p in pictures}))}
        labels = [numbers[picture.item] for picture in pictures]
        data = cls.__new__(cls)
        data._fill("gallery", pipeline, pictures, [root / n for n in names], labels, max_bad)
        return data

    def _fill(
        self, split: str, pipeline: Pipeline, pictures: Sequence[Picture], paths: list[Path],
        labels: list[int], max_bad: float,
    ) -> None:  # fmt: skip
        import torch

        self.split, self.pipeline, self.paths = split, pipeline, paths
        self.names = [picture.name for picture in pictures]
        self.items = [picture.item for picture in pictures]
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.num_classes = max(labels) + 1
        # Shared, so that loader workers know of each other's.
        self._bad = torch.zeros(len(pictures), dtype=torch.bool).share_memory_()
        self._max_bad = math.ceil(max_bad * len(pictures))
        self._of_label: dict[int, list[int]] = {}
        for index, label in enumerate(labels if split == "train" else ()):
            self._of_label.setdefault(label, []).append(index)
        self._note_missing()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Garment:
        import torch

        index = range(len(self))[index]  # negative and outside indices, as in a list
        for choice in self._choices(index):
            image = self._read(choice)
            if image is not None:
                return self._garment(image, choice)
        if self.split == "train":
            raise UserError(f"none of the {len(self)} training pictures can be read")
        blank = torch.zeros((3, self.pipeline.height, self.pipeline.width), dtype=torch.uint8)
        return Garment(blank, int(self.labels[index]), LEFT_OUT, False)

    def left_out(self) -> list[str]:
        """The paths of the pictures found missing or broken so far."""
        return [str(self.paths[index]) for index in self._bad.nonzero().flatten().tolist()]

    def _choices(self, index: int) -> Iterator[int]:
        """The picture itself and, in training, what may stand in: its item's, then any other."""
        yield index
        if self.split == "train":
            yield from (i for i in self._of_label[int(self.labels[index])] if i != index)
            yield from ((index + step) % len(self) for step in range(1, len(self)))

    def _garment(self, image: Tensor, index: int) -> Garment:
        try:
            cut, flipped = self.pipeline(image)
        except ValueError as error:
            raise UserError(f"{self.paths[index]}: {error}") from None
        return Garment(cut, int(self.labels[index]), index, flipped)

    def _read(self, index: int) -> Tensor | None:
        """The decoded picture, or None for one that is (now) known to be bad."""
        if self._bad[index]:
            return None
        try:
            return read_rgb(self.paths[index])
        except ValueError as error:
            self._bad[index] = True
            reason = one_line(error)
        log.warning("left out: %s (%s)", self.paths[index], reason)
        self._check_share(f"the last one: {self.paths[index]} ({reason})")
        return None

    def _note_missing(self) -> None:
        folders = {path.parent for path in self.paths}  # each is listed once
        listed = {folder: _file_names(folder) for folder in folders}
        missing = [i for i, path in enumerate(self.paths) if path.name not in listed[path.parent]]
        self._bad[missing] = True
        for index in missing[: self._max_bad]:
            log.warning("left out: %s (missing)", self.paths[index])
        if missing:
            names = ", ".join(str(self.paths[index]) for index in missing[:_SHOWN])
            more = ", …" * (len(missing) > _SHOWN)
            self._check_share(f"{len(missing)} missing: {names}{more}")

    def _check_share(self, which: str) -> None:
        count = int(self._bad.sum())
        if count > self._max_bad:
            raise UserError(
                f"{count} of {len(self)} {self.split} pictures cannot be read, {self._max_bad} may "
                f"be; {which}; unpack the data set again"
            )


def _locate(root: str | Path, prefix: str, pictures: Sequence[Picture]) -> list[Path]:
    """The path of every picture, in the one of the usual layouts that is there."""
    names = [picture.name for picture in pictures]
    short = [name.removeprefix("img/") for name in names]
    layouts = [(Path(root) / prefix, names), (Path(root) / prefix, short)]
    if prefix == "Img_highres":
        layouts.append((Path(root) / "Img" / "img_highres", short))
    for folder, below in layouts:
        # Some of the first may be missing; of a layout that is not there all are.
        if any((folder / name).is_file() for name in below[:20]):
            return [folder / name for name in below]
    return [layouts[0][0] / name for name in names]


def _file_names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError:
        return set()
