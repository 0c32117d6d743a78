"""The demo's vases: what is drawn is what the records say."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from shared.images import problem, read_rgb
from vasevqa.demo_data import vases as demo_vases
from vasevqa.demo_data.vases import FLAWS, VIEWS, Vase, build_images, make_vases, render

VASE = Vase("0" * 8, "Attic", "black-figure", "amphora", "star", seed=5)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return build_images(tmp_path_factory.mktemp("vases"), seed=0)


def test_the_same_seed_gives_the_same_vases_and_another_others():
    assert make_vases(5, 0) == make_vases(5, 0)
    assert make_vases(5, 0) != make_vases(5, 1)
    assert np.array_equal(render(VASE, 2), render(VASE, 2))


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


def test_the_front_shows_the_motif_in_the_middle():
    front, side = render(VASE, 1).astype(float), render(VASE, 2).astype(float)
    middle = slice(70, 90)
    assert front[80:95, middle].mean() < side[80:95, middle].mean() - 40  # black on orange clay


def test_the_flaws_are_what_they_are_called():
    whole = render(VASE, 1).astype(float)
    found = {flaw: render(VASE, 1, flaw).astype(float) for flaw in FLAWS}

    def sharpness(picture):
        return np.abs(np.diff(picture, axis=0)).max()

    assert found["dark"].mean() < 0.3 * whole.mean()
    assert sharpness(found["blurred"]) < 0.4 * sharpness(whole)
    assert np.abs(found["cropped"] - whole).mean() > 15
    broken = render(replace(VASE, is_broken=True), 1).astype(float)
    assert np.abs(broken - whole).max(axis=2).mean() > 8


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


def test_a_second_build_touches_nothing_and_another_seed_draws_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_vases, "NUM_VASES", 5)
    monkeypatch.setattr(demo_vases, "NUM_LABELLED", 3)

    def digest():
        contents = (path.read_bytes() for path in sorted(tmp_path.rglob("*.*")))
        return hashlib.sha256(b"".join(contents)).hexdigest()

    build_images(tmp_path, 0)
    first = digest()
    drawn = (tmp_path / "truth.json").stat().st_mtime_ns
    build_images(tmp_path, 0)
    assert (tmp_path / "truth.json").stat().st_mtime_ns == drawn
    build_images(tmp_path, 1)
    assert digest() != first
    build_images(tmp_path, 0)
    assert digest() == first
