"""The demo's vases: what each is, and folders of their pictures (drawn in vase_pictures.py).

    vase = make_vases(40, seed=0)[3]
    vase.shape, vase.technique, vase.decoration      'hydria', 'red-figure', 'star'
    render(vase, view=1)                             (160, 160, 3) uint8
    images = build_images(root, seed=0)              images/ and images2/{0,1} below `root`

All that questions ask about can be seen: the fabric in the colour of the clay, the technique in how
motif and body differ, and provenance, date and attribution follow from fabric, technique and
decoration by the tables below. Generator and seed stay as they are: training is tuned to the data,
never the data to the training.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.build_once import build_once
from shared.files import write_atomic, write_json
from vasevqa.demo_data.vase_pictures import CLAY, FLAWS, PROFILES, VERSION, VIEWS, render, to_jpeg

SUFFIX = "ac001001.jpg"  # the end of every export of the archive that the names follow

# What follows from what can be seen.
PROVENANCE = {
    "Attic": "Athens",
    "Corinthian": "Corinth",
    "Apulian": "Taranto",
    "Etruscan": "Vulci",
}
DATE = {
    "black-figure": "550-500 BC",
    "red-figure": "500-450 BC",
    "white-ground": "450-400 BC",
}
ATTRIBUTION = {
    "star": "Star Painter",
    "ring": "Ring Painter",
    "cross": "Cross Painter",
    "heart": "Heart Painter",
    "striped": "Band Workshop",
    "dotted": "Dot Workshop",
    "checked": "Check Workshop",
    "plain": "unattributed",
}

FABRICS, TECHNIQUES = tuple(CLAY), tuple(DATE)
SHAPES, DECORATIONS = tuple(PROFILES), tuple(ATTRIBUTION)

# One random stream each, beside those of the pictures; a new one gets a number of its own.
_RECORDS, _FILES, _QUALITY = 0, 5, 6


@dataclass(frozen=True)
class Vase:
    """One vase: what can be seen of it, and whether it is broken."""

    id: str  # an upper-case UUID, as in the archive's names
    fabric: str
    technique: str
    shape: str
    decoration: str
    seed: int  # of its place, light and background
    is_broken: bool = False

    @property
    def provenance(self) -> str:
        """Where its fabric was made."""
        return PROVENANCE[self.fabric]

    @property
    def date(self) -> str:
        """When its technique was in use."""
        return DATE[self.technique]

    @property
    def attribution(self) -> str:
        """Whose decoration it is."""
        return ATTRIBUTION[self.decoration]

    @property
    def attributes(self) -> dict[str, str]:
        """All that is known of it, by name."""
        names = ("fabric", "technique", "shape", "provenance", "date", "attribution", "decoration")
        return {name: getattr(self, name) for name in names}

    def file_name(self, view: int) -> str:
        """The name of a view's picture, after the archive's pattern."""
        return f"{self.id}_{view}_{SUFFIX}"


@dataclass(frozen=True)
class ImagePaths:
    """Where the pictures lie."""

    root: Path

    @property
    def images(self) -> Path:
        """Unsorted pictures in nested folders, some damaged, some files corrupt."""
        return self.root / "images"

    @property
    def labelled(self) -> Path:
        """The quality set: 0/ (dark, blurred, cropped) and 1/."""
        return self.root / "images2"

    @property
    def truth(self) -> Path:
        """What is the matter with each file of `images`: {name: good, broken, dark, …}."""
        return self.root / "truth.json"


def make_vases(count: int, seed: int, broken: float = 0.0) -> list[Vase]:
    """`count` vases; about the share `broken` of them is. The same for the same arguments."""
    rng = np.random.default_rng([VERSION, seed, _RECORDS])
    return [_make_vase(rng, broken) for _ in range(count)]


def _make_vase(rng: np.random.Generator, broken: float) -> Vase:
    kinds = (FABRICS, TECHNIQUES, SHAPES, DECORATIONS)
    chosen = [kind[int(rng.integers(len(kind)))] for kind in kinds]
    name = str(uuid.UUID(bytes=rng.bytes(16), version=4)).upper()
    return Vase(name, *chosen, seed=int(rng.integers(2**31)), is_broken=bool(rng.random() < broken))


# --- folders of pictures --------------------------------------------------------------------------

NUM_VASES, NUM_LABELLED = 48, 120  # vases of four views; vases of the quality set, one view each
_SINGLE_VIEW = 3  # the last vases have the front alone
_OTHER_NAMES = ("IMG_0042.jpg", "drawer/detail of a handle.png")  # outside the archive's pattern
_CORRUPT = {
    "empty.jpg": b"",
    "page.jpg": b"<!doctype html><title>404 Not Found</title>",
    "zeros.png": b"\0" * 900,
}


def build_images(root: Path, seed: int = 0) -> ImagePaths:
    """The pictures below `root`, drawn now unless they are there, of this version and seed."""
    paths = ImagePaths(Path(root))
    parts = [paths.images, paths.labelled, paths.truth]
    made = {"version": VERSION, "seed": seed}
    build_once(paths.root / "images.json", made, parts, lambda: _build_images(paths, seed))
    return paths


def _build_images(paths: ImagePaths, seed: int) -> None:
    write_json(paths.truth, dict(_write_unsorted(paths.images, seed)))
    _write_labelled(paths.labelled, seed)


def unsorted_vases(seed: int) -> list[Vase]:
    """The vases whose views lie in images/."""
    return make_vases(NUM_VASES, seed, broken=0.25)


def _write_unsorted(directory: Path, seed: int) -> Iterator[tuple[str, str]]:
    """Write images/; the name of each file and what is the matter with it."""
    rng = np.random.default_rng([VERSION, seed, _FILES])
    vases = unsorted_vases(seed)
    for number, vase in enumerate(vases):
        views = VIEWS if number < NUM_VASES - _SINGLE_VIEW else VIEWS[:1]
        for view in views:
            flaw = FLAWS[int(rng.integers(len(FLAWS)))] if rng.random() < 0.2 else ""
            folder = f"campaign {1 + number % 2}/tray {1 + number % 3}"
            name = f"{folder}/{vase.file_name(view)}"
            _write(directory / name, to_jpeg(render(vase, view, flaw)))
            yield name, flaw or ("broken" if vase.is_broken else "good")
    whole = to_jpeg(render(vases[0], 1))
    for name in _OTHER_NAMES:
        _write(directory / name, to_jpeg(render(vases[1], 2), quality=80))
        yield name, "broken" if vases[1].is_broken else "good"
    for name, content in {**_CORRUPT, "cut off.jpg": whole[:90]}.items():
        _write(directory / "campaign 2" / name, content)
        yield f"campaign 2/{name}", "corrupt"


def _write_labelled(directory: Path, seed: int) -> None:
    """Write images2/: of each vase a good picture and a flawed one, and one corrupt file."""
    rng = np.random.default_rng([VERSION, seed, _QUALITY])
    for number in range(NUM_LABELLED):
        vase, view = _make_vase(rng, broken=0.2), VIEWS[int(rng.integers(len(VIEWS)))]
        flaw = FLAWS[number % len(FLAWS)]
        _write(directory / "1" / vase.file_name(view), to_jpeg(render(vase, view)))
        other = VIEWS[view % len(VIEWS)]
        _write(directory / "0" / vase.file_name(other), to_jpeg(render(vase, other, flaw)))
    _write(directory / "0" / "not a picture.jpg", _CORRUPT["page.jpg"])


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A thousand waits for the disk would take longer than the drawing; the marker comes last.
    write_atomic(path, lambda stream: (stream.write(content), None)[1], durable=False)
