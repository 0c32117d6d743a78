"""The demo data: in the real layouts, and what is held out is new."""

from multimodal.datasets import AudioCaps, Clotho, Coco
from multimodal.demo_data import pictures, sounds
from tests import multimodal_data


def test_held_out_captions_are_those_of_no_trained_item():
    made = multimodal_data.made()
    told = {}
    for split in ("train", "val", "test"):
        sets = [
            Coco(made.coco, split),
            Clotho(made.clotho, split),
            AudioCaps(made.audiocaps, split),
        ]
        told[split] = {data.captions(i)[0] for data in sets for i in range(len(data))}
    assert not told["train"] & (told["val"] | told["test"])
    assert len(told["test"]) == 8 + 6 + 5


def test_captions_tell_all_scenes_and_clips_apart():
    for things, captions, count in (
        (pictures.all_scenes(), pictures.captions, 1200),
        (sounds.all_clips(), sounds.captions, 760),
    ):
        for form in range(5):
            assert len({captions(thing)[form] for thing in things}) == len(things) == count
