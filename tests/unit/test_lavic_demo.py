"""The lavic demo: what its files hold, that a seed gives the same ones, and what can be known."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from lavic.demo_data import demo
from lavic.demo_data.lessons import LOOK_WORDS, Exercises
from lavic.demo_data.model import make_tokenizer
from lavic.demo_data.products import PRODUCT_COLOURS, SIZES, all_looks, make_items
from lavic.src.catalogue import read_samples, read_titles
from shared.drawing import COLOURS


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return written(tmp_path_factory.mktemp("demo"), 0)


def written(root, seed):
    """The data alone: no model is made."""
    paths = demo.DemoPaths(root)
    for folder in (paths.train_images, paths.valid_images, paths.talks):
        folder.mkdir(parents=True)
    demo.write_data(paths, seed)
    return paths


def talks(paths, split):
    lines = (paths.talks / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def looks_of(paths):
    """{id: (colour, background)} as the descriptions say."""
    items = json.loads(paths.train_data.read_text(encoding="utf-8"))
    found = {}
    for name, item in items.items():
        (words,) = set(item["image_descriptions_llava_cleaned"].values())
        _, colour, _, _, _, background = words.rstrip(".").split()
        found[name] = (colour, background)
    return found


def test_the_files_are_in_the_documented_forms(paths):
    train = read_samples(paths.train_data, paths.train_images)
    valid = read_samples(paths.val_data, paths.valid_images)
    assert (len(train.usable), len(valid.usable)) == (324, 54)
    assert not train.missing + valid.missing
    first = json.loads(paths.val_data.read_text(encoding="utf-8").splitlines()[0])
    assert set(first) == {"title", "image_name", "image", "image_description_llava_cleaned"}
    keys = {"context", "context_items", "gt", "gt_items", "candidates_st", "candidates_gpt_large"}
    assert all(set(talk) == keys for split in demo.NUM_TALKS for talk in talks(paths, split))


def test_no_look_of_the_validation_is_in_the_training(paths):
    train = {s.description for s in read_samples(paths.train_data, paths.train_images).usable}
    valid = {s.description for s in read_samples(paths.val_data, paths.valid_images).usable}
    assert not train & valid
    assert len(train | valid) == len(all_looks()) == 270


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


def test_titles_say_nothing_of_the_picture(paths):
    words = {word for look in all_looks() for word in look}
    assert not any(
        words & set(title.lower().split()) for title in read_titles(paths.train_data).values()
    )


def test_pictures_of_three_four_and_five_views_occur(paths):
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    from lavic.demo_data.model import GRIDS, SIDE

    counts = [image_size_to_num_patches([h, w], GRIDS, SIDE) for w, h in SIZES]
    assert counts == [5, 5, 5, 3, 3, 4, 4]


@pytest.mark.parametrize("split", demo.NUM_TALKS)
@pytest.mark.parametrize("kind", ["candidates_st", "candidates_gpt_large"])
def test_what_is_asked_for_is_the_one_candidate_of_that_colour_and_background(paths, split, kind):
    looks, present = looks_of(paths), 0
    rows = talks(paths, split)
    for talk in rows:
        (wanted,) = talk["gt_items"]
        assert all(word in talk["context"] for word in looks[wanted])
        assert len(set(talk[kind])) == 10
        fitting = [item for item in talk[kind] if looks[item] == looks[wanted]]
        assert fitting == ([wanted] if wanted in talk[kind] else [])
        present += bool(fitting)
    low, high = (0.6, 0.9) if kind == "candidates_st" else (0.8, 0.99)
    assert low < present / len(rows) < high  # the ceiling is below 1


def test_the_talks_of_the_test_are_in_no_other_file_and_neither_are_some_of_their_products(paths):
    found = {s: {json.dumps(t["candidates_st"]) for t in talks(paths, s)} for s in demo.NUM_TALKS}
    assert not found["test"] & (found["train"] | found["valid"])
    asked = {s: [t["gt_items"][0] for t in talks(paths, s)] for s in demo.NUM_TALKS}
    known = set(asked["train"])
    assert 10 < sum(item not in known for item in asked["test"]) < 30
    ids = list(looks_of(paths))
    assert {len(name) for name in ids} == {10}
    assert 10 < sum(not name.startswith("B") for name in ids) < 40
    assert max(len(talk["context"]) for talk in talks(paths, "train")) > 4000


def test_in_an_exercise_one_look_fits_the_question_and_the_answer_is_its_id_and_the_end():
    items = make_items(all_looks()[:200], np.random.default_rng(0))
    tokenizer = make_tokenizer(items)
    make = Exercises(tokenizer, items, seed=0)
    for number in range(20):
        row = make.asked_before(10, "ws", is_short=number % 2 == 0)
        asked = re.findall(r"[a-z]+", tokenizer.decode(row.tokens[: row.places[0]]))
        looks = [tuple(LOOK_WORDS[word] for word in look) for look in row.seen]
        assert set(looks) <= {tuple(item.look) for item in items}  # no other occurs
        fitting = {
            owner
            for owner, (colour, _, _, background) in zip(row.owners, looks, strict=True)
            if colour in asked and background in asked
        }
        said = [row.tokens[place] for place in row.answers]
        assert said == [*fitting, tokenizer.eos_token_id]
        assert row.answers[-1] == len(row.tokens) - 1
