"""The demo's vases: what is drawn is what the records say."""

import json
from dataclasses import replace

import numpy as np
import pytest

from shared.images import problem
from vasevqa.demo_data import vases as demo_vases
from vasevqa.demo_data.vases import FLAWS, VIEWS, Vase, build_images, render

VASE = Vase("0" * 8, "Attic", "black-figure", "amphora", "star", seed=5)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_vases, "NUM_VASES", 20)
    monkeypatch.setattr(demo_vases, "NUM_LABELLED", 3)
    return build_images(tmp_path, seed=0)


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
    assert len(exported) == 17 * len(VIEWS) + 3 and len(names) == len(exported) + 6
