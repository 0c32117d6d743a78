"""A small built-in demo for the tests of multimodal/: the same formats, fewer files."""

from __future__ import annotations

from pathlib import Path

import pytest

from multimodal import demo, demo_files


def build(root: Path) -> demo.DemoPaths:
    """40 pictures, 20 + 16 sounds, 10 speakers; held-out ones of each."""
    with pytest.MonkeyPatch.context() as patch:
        coco = {"train": (40, 4), "val": (12, 1), "test": (8, 1)}
        patch.setattr(demo_files, "COCO_SPLITS", coco)
        clotho = {"development": 20, "validation": 8, "evaluation": 6}
        patch.setattr(demo_files, "CLOTHO_SPLITS", clotho)
        caps = {"train": (18, 2), "val": (8, 1), "test": (6, 1)}
        patch.setattr(demo_files, "AUDIOCAPS_SPLITS", caps)
        patch.setattr(demo_files, "VIDEOS", 1)
        patch.setattr(demo_files, "UTTERANCES", 2)
        return demo.build(root)
