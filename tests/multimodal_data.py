"""A small built-in demo for the tests of multimodal/: the same formats, fewer files."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from multimodal.demo_data import demo, files

SMALL: dict[Any, dict[str, Any]] = {
    files: {
        "COCO_SPLITS": {"train": (40, 4), "val": (12, 1), "test": (8, 1)},
        "CLOTHO_SPLITS": {"development": 20, "validation": 8, "evaluation": 6},
        "AUDIOCAPS_SPLITS": {"train": (18, 2), "val": (8, 1), "test": (6, 1)},
        "SPEAKERS": [*files.SPEAKERS[:16], *files.SPEAKERS[48:54]],
        "VIDEOS": 1,
        "UTTERANCES": 2,
    }
}


def build(root: Path) -> demo.DemoPaths:
    """40 pictures, 20 + 16 sounds, 10 speakers; held-out ones of each."""
    with mock.patch.multiple(files, **SMALL[files]):
        return demo.build(root)
