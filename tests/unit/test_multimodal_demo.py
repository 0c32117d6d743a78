"""The demo data: one seed, one set of files, in the real layouts; what is held out is new."""

import pytest

from multimodal.datasets import AudioCaps, Clotho, Coco
from multimodal.demo_data import pictures, sounds
from tests import multimodal_demo


@pytest.fixture(scope="session")
def made():
    return multimodal_demo.made()


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
