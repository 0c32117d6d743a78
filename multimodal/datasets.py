"""The data sets of the recipe, as items that are dicts of tensors.

    from datasets import AudioCaps, Clotho, Coco, VoxCeleb, collate    # a script of yours here
    pairs = Coco(Path("data/coco"), "train")
    pairs[0]["images"], pairs.counts.text(), pairs.captions(0)

This file bears the name of Hugging Face's package, which it hides from scripts that lie beside it:
the recipe's own scripts move this directory to the end of sys.path, and import it by its full name.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "datasets":  # imported by its bare name: the repository root may be unknown
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from multimodal.audiocaps import AudioCaps
from multimodal.clotho import Clotho
from multimodal.coco import Coco
from multimodal.samples import SPLITS, Counts, Sample, collate
from multimodal.voxceleb import VoxCeleb

NAMES = ("coco", "clotho", "audiocaps", "voxceleb")
PAIRS = {
    "image-text": ("coco",),
    "audio-text": ("clotho", "audiocaps"),
    "face-voice": ("voxceleb",),
}

__all__ = [
    "NAMES",
    "PAIRS",
    "SPLITS",
    "AudioCaps",
    "Clotho",
    "Coco",
    "Counts",
    "Sample",
    "VoxCeleb",
    "collate",
]
