"""The demo's vases: what is drawn is what the records say."""

import json
from dataclasses import replace

import numpy as np
import pytest

from shared.images import problem, read_rgb
from vasevqa.demo_data import vases as demo_vases
from vasevqa.demo_data.vases import FLAWS, VIEWS, Vase, build_images, render

VASE = Vase("0" * 8, "Attic", "black-figure", "amphora", "star", seed=5)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return build_images(tmp_path_factory.mktemp("vases"), seed=0)


@pytest.mark.parametrize("name", ["fabric", "technique", "shape", "decoration"])
def test_every_attribute_can_be_seen(name):
    values = {
        "fabric": demo_vases.FABRICS,
        "technique": demo_vases.TECHNIQUES,
        "shape": demo_vases.SHAPES,
        "decoration": demo_vases.DECORATIONS,
    }[name]
    looks = [render(replace(VASE, **{name: value}), 1).astype(float) for value in values]
    for number, look in enumerate(looks):
        for other in looks[:number]:
            assert np.abs(look - other).max(axis=2).mean() > 1.0


def test_the_folders_hold_what_the_truth_says(pictures):
    truth = json.loads(pictures.truth.read_text())
    names = {path.relative_to(pictures.images).as_posix() for path in pictures.images.rglob("*.*")}
    assert names == set(truth)
    for name, kind in truth.items():
        assert (problem(pictures.images / name) is not None) == (kind == "corrupt"), name
    assert {"good", "broken", "corrupt", *FLAWS} == set(truth.values())
    exported = [name for name in names if name.endswith(demo_vases.SUFFIX)]
    assert len(exported) == 45 * len(VIEWS) + 3 and len(names) == len(exported) + 6


def test_the_quality_set_has_both_labels_and_pictures_of_one_size(pictures):
    for label in ("0", "1"):
        files = sorted((pictures.labelled / label).glob("*_ac001001.jpg"))
        assert len(files) == demo_vases.NUM_LABELLED
        assert read_rgb(files[0]).shape == (3, demo_vases.SIZE, demo_vases.SIZE)
