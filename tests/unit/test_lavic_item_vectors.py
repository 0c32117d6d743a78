"""Vectors of pictures: equal to the tower's, computed once, never mixed up."""

from __future__ import annotations

import shutil

import pytest
import torch

from lavic.src.recommend import item_vectors
from lavic.src.recommend.item_vectors import Tower, prepare
from lavic.src.vision.adapters import load_adapter
from lavic.src.vision.model import cls_vectors, picture_views
from shared.distributed import World
from shared.errors import UserError
from shared.images import read_rgb
from tests.lavic_talks import DAMAGED, MISSING, load, nano, shake


@pytest.fixture(scope="module")
def tower():
    model, processor, _ = load(nano())
    return Tower(load_adapter(model, nano().adapter), processor)


@pytest.fixture
def computed(monkeypatch):
    """How many pictures went through the tower."""
    counts = []
    original = Tower.vectors

    def counting(self, views):
        counts.append(len(views))
        return original(self, views)

    monkeypatch.setattr(Tower, "vectors", counting)
    return counts


def ids():
    return [item.id for item in nano().items]


def test_the_vectors_are_those_of_the_tower_with_its_adapter(tower, tmp_path):
    vectors = prepare(ids(), nano().images, tower, tmp_path, World(), workers=0)
    for item in ids()[2:6]:
        views = picture_views(tower.processor, read_rgb(nano().images / f"{item}_0.jpg"))
        with torch.no_grad():
            expected = cls_vectors(tower.model, views)
        found, counts = vectors.of([item])
        assert counts == [len(views)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert {3, 4, 5} == set(vectors.views.values())
    together, counts = vectors.of([ids()[2], ids()[3], ids()[2]])
    assert len(together) == sum(counts)
    assert torch.equal(together[: counts[0]], together[-counts[0] :])


def test_pictures_that_are_missing_or_damaged_have_no_vectors_and_a_reason(tower, tmp_path, caplog):
    vectors = prepare(ids(), nano().images, tower, tmp_path, World(), workers=0)
    missing, damaged = ids()[MISSING], ids()[DAMAGED]
    assert set(vectors.without) == {missing, damaged}
    assert vectors.without[missing] == "missing"
    assert vectors.without[damaged] == "damaged (Truncated File Read)"
    assert "2 of 24 candidates (8.3 %) have no usable picture" in caplog.text
    assert missing not in vectors.views and damaged not in vectors.views


def test_a_picture_goes_through_the_tower_once(tower, tmp_path, computed):
    first = prepare(ids(), nano().images, tower, tmp_path, World(), workers=0)
    assert sum(computed) == 22
    computed.clear()
    again = prepare(reversed(ids()), nano().images, tower, tmp_path, World(), workers=0)
    assert computed == []
    assert all(torch.equal(first.of([i])[0], again.of([i])[0]) for i in first.views)


def test_a_changed_picture_is_computed_again_and_no_other(tower, tmp_path, computed):
    images = tmp_path / "images"
    shutil.copytree(nano().images, images)
    prepare(ids(), images, tower, tmp_path / "cache", World(), workers=0)
    computed.clear()
    shutil.copyfile(images / f"{ids()[5]}_0.jpg", images / f"{ids()[6]}_0.jpg")
    vectors = prepare(ids(), images, tower, tmp_path / "cache", World(), workers=0)
    assert computed == []  # this content is known under another name
    assert torch.equal(vectors.of([ids()[5]])[0], vectors.of([ids()[6]])[0])
    (images / f"{ids()[MISSING]}_0.jpg").write_bytes(
        (images / f"{ids()[7]}_0.jpg").read_bytes() + b" "
    )
    prepare(ids(), images, tower, tmp_path / "cache", World(), workers=0)
    assert sum(computed) == 1


def test_another_adapter_never_meets_old_vectors(tower, tmp_path, computed):
    prepare(ids(), nano().images, tower, tmp_path, World(), workers=0)
    computed.clear()
    model, processor, _ = load(nano())
    other = Tower(load_adapter(model, nano().adapter), processor)
    assert other.key() == tower.key()
    shake(other.model, seed=5)
    assert other.key() != tower.key()
    prepare(ids(), nano().images, other, tmp_path, World(), workers=0)
    assert sum(computed) == 22


def test_damaged_files_of_vectors_are_computed_again(tower, tmp_path, computed, monkeypatch):
    monkeypatch.setattr(item_vectors, "_PICTURES_A_FILE", 8)
    first = prepare(ids(), nano().images, tower, tmp_path, World(), workers=0)
    files = sorted((tmp_path / tower.key()).glob("*.safetensors"))
    assert len(files) >= 2
    files[0].write_bytes(files[0].read_bytes()[:-50])
    files[1].write_bytes(b"")
    computed.clear()
    again = prepare(ids(), nano().images, tower, tmp_path, World(), workers=0)
    assert 0 < sum(computed) <= 22
    assert all(torch.allclose(first.of([i])[0], again.of([i])[0], atol=1e-5) for i in first.views)


def test_vectors_keep_the_models_precision(tower, tmp_path):
    model, processor, _ = load(nano())
    half = Tower(load_adapter(model.to(torch.bfloat16), nano().adapter), processor)
    assert half.key() != tower.key()
    vectors = prepare(ids()[:4], nano().images, half, tmp_path, World(), workers=0)
    assert vectors.of(ids()[2:4])[0].dtype == torch.bfloat16


def test_workers_give_the_same_vectors(tower, tmp_path):
    alone = prepare(ids(), nano().images, tower, tmp_path / "a", World(), workers=0)
    shared = prepare(ids(), nano().images, tower, tmp_path / "b", World(), workers=2)
    assert all(torch.equal(alone.of([i])[0], shared.of([i])[0]) for i in alone.views)


def test_without_one_picture_there_is_nothing_to_do(tower, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds not one usable picture of the 24 candidates"):
        prepare(ids(), tmp_path / "empty", tower, tmp_path, World(), workers=0)


def test_an_id_that_leads_elsewhere_has_no_picture(tower, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(nano().images, images)
    (tmp_path / "secret_0.jpg").write_bytes((images / f"{ids()[3]}_0.jpg").read_bytes())
    vectors = prepare(["../secret", ids()[3]], images, tower, tmp_path / "c", World(), workers=0)
    assert vectors.without == {"../secret": "missing"}
