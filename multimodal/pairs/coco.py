"""MS-COCO: pictures with five captions each and the categories they show."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import msgspec
from torch import Tensor
from torch.utils.data import Dataset

from multimodal.pairs import samples
from multimodal.pairs.samples import Sample
from shared.errors import UserError, one_line
from shared.files import read_bytes
from shared.seed import derive

CAPTIONS = 5  # a picture, in evaluation; a few have six or seven
_HELD_OUT = 50  # without Karpathy's lists one of so many training pictures validates


class Coco(Dataset[Sample]):
    """Items are dicts: images (3, S, S), input_ids (77), attention_mask (77), labels (80).

    root: holds annotations/, train2017/ and val2017/ (or 2014's), and karpathy/.
    split: by Karpathy's lists, where they are: val and test are his 5,000 each, and no picture of
        either is in train, whichever of COCO's halves it lies in. Without the lists test is
        val2017 (val2014), and one of fifty pictures of train2017 validates; `counts.split` says so.
    train: random part of the picture and random caption; default: for the split train alone.
    limit: so many pictures, spread over the split.
    Also `counts`, `label_names` (empty without instances_*.json), and of an item `captions(index)`
    (at most five), `path(index)`, `group_of(index)`. Raises UserError.
    """

    def __init__(
        self,
        root: Path,
        split: Literal["train", "val", "test"],
        *,
        image_size: int = 224,
        train: bool | None = None,
        limit: int | None = None,
    ) -> None:
        samples.checked_split(split)
        self._size, self._is_train = image_size, split == "train" if train is None else train
        year = find_year(root)
        everything, self.label_names = pictures(root, year)
        if len(self.label_names) > samples.NUM_LABELS:
            raise UserError(f"{root}: {len(self.label_names)} categories, at most 80 are expected")
        listed, name = _of_split(root, split, year, everything)
        self._pictures, self.counts = samples.usable(
            listed, lambda item: item.file, samples.picture_problem,
            of=("coco", name), what="pictures", where=root,
            form="train2017/000000000009.jpg", limit=limit,
        )  # fmt: skip
        self._replacing = samples.Replacing("coco", "pictures")

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Sample:
        return self._replacing.load(index, len(self), self._load)

    def _load(self, index: int) -> Sample:
        item = self._pictures[index]
        text = samples.text_of(samples.pick(item.captions, self._is_train))
        return {"images": self.image(index), **text, "labels": self.labels(index)}

    def image(self, index: int) -> Tensor:
        """The picture alone, float32 (3, S, S). Raises ValueError, which names the file."""
        read = samples.read_cropped_picture if self._is_train else samples.read_picture
        try:
            return read(self.path(index), self._size)
        except ValueError as error:
            raise ValueError(f"{self.path(index)}: {error}") from None

    def captions(self, index: int) -> list[str]:
        """The item's captions, the first five."""
        return self._pictures[index].captions[:CAPTIONS]

    def labels(self, index: int) -> Tensor:
        """float32 (80): ones at the item's labels."""
        return samples.multi_hot(self._pictures[index].labels)

    def path(self, index: int) -> Path:
        """The item's file."""
        return self._pictures[index].file

    def group_of(self, index: int) -> int:
        """COCO's number of the picture: a batch must not hold two items of one group."""
        return self._pictures[index].number


def _of_split(
    root: Path, split: str, year: int, everything: dict[int, Picture]
) -> tuple[list[Picture], str]:
    """The pictures of a split in the order of their numbers, and what to call the split."""
    ordered = [everything[number] for number in sorted(everything)]
    held_out = karpathy(root, everything)
    if held_out is None:
        name = {
            "train": f"train{year} (no Karpathy lists)",
            "val": f"1/{_HELD_OUT} of train{year} (no Karpathy lists)",
            "test": f"val{year} (no Karpathy lists)",
        }[split]
        return [item for item in ordered if _without_lists(item) == split], name
    if split == "train":
        excluded = held_out["val"] | held_out["test"]
        return [item for item in ordered if item.number not in excluded], "Karpathy train"
    return [item for item in ordered if item.number in held_out[split]], f"Karpathy {split}"


def _without_lists(item: Picture) -> str:
    if item.half.startswith("val"):
        return "test"
    return "train" if derive(item.number) % _HELD_OUT else "val"


# --- annotation files and Karpathy's lists --------------------------------------------------------

YEARS = (2017, 2014)
HALVES = ("train", "val")
_HELD = ("val", "test")
_BOM = b"\xef\xbb\xbf"

T = TypeVar("T")


@dataclass
class Picture:
    """A picture of COCO: where it lies, its captions, the numbers of its categories (0 to 79)."""

    number: int
    file: Path
    half: str  # train2017, val2014 …
    captions: list[str] = field(default_factory=list)
    labels: set[int] = field(default_factory=set)


class _Image(msgspec.Struct):
    id: int
    file_name: str


class _Caption(msgspec.Struct):
    image_id: int
    caption: str | None


class _Captions(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Caption]


class _Category(msgspec.Struct):
    id: int
    name: str


class _Instance(msgspec.Struct):
    image_id: int
    category_id: int


class _Instances(msgspec.Struct):
    categories: list[_Category]
    annotations: list[_Instance]


class _Listed(msgspec.Struct):
    """A picture of a Karpathy list, in any of the formats that are about."""

    id: int | None = None
    cocoid: int | None = None
    image: str | None = None
    file_name: str | None = None
    split: str | None = None


class _List(msgspec.Struct):
    images: list[_Listed]


def read(path: Path, kind: type[T]) -> T:
    """The JSON file as `kind`; other fields are passed over unread.

    Raises UserError that names the file and the place in it.
    """
    try:
        return msgspec.json.decode(read_bytes(path).removeprefix(_BOM), type=kind)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} is not what COCO calls {path.name} ({one_line(error)}): fetch it again"
        ) from None


