"""The recipe's built-in demo: a small In-shop in the real on-disk layout.

    <root>/data/inshop/Eval/list_eval_partition.txt
    <root>/data/inshop/Img/img/WOMEN/Dresses/id_00000001/01_1_front.jpg …
    <root>/data/inshop/Anno/list_item_inshop.txt, list_bbox_inshop.txt

Garments are procedural (demo_garments.py). No item of the queries and the gallery is trained on,
and no two items agree in cut, pattern and colour. Generator and seed stay as they are: training is
tuned to the data, never the data to the training.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arcface.demo_data.garments import VIEWS, Style, draw_garment, draw_shot, num_styles, style_of
from shared.build_once import build_once
from shared.files import write_atomic, write_text

VERSION = 1  # of what is drawn and written; another number rebuilds
NUM_TRAIN_ITEMS, NUM_TEST_ITEMS = 120, 40
# Two sessions an item; every second picture of a test item is a query.
SESSIONS = (("front", "side", "full"), ("front", "back", "additional"))
_LINE = "{:<64} {:<12} {}\n"
# One random stream each; a new one goes to the end, so that the others draw what they always did.
_ITEMS, _PICTURES = range(2)


@dataclass(frozen=True)
class DemoPaths:
    """Where a finished demo lies."""

    root: Path

    @property
    def data_root(self) -> Path:
        """The In-shop directory."""
        return self.root / "data" / "inshop"

    @property
    def partition(self) -> Path:
        """The list of pictures, items and splits."""
        return self.data_root / "Eval" / "list_eval_partition.txt"

    @property
    def images(self) -> Path:
        """The directory that the list's paths are relative to."""
        return self.data_root / "Img"

    @property
    def annotations(self) -> Path:
        """The directory of the lists that retrieval does not need."""
        return self.data_root / "Anno"


@dataclass(frozen=True)
class _Entry:
    """One picture of the list."""

    name: str
    item: str
    status: str
    box: tuple[int, int, int, int]
    view: str


def build(root: Path, seed: int = 0) -> DemoPaths:
    """The demo below `root`, drawn now unless a finished one of this version and seed is there."""
    paths = DemoPaths(Path(root))
    made = {"version": VERSION, "seed": seed}
    build_once(paths.root / "demo.json", made, [paths.data_root], lambda: _build(paths, seed))
    return paths


def _build(paths: DemoPaths, seed: int) -> None:
    for directory in (paths.partition.parent, paths.images, paths.annotations):
        directory.mkdir(parents=True, exist_ok=True)
    entries = [entry for item in _items(seed) for entry in _write_item(paths.images, *item)]
    _write_partition(paths.partition, entries)
    _write_annotations(paths.annotations, entries)


def _items(seed: int) -> Iterator[tuple[int, Style, np.random.Generator]]:
    """Number from 1, looks and the pictures' random numbers of every item; training items first."""
    rng = np.random.default_rng([VERSION, seed, _ITEMS])
    count = NUM_TRAIN_ITEMS + NUM_TEST_ITEMS
    for number, place in enumerate(rng.choice(num_styles(), count, replace=False), 1):
        pictures = np.random.default_rng([VERSION, seed, _PICTURES, number])
        yield number, style_of(int(place), rng), pictures


def _write_item(
    images: Path, number: int, style: Style, rng: np.random.Generator
) -> Iterator[_Entry]:
    """Write the pictures of an item and give the list's entry of each."""
    item = f"id_{number:08d}"
    folder = f"img/{_department(style)}/{item}"
    (images / folder).mkdir(parents=True, exist_ok=True)
    for session, views in enumerate(SESSIONS, 1):
        for place, view in enumerate(views):
            pixels, box = draw_garment(style, draw_shot(view, rng))
            name = f"{folder}/{session:02d}_{VIEWS[view]}_{view}.jpg"
            _write_jpeg(images / name, pixels)
            # So that each session lends pictures to both: 1 and 3 of one, 2 of the other.
            test = "query" if (place + session) % 2 else "gallery"
            yield _Entry(name, item, "train" if number <= NUM_TRAIN_ITEMS else test, box, view)


def _department(style: Style) -> str:
    """A directory of In-shop's that suits the cut."""
    if style.length == "knee":
        return "WOMEN/Dresses"
    if style.sleeves == "long":
        return "MEN/Shirts_Polos" if style.has_v_neck else "WOMEN/Blouses_Shirts"
    return "WOMEN/Tees_Tanks" if style.length == "crop" else "MEN/Tees_Tanks"


def _write_jpeg(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=92)
    # A thousand waits for the disk would take longer than the drawing; the marker comes last.
    write_atomic(path, lambda stream: (stream.write(encoded.getvalue()), None)[1], durable=False)


def _write_partition(path: Path, entries: list[_Entry]) -> None:
    lines = [_LINE.format(entry.name, entry.item, entry.status) for entry in entries]
    header = _LINE.format("image_name", "item_id", "evaluation_status")
    write_text(path, f"{len(entries)}\n{header}{''.join(lines)}")


def _write_annotations(directory: Path, entries: list[_Entry]) -> None:
    """Write the lists of items and of boxes in In-shop's format."""
    items = list(dict.fromkeys(entry.item for entry in entries))
    write_text(directory / "list_item_inshop.txt", "\n".join([str(len(items)), *items]) + "\n")
    poses = {"front": 1, "side": 2, "back": 3, "full": 4, "additional": 4}
    rows = [
        f"{entry.name} {3 if 'Dresses' in entry.name else 1} {poses[entry.view]} "
        + " ".join(map(str, entry.box))
        for entry in entries
    ]
    header = "image_name clothes_type pose_type x_1 y_1 x_2 y_2"
    write_text(
        directory / "list_bbox_inshop.txt", "\n".join([str(len(rows)), header, *rows]) + "\n"
    )
