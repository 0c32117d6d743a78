"""MS-COCO: pictures with five captions each and the categories they show."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor
from torch.utils.data import Dataset

from multimodal import coco_files, pictures, samples
from multimodal.coco_files import Picture
from multimodal.samples import Sample
from shared.errors import UserError
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
        year = coco_files.find_year(root)
        everything, self.label_names = coco_files.pictures(root, year)
        if len(self.label_names) > samples.NUM_LABELS:
            raise UserError(f"{root}: {len(self.label_names)} categories, at most 80 are expected")
        listed, name = _of_split(root, split, year, everything)
        self._pictures, self.counts = samples.usable(
            listed, lambda item: item.file, pictures.problem,
            of=("coco", name), what="pictures", where=root, limit=limit,
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
        read = pictures.read_cropped if self._is_train else pictures.read
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
    held_out = coco_files.karpathy(root, everything)
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
