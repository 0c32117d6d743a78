"""The lavic demo: what its files hold, and what can be known from them."""

import json

import numpy as np
import pytest
from PIL import Image

from lavic.demo_data import demo
from lavic.demo_data.products import PRODUCT_COLOURS, all_looks
from lavic.src.catalogue import read_samples, read_titles
from shared.drawing import COLOURS


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The data alone: no model is made."""
    paths = demo.DemoPaths(tmp_path_factory.mktemp("demo"))
    for folder in (paths.train_images, paths.valid_images, paths.talks):
        folder.mkdir(parents=True)
    demo.write_data(paths, 0)
    return paths


@pytest.fixture(scope="module")
def talks(paths):
    """{split: its conversations}."""
    return {
        split: [json.loads(line) for line in (paths.talks / f"{split}.jsonl").open("rb")]
        for split in demo.NUM_TALKS
    }


def test_no_look_of_the_validation_is_in_the_training_and_titles_say_nothing_of_it(paths):
    train = read_samples(paths.train_data, paths.train_images)
    valid = read_samples(paths.val_data, paths.valid_images)
    assert (len(train.usable), len(valid.usable)) == (324, 54)
    assert not train.missing + valid.missing
    seen, unseen = ({one.description for one in found.usable} for found in (train, valid))
    assert not seen & unseen
    assert len(seen | unseen) == len(all_looks()) == 270
    words = {word for look in all_looks() for word in look}
    titles = read_titles(paths.train_data).values()
    assert not any(words & set(title.lower().split()) for title in titles)


def test_pictures_show_the_colour_and_background_that_are_said(paths):
    for sample in read_samples(paths.val_data, paths.valid_images).usable:
        with Image.open(sample.image_path) as image:
            pixels = np.asarray(image.convert("RGB"), np.float64)
        words = sample.description.rstrip(".").split()
        corner = pixels[:4, :4].reshape(-1, 3).mean(0)
        assert np.abs(corner - COLOURS[words[-1]]).max() < 12
        share = {
            colour: (np.abs(pixels - COLOURS[colour]).max(2) < 25).mean()
            for colour in PRODUCT_COLOURS
        }
        assert max(share, key=share.__getitem__) == words[1], sample


@pytest.mark.parametrize("split", demo.NUM_TALKS)
@pytest.mark.parametrize(
    ("kind", "low", "high"), [("candidates_st", 0.6, 0.9), ("candidates_gpt_large", 0.8, 0.99)]
)
def test_what_is_asked_for_is_the_one_candidate_of_that_colour_and_background(
    paths, talks, split, kind, low, high
):
    looks = {}
    for item, entry in json.loads(paths.train_data.read_bytes()).items():
        (text,) = set(entry["image_descriptions_llava_cleaned"].values())
        _, colour, _, _, _, background = text.rstrip(".").split()
        looks[item] = (colour, background)
    present = 0
    for talk in talks[split]:
        (wanted,) = talk["gt_items"]
        assert all(word in talk["context"] for word in looks[wanted])
        assert len(set(talk[kind])) == 10
        fitting = [item for item in talk[kind] if looks[item] == looks[wanted]]
        assert fitting == ([wanted] if wanted in talk[kind] else [])
        present += bool(fitting)
    assert low < present / len(talks[split]) < high  # the ceiling is below 1


def test_the_talks_of_the_test_are_in_no_other_file_and_neither_are_some_of_their_products(talks):
    lists = {s: {json.dumps(talk["candidates_st"]) for talk in talks[s]} for s in talks}
    assert not lists["test"] & (lists["train"] | lists["valid"])
    asked = {s: [talk["gt_items"][0] for talk in talks[s]] for s in talks}
    assert 10 < sum(item not in asked["train"] for item in asked["test"]) < 30
    assert any(not item.startswith("B") for item in asked["test"])  # as a book's
    assert max(len(talk["context"]) for talk in talks["train"]) > 4000