def find_year(root: Path) -> int:
    """2017 or 2014, whichever annotations lie in `root`; 2017 where both do. Raises UserError."""
    for year in YEARS:
        if any((root / "annotations" / f"captions_{half}{year}.json").is_file() for half in HALVES):
            return year
    raise UserError(
        f"{root} holds no annotations/captions_train2017.json or captions_train2014.json: "
        "python download_datasets.py --datasets coco fetches COCO, or give --data-root"
    )


def pictures(root: Path, year: int) -> tuple[dict[int, Picture], tuple[str, ...]]:
    """Every captioned picture by its number, and the 80 categories' names."""
    found: dict[int, Picture] = {}
    names: tuple[str, ...] = ()
    for half in (f"{half}{year}" for half in HALVES):
        captions = root / "annotations" / f"captions_{half}.json"
        if captions.is_file():
            found |= _captioned(captions, root, half)
        instances = root / "annotations" / f"instances_{half}.json"
        if instances.is_file():
            names = _add_labels(instances, found)
    if names and not any(picture.labels for picture in found.values()):
        raise UserError(
            f"{root}/annotations/instances_*{year}.json: no image_id is one of the captioned "
            "pictures; fetch captions and instances from the same archive"
        )
    return found, names


def _captioned(path: Path, root: Path, half: str) -> dict[int, Picture]:
    content = read(path, _Captions)
    directory = next((d for d in (root / half, root / "images" / half) if d.is_dir()), root / half)
    found: dict[int, Picture] = {}
    for image in content.images:
        if PurePosixPath(image.file_name).name != image.file_name:
            raise UserError(f"{path}: file_name {image.file_name!r} leads out of {half}")
        found[image.id] = Picture(image.id, directory / image.file_name, half)
    for note in content.annotations:
        if note.image_id in found and note.caption and note.caption.strip():
            found[note.image_id].captions.append(" ".join(note.caption.split()))
    captioned = {number: picture for number, picture in found.items() if picture.captions}
    if not captioned:
        raise UserError(
            f"{path}: none of {len(content.annotations)} captions has the image_id of one of "
            f"{len(found)} images; fetch the file again"
        )
    return captioned


def _add_labels(path: Path, found: dict[int, Picture]) -> tuple[str, ...]:
    """Note which categories each picture shows; ids run from 1 to 90 with gaps, numbers do not."""
    content = read(path, _Instances)
    ordered = sorted(content.categories, key=lambda category: category.id)
    number_of = {category.id: number for number, category in enumerate(ordered)}
    for note in content.annotations:
        if note.category_id not in number_of:
            raise UserError(f"{path}: category_id {note.category_id} is not among the categories")
        if note.image_id in found:
            found[note.image_id].labels.add(number_of[note.category_id])
    return tuple(category.name for category in ordered)


def karpathy(root: Path, known: Collection[int] | None = None) -> dict[str, set[int]] | None:
    """The numbers of the pictures in Karpathy's val and test lists; None without the lists.

    Read are coco_{val,test}_karpathy.json (COCO's format or a plain list), and dataset_coco.json.
    Raises UserError for a list that names none of the pictures `known`.
    """
    folders = (root / "karpathy", root / "annotations", root)
    whole = _first(folders, ("dataset_coco.json",))
    if whole:
        listed = read(whole, _List).images
        held_out = {
            split: {_number(i, whole) for i in listed if i.split == split} for split in _HELD
        }
        return {
            split: _checked(numbers, whole, split, known) for split, numbers in held_out.items()
        }
    lists = {
        split: _first(folders, (f"coco_{split}_karpathy.json", f"coco_karpathy_{split}.json"))
        for split in _HELD
    }
    if not all(lists.values()):
        return None
    return {
        split: _checked(_numbers(path), path, split, known) for split, path in lists.items() if path
    }


def _checked(numbers: set[int], path: Path, split: str, known: Collection[int] | None) -> set[int]:
    if known is not None and numbers.isdisjoint(known):
        raise UserError(
            f"{path}: of {len(numbers)} pictures of the split {split} none is among the "
            f"{len(known)} captioned ones; expected COCO's numbers (cocoid, id or the file's name) "
            "and the splits train, restval, val and test; fetch the list again"
        )
    return numbers


def _first(folders: tuple[Path, ...], names: tuple[str, ...]) -> Path | None:
    candidates = (folder / name for folder in folders for name in names)
    return next((path for path in candidates if path.is_file()), None)


def _numbers(path: Path) -> set[int]:
    content = read(path, _List | list[_Listed])  # type: ignore[arg-type]
    listed = content.images if isinstance(content, _List) else content
    return {_number(item, path) for item in listed}


def _number(item: _Listed, path: Path) -> int:
    """A picture's number: named, or the digits at the end of its file's name."""
    if item.cocoid is not None or item.id is not None:
        return item.cocoid if item.cocoid is not None else item.id  # type: ignore[return-value]
    digits = PurePosixPath(item.image or item.file_name or "").stem.rpartition("_")[2]
    if not digits.isdecimal():
        raise UserError(f"{path}: a picture without a number; fetch the list again")
    return int(digits)
