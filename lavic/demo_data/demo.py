"""The recipe's built-in demo: products, talks about them, and a tiny LLaVA-NeXT, in real formats.

    <root>/data/item2meta_train.json       216 products, 324 pictures described
    <root>/data/item2meta_valid.jsonl      54 pictures of other looks, a line each
    <root>/data/train_images  valid_images
    <root>/data/all_beauty                 train.jsonl, valid.jsonl, test.jsonl of stage 2
    <root>/weights/llava-v1.6-tiny         the checkpoint, with tokenizer and processor

Pictures are procedural (products.py) and of several shapes, so that 3, 4 and 5 views occur; no
look of the validation is in the training. The test's talks are in no training; products recur in
them, as in the published sets, and about a third was asked for in no training talk. The language
model has learnt to describe and to look up from words alone (lessons.py), the projector a little of
what the tower's vectors mean (sight.py). Left to train is to describe what is seen (stage 1), and
to look up by such vectors under an instruction and in talks never read before (stage 2).
Generator and seed stay as they are: training is tuned to the data, never the data to the training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavic.demo_data.products import SIZES, Item, Look, all_looks, conversation, draw, make_items
from shared.build_once import build_once
from shared.files import write_json, write_text

VERSION = 3  # of what is written; another number rebuilds
DRAWN = 2  # starts the random streams; data stay as they are when the model changes
NUM_VALID = 54  # looks held out
NUM_TALKS = {"train": 240, "valid": 40, "test": 60}
CATEGORY = "all_beauty"
# One random stream each; a new one goes to the end, so that the others draw what they always did.
_LOOKS, _ITEMS, _PICTURES, _TALKS = range(4)


@dataclass(frozen=True)
class DemoPaths:
    """Where a finished demo lies."""

    root: Path

    @property
    def data(self) -> Path:
        """What the document calls data/."""
        return self.root / "data"

    @property
    def train_data(self) -> Path:
        """Products of the training, dictionary form."""
        return self.data / "item2meta_train.json"

    @property
    def val_data(self) -> Path:
        """Pictures of the validation, line form."""
        return self.data / "item2meta_valid.jsonl"

    @property
    def train_images(self) -> Path:
        """Pictures of `train_data`, called {id}_{number}.jpg."""
        return self.data / "train_images"

    @property
    def valid_images(self) -> Path:
        """Pictures of `val_data`."""
        return self.data / "valid_images"

    @property
    def talks(self) -> Path:
        """train.jsonl, valid.jsonl and test.jsonl of the category all_beauty."""
        return self.data / CATEGORY

    @property
    def weights(self) -> Path:
        """The tiny LLaVA-NeXT."""
        return self.root / "weights" / "llava-v1.6-tiny"

    @property
    def distilled(self) -> Path:
        """Where the demo's stage 1 keeps its run."""
        return self.root / "runs" / "out_distilled"

    @property
    def finetuned(self) -> Path:
        """Where the demo's stage 2 keeps its run."""
        return self.root / "runs" / "out_finetuned"

    @property
    def parts(self) -> list[Path]:
        """The files and directories that all of it lies in."""
        folders = [self.train_images, self.valid_images, self.talks, self.weights]
        return [self.train_data, self.val_data, *folders]


def build(root: Path, seed: int = 0) -> DemoPaths:
    """The demo below `root`, made now unless a finished one of this version and seed is there."""
    paths = DemoPaths(Path(root))
    made = {"version": VERSION, "seed": seed}
    build_once(paths.root / "demo.json", made, paths.parts, lambda: _build(paths, seed))
    return paths


def _build(paths: DemoPaths, seed: int) -> None:
    from lavic.demo_data import model as demo_model

    for folder in (paths.train_images, paths.valid_images, paths.talks, paths.weights):
        folder.mkdir(parents=True, exist_ok=True)
    demo_model.write(paths.weights, write_data(paths, seed), seed)


def write_data(paths: DemoPaths, seed: int) -> list[Item]:
    """Write products, pictures and talks; the products of the training."""
    looks = all_looks()
    order = _stream(seed, _LOOKS).permutation(len(looks))
    everything = make_items([looks[index] for index in order], _stream(seed, _ITEMS))
    strangers, items = everything[:NUM_VALID], everything[NUM_VALID:]
    pictures = _stream(seed, _PICTURES)
    _write_train(paths, items, pictures)
    _write_valid(paths, strangers, pictures)
    _write_talks(paths.talks, items, _stream(seed, _TALKS))
    return items


def _write_train(paths: DemoPaths, items: list[Item], rng: np.random.Generator) -> None:
    """The dictionary form: every second product has two pictures."""
    content: dict[str, Any] = {}
    for index, item in enumerate(items):
        names = [f"{item.id}_{number}.jpg" for number in range(1 + index % 2)]
        for number, name in enumerate(names):
            size = SIZES[(index + 3 * number) % len(SIZES)]
            _save(item.look, size, paths.train_images / name, rng)
        content[item.id] = {
            "title": item.title,
            "categories": ["Demo"],
            "features": [],
            "description": [],
            "images": [{"large": _address(name)} for name in names],
            "image_descriptions_llava_cleaned": dict.fromkeys(names, item.look.description),
        }
    write_json(paths.train_data, content)


def _write_valid(paths: DemoPaths, items: list[Item], rng: np.random.Generator) -> None:
    """The line form."""
    rows: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        name = f"{item.id}_0.jpg"
        _save(item.look, SIZES[index % len(SIZES)], paths.valid_images / name, rng)
        rows.append(
            {
                "title": item.title,
                "image_name": name,
                "image": _address(name),
                "image_description_llava_cleaned": item.look.description,
            }
        )
    _write_lines(paths.val_data, rows)


def _write_talks(folder: Path, items: list[Item], rng: np.random.Generator) -> None:
    """Three files; each talk is about a product, every twentieth of the training is very long."""
    for split, count in NUM_TALKS.items():
        rows = [
            conversation(
                items[int(rng.integers(len(items)))],
                items,
                rng,
                is_long=split == "train" and number % 20 == 19,
            )
            for number in range(count)
        ]
        _write_lines(folder / f"{split}.jsonl", rows)


def _save(look: Look, size: tuple[int, int], path: Path, rng: np.random.Generator) -> None:
    draw(look, size, rng).save(path, quality=92)


def _address(name: str) -> str:
    return f"https://images.example/{name}"  # a name that no network knows


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _stream(seed: int, part: int) -> np.random.Generator:
    return np.random.default_rng([DRAWN, seed, part])
