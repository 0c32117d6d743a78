"""A small built-in demo for the tests of multimodal/: the same formats, fewer files."""

from __future__ import annotations

from pathlib import Path

import pytest

from multimodal.demo_data import demo, files


def build(root: Path) -> demo.DemoPaths:
    """40 pictures, 20 + 16 sounds, 10 speakers; held-out ones of each."""
    with pytest.MonkeyPatch.context() as patch:
        coco = {"train": (40, 4), "val": (12, 1), "test": (8, 1)}
        patch.setattr(files, "COCO_SPLITS", coco)
        clotho = {"development": 20, "validation": 8, "evaluation": 6}
        patch.setattr(files, "CLOTHO_SPLITS", clotho)
        caps = {"train": (18, 2), "val": (8, 1), "test": (6, 1)}
        patch.setattr(files, "AUDIOCAPS_SPLITS", caps)
        patch.setattr(files, "SPEAKERS", [*files.SPEAKERS[:16], *files.SPEAKERS[48:54]])
        patch.setattr(files, "VIDEOS", 1)
        patch.setattr(files, "UTTERANCES", 2)
        return demo.build(root)
