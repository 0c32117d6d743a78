"""The demo data: one seed, one set of files, in the real layouts; what is held out is new."""

import hashlib
import shutil
import time

import numpy as np
import pytest

from multimodal.datasets import AudioCaps, Clotho, Coco
from multimodal.demo_data import demo, pictures, sounds
from shared.drawing import COLOURS
from tests import multimodal_demo


@pytest.fixture(scope="session")
def made():
    return multimodal_demo.made()


def digest(root):
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files_and_another_seed_others(made, tmp_path):
    again = demo.build(tmp_path / "again")
    other = demo.build(tmp_path / "other", seed=1)
    assert digest(again.data_root) == digest(made.data_root) != digest(other.data_root)


@pytest.mark.slow
@pytest.mark.serial
def test_it_is_made_in_ten_seconds_of_work(tmp_path):
    began = time.process_time()
    demo.build(tmp_path)
    assert time.process_time() - began < 10


def test_a_finished_demo_is_not_made_again(made):
    marker = made.root / "demo.json"
    before = marker.stat().st_mtime_ns
    assert demo.build(made.root).root == made.root and marker.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_demo_that_lacks_a_file_or_has_another_seed_is_made_again(made, tmp_path):
    shutil.copytree(made.root, tmp_path / "demo")
    victim = sorted((tmp_path / "demo/data/coco/val2017").iterdir())[0]
    victim.unlink()
    demo.build(tmp_path / "demo")
    assert digest(tmp_path / "demo/data") == digest(made.data_root)
    other = demo.build(tmp_path / "demo", seed=1)
    assert len(Coco(other.coco, "test")) == 100


def test_held_out_captions_are_those_of_no_trained_item(made):
    pictures = {s: Coco(made.coco, s) for s in ("train", "val", "test")}
    sounds = {s: (Clotho(made.clotho, s), AudioCaps(made.audiocaps, s)) for s in pictures}
    told = {
        split: {
            *(pictures[split].captions(i)[0] for i in range(len(pictures[split]))),
            *(data.captions(i)[0] for data in sounds[split] for i in range(len(data))),
        }
        for split in pictures
    }
    assert not told["train"] & (told["val"] | told["test"])
    assert len(told["test"]) == 100 + 60 + 48


def test_captions_tell_all_scenes_and_clips_apart():
    for things, captions, count in (
        (pictures.all_scenes(), pictures.captions, 1200),
        (sounds.all_clips(), sounds.captions, 760),
    ):
        for form in range(5):
            assert len({captions(thing)[form] for thing in things}) == len(things) == count


def test_a_scene_shows_what_its_caption_says():
    rng = np.random.default_rng(0)
    for scene in pictures.all_scenes()[::37]:
        canvas, boxes = pictures.draw(scene, rng)
        assert len(boxes) == scene.count
        colour = np.array(COLOURS[scene.colour], np.float32)
        near = np.abs(canvas - colour).max(axis=2) < 30
        ys, xs = near.nonzero()
        assert near.sum() > 50
        y, x = pictures.PLACES[scene.place]
        assert abs(ys.mean() / 96 - y) < 0.12 and abs(xs.mean() / 96 - x) < 0.12


@pytest.mark.parametrize("pitch", sounds.PITCHES)
@pytest.mark.parametrize("kind", sounds.KINDS)
def test_a_sound_has_the_pitch_that_its_caption_says(kind, pitch):
    other = sounds.Part("tone" if kind != "tone" else "buzz", "low")
    clip = sounds.Clip(sounds.Part(kind, pitch), other, "steady")
    wave = sounds.synthesise(clip, 16_000, np.random.default_rng(0))
    assert wave.shape == (32_000,) and np.abs(wave).max() <= 1
    spectrum = np.abs(np.fft.rfft(wave[:16_000])) ** 2
    weighted = np.exp((np.log(np.arange(1, 8001)) * spectrum[1:]).sum() / spectrum[1:].sum())
    assert 0.7 < weighted / sounds.PITCHES[pitch] < 1.45


def test_beats_are_silent_half_of_the_time():
    parts = sounds.Part("tone", "middle"), sounds.Part("buzz", "low")
    quiet = {}
    for rhythm in sounds.RHYTHMS:
        wave = sounds.synthesise(sounds.Clip(*parts, rhythm), 16_000, np.random.default_rng(0))
        loud = np.abs(wave[: 100 * 320]).reshape(100, 320).max(axis=1) > 0.05
        quiet[rhythm] = 1 - loud.mean()
    assert quiet["steady"] == 0 and 0.35 < quiet["beating"] < 0.55
