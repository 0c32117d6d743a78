"""The recipe's built-in demo: COCO, Clotho, AudioCaps and VoxCeleb in small, in their own layouts.

    <root>/data/coco/{annotations,train2017,val2017,karpathy}
    <root>/data/clotho/{development,validation,evaluation}, clotho_{captions,metadata}_*.csv
    <root>/data/audiocaps/{train,val,test}.csv, audio/{train,val,test}/ID_START.flac
    <root>/data/voxceleb/{wav/id10001/VIDEO/00001.wav,faces/id10001/VIDEO/0000001.jpg,vox1_meta.csv}

Pictures and sounds are procedural (demo_pictures.py, demo_sounds.py). No scene and no clip is drawn
twice, so none of the held-out ones is trained on. Generator and seed stay as they are: training is
tuned to the data, never the data to the training.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multimodal import demo_files
from multimodal.demo_pictures import all_scenes
from multimodal.demo_sounds import all_clips
from shared.files import open_lock, read_json, write_json

VERSION = 1  # of what is drawn and written; another number rebuilds
# One random stream each; a new one goes to the end, so that the others draw what they always did.
_COCO, _CLOTHO, _AUDIOCAPS, _VOXCELEB, _CLIPS = range(5)


@dataclass(frozen=True)
class DemoPaths:
    """Where a finished demo lies."""

    root: Path

    @property
    def data_root(self) -> Path:
        """What --data-root names: the directory of the data sets."""
        return self.root / "data"

    @property
    def coco(self) -> Path:
        """The COCO directory."""
        return self.data_root / "coco"

    @property
    def clotho(self) -> Path:
        """The Clotho directory."""
        return self.data_root / "clotho"

    @property
    def audiocaps(self) -> Path:
        """The AudioCaps directory."""
        return self.data_root / "audiocaps"

    @property
    def voxceleb(self) -> Path:
        """The VoxCeleb directory."""
        return self.data_root / "voxceleb"

    @property
    def marker(self) -> Path:
        """The file that says the build was finished, and of which version and seed."""
        return self.root / "demo.json"


def build(root: Path, seed: int = 0) -> DemoPaths:
    """The demo below `root`, made now unless a finished one of this version and seed is there."""
    paths = DemoPaths(Path(root))
    with _alone(paths.root):
        return _build(paths, seed)


def _build(paths: DemoPaths, seed: int) -> DemoPaths:
    done = read_json(paths.marker)
    wanted = {"version": VERSION, "seed": seed}
    if isinstance(done, dict) and done.get("made") == wanted and _is_whole(paths, done):
        return paths
    if paths.marker.exists():  # of another seed or version, whose files have other names
        paths.marker.unlink()
        for directory in (paths.coco, paths.clotho, paths.audiocaps, paths.voxceleb):
            shutil.rmtree(directory, ignore_errors=True)
    _write_all(paths, seed)
    write_json(paths.marker, {"made": wanted, "files": _count_files(paths)})
    return paths


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Wait until no other process builds there."""
    handle = open_lock(root)
    try:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write_all(paths: DemoPaths, seed: int) -> None:
    def stream(number: int) -> np.random.Generator:
        return np.random.default_rng([VERSION, seed, number])

    scenes = all_scenes()
    order = stream(_COCO).permutation(len(scenes))
    demo_files.write_coco(paths.coco, [scenes[i] for i in order], stream(_COCO).spawn(1)[0])
    clips = all_clips()
    chosen = [clips[i] for i in stream(_CLIPS).permutation(len(clips))]
    rest = demo_files.write_clotho(paths.clotho, chosen, stream(_CLOTHO))
    demo_files.write_audiocaps(paths.audiocaps, rest, stream(_AUDIOCAPS))
    demo_files.write_voxceleb(paths.voxceleb, stream(_VOXCELEB))


def _count_files(paths: DemoPaths) -> int:
    return sum(1 for path in paths.data_root.rglob("*") if path.is_file())


def _is_whole(paths: DemoPaths, done: dict[str, object]) -> bool:
    """Whether no file has gone since the demo was made; features may have been cached beside."""
    files = done.get("files")
    return isinstance(files, int) and _count_files(paths) >= files
