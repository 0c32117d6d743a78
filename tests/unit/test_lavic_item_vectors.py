"""Vectors of pictures: equal to the tower's, computed once, never mixed up."""

from __future__ import annotations

import shutil

import pytest
import torch

from lavic.src.recommend import item_vectors
from lavic.src.recommend.item_vectors import Tower
from lavic.src.vision.adapters import load_adapter
from lavic.src.vision.model import cls_vectors, picture_views
from shared.distributed import World
from shared.errors import UserError
from shared.images import read_rgb
from tests.lavic_talks import DAMAGED, MISSING, load, nano, shake


def a_tower(dtype=torch.float32):
    model, processor, _ = load(nano())
    return Tower(load_adapter(model.to(dtype), nano().adapter), processor)


@pytest.fixture(scope="module")
def tower():
    return a_tower()


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


@pytest.fixture(scope="module")
def ids():
    return [item.id for item in nano().items]


def prepare(tower, items, cache, images=None, workers=0):
    images = images or nano().images
    return item_vectors.prepare(items, images, tower, cache, World(), workers=workers)


def test_the_vectors_are_those_of_the_tower_whoever_reads_the_pictures(tower, ids, tmp_path):
    vectors = prepare(tower, ids, tmp_path / "alone")
    for item in ids[2:6]:
        views = picture_views(tower.processor, read_rgb(nano().images / f"{item}_0.jpg"))
        with torch.no_grad():
            expected = cls_vectors(tower.model, views)
        found, counts = vectors.of([item])
        assert counts == [len(views)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert {3, 4, 5} == set(vectors.views.values())
    together, counts = vectors.of([ids[2], ids[3], ids[2]])
    assert len(together) == sum(counts)
    assert torch.equal(together[: counts[0]], together[-counts[0] :])
    by_workers = prepare(tower, ids, tmp_path / "workers", workers=2)
    assert all(torch.equal(vectors.of([i])[0], by_workers.of([i])[0]) for i in vectors.views)


def test_pictures_that_are_missing_or_damaged_have_no_vectors_and_a_reason(
    tower, ids, tmp_path, caplog
):
    (tmp_path / "images").mkdir()
    for source in nano().images.iterdir():
        shutil.copyfile(source, tmp_path / "images" / source.name)
    shutil.copyfile(nano().images / f"{ids[3]}_0.jpg", tmp_path / "secret_0.jpg")
    items = [*ids, "../secret"]  # an id that leads elsewhere has no picture
    vectors = prepare(tower, items, tmp_path / "cache", tmp_path / "images")
    assert vectors.without == {
        "../secret": "missing",
        ids[MISSING]: "missing",
        ids[DAMAGED]: "damaged (Truncated File Read)",
    }
    assert "3 of 25 candidates (12.0 %) have no usable picture" in caplog.text
    assert vectors.views.keys() == set(ids) - {ids[MISSING], ids[DAMAGED]}
    with pytest.raises(UserError, match="holds not one usable picture of the 24 candidates"):
        prepare(tower, ids, tmp_path, tmp_path / "cache")


def test_a_content_goes_through_the_tower_once(tower, ids, tmp_path, computed):
    images = shutil.copytree(nano().images, tmp_path / "images")
    first = prepare(tower, ids, tmp_path / "cache", images)
    assert sum(computed) == 22
    computed.clear()
    again = prepare(tower, reversed(ids), tmp_path / "cache", images)
    assert all(torch.equal(first.of([i])[0], again.of([i])[0]) for i in first.views)
    shutil.copyfile(images / f"{ids[5]}_0.jpg", images / f"{ids[6]}_0.jpg")
    vectors = prepare(tower, ids, tmp_path / "cache", images)
    assert computed == []  # the content is known under another name
    assert torch.equal(vectors.of([ids[5]])[0], vectors.of([ids[6]])[0])
    other = (images / f"{ids[7]}_0.jpg").read_bytes() + b" "
    (images / f"{ids[MISSING]}_0.jpg").write_bytes(other)
    prepare(tower, ids, tmp_path / "cache", images)
    assert sum(computed) == 1


def test_another_adapter_and_another_precision_never_meet_old_vectors(
    tower, ids, tmp_path, computed
):
    prepare(tower, ids, tmp_path)
    computed.clear()
    same, other, half = a_tower(), a_tower(), a_tower(torch.bfloat16)
    shake(other.model, seed=5)
    assert tower.key() == same.key() and len({tower.key(), other.key(), half.key()}) == 3
    prepare(other, ids, tmp_path)
    assert sum(computed) == 22
    vectors = prepare(half, ids[:4], tmp_path)
    assert vectors.of(ids[2:4])[0].dtype == torch.bfloat16


def test_damaged_files_of_vectors_are_computed_again(tower, ids, tmp_path, computed, monkeypatch):
    monkeypatch.setattr(item_vectors, "_PICTURES_A_FILE", 8)
    first = prepare(tower, ids, tmp_path)
    files = sorted((tmp_path / tower.key()).glob("*.safetensors"))
    assert len(files) >= 2
    files[0].write_bytes(files[0].read_bytes()[:-50])
    files[1].write_bytes(b"")
    computed.clear()
    again = prepare(tower, ids, tmp_path)
    assert 0 < sum(computed) <= 22
    assert all(torch.allclose(first.of([i])[0], again.of([i])[0], atol=1e-5) for i in first.views)
