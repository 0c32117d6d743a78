"""The recipe's built-in demo: COCO, Clotho, AudioCaps and VoxCeleb in small, in their own layouts.

    <root>/data/coco/{annotations,train2017,val2017,karpathy}
    <root>/data/clotho/{development,validation,evaluation}, clotho_{captions,metadata}_*.csv
    <root>/data/audiocaps/{train,val,test}.csv, audio/{train,val,test}/ID_START.flac
    <root>/data/voxceleb/{wav/id10001/VIDEO/00001.wav,faces/id10001/VIDEO/0000001.jpg,vox1_meta.csv}

Pictures and sounds are procedural (pictures.py, sounds.py). No scene and no clip is drawn
twice, so none of the held-out ones is trained on. Generator and seed stay as they are: training is
tuned to the data, never the data to the training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from multimodal.demo_data import files
from multimodal.demo_data.pictures import all_scenes
from multimodal.demo_data.sounds import all_clips
from shared.build_once import build_once

SETS = ("coco", "clotho", "audiocaps", "voxceleb")  # that the demo draws
VERSION = 2  # of what is drawn and written; another number rebuilds
_STREAM = 1  # stays: what is drawn depends on it
# One random stream each; a new one goes to the end, so that the others draw what they always did.
_COCO, _CLOTHO, _AUDIOCAPS, _VOXCELEB, _CLIPS = range(5)


class DemoPaths:
    """Where a finished demo is. data_root: the directory of the data sets; parts: these."""

    def __init__(self, root: Path) -> None:
        self.root, self.data_root = root, root / "data"
        self.parts = [self.data_root / name for name in SETS]
        self.coco, self.clotho, self.audiocaps, self.voxceleb = self.parts


def build(root: Path, seed: int = 0) -> DemoPaths:
    """The demo below `root`, made now unless a finished one of this version and seed is there."""
    paths = DemoPaths(Path(root))
    made = {"version": VERSION, "seed": seed}
    build_once(paths.root / "demo.json", made, paths.parts, lambda: _build(paths, seed))
    return paths


def _build(paths: DemoPaths, seed: int) -> None:
    def stream(number: int) -> np.random.Generator:
        return np.random.default_rng([_STREAM, seed, number])

    scenes = all_scenes()
    order = stream(_COCO).permutation(len(scenes))
    files.write_coco(paths.coco, [scenes[i] for i in order], stream(_COCO).spawn(1)[0])
    clips = all_clips()
    chosen = [clips[i] for i in stream(_CLIPS).permutation(len(clips))]
    rest = files.write_clotho(paths.clotho, chosen, stream(_CLOTHO))
    files.write_audiocaps(paths.audiocaps, rest, stream(_AUDIOCAPS))
    files.write_voxceleb(paths.voxceleb, stream(_VOXCELEB))
