"""The demo's files: In-shop's layout, same seed same bytes, unseen items, no easy way out."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcface.demo_data import inshop_tree as demo
from arcface.demo_data.garments import (
    PATTERNS,
    draw_garment,
    draw_shot,
    num_styles,
    style_of,
)
from arcface.inshop_retrieval.config import RECIPE, read_config
from arcface.inshop_retrieval.inshop import InShop, read_list
from arcface.inshop_retrieval.pipeline import build_pipeline


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return demo.build(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def small(monkeypatch):
    """Three items, so that a build takes a moment."""
    monkeypatch.setattr(demo, "NUM_TRAIN_ITEMS", 2)
    monkeypatch.setattr(demo, "NUM_TEST_ITEMS", 1)


def digests(paths):
    files = [path for path in paths.data_root.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(paths.root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.mark.slow
def test_the_tree_is_in_shops(paths):
    lines = paths.partition.read_text().splitlines()
    assert lines[0] == str(len(lines) - 2) == "960"
    assert lines[1].split() == ["image_name", "item_id", "evaluation_status"]
    name, item, status = lines[2].split()
    assert (item, status) == ("id_00000001", "train")
    department, _category, folder, file = name.removeprefix("img/").split("/")
    assert department in ("MEN", "WOMEN") and folder == item and file == "01_1_front.jpg"
    assert Image.open(paths.images / name).size == (112, 112)
    boxes = (paths.annotations / "list_bbox_inshop.txt").read_text().splitlines()
    assert boxes[2].split()[0] == name and len(boxes) == len(lines)
    left, top, right, bottom = map(int, boxes[2].split()[3:])
    assert 0 <= left < right < 112 and 0 <= top < bottom < 112
    assert (paths.annotations / "list_item_inshop.txt").read_text().splitlines()[0] == "160"


@pytest.mark.slow
def test_no_test_item_is_trained_on_and_each_has_queries_and_gallery(paths):
    partition = read_list(paths.partition)
    assert partition.remarks() == []
    train, query, gallery = (
        [picture.item for picture in partition.split(name)]
        for name in ("train", "query", "gallery")
    )
    assert len(set(train)) == 120 and {train.count(item) for item in set(train)} == {6}
    assert not set(train) & {*query, *gallery}
    assert set(query) == set(gallery) and len(set(query)) == 40
    assert (
        {query.count(item) for item in set(query)}
        == {3}
        == {gallery.count(item) for item in set(gallery)}
    )


@pytest.mark.slow
def test_raw_pixels_and_colours_do_not_tell_the_items(paths):
    config = read_config(RECIPE / "config/arcface/resnet18-arcface_demo.py")
    pipeline = build_pipeline(config["val_dataloader"]["dataset"]["pipeline"])
    query, gallery = (InShop(paths.data_root, split, pipeline) for split in ("query", "gallery"))

    def recall(features):
        asked, answers = (
            np.stack([features(data[i].image.numpy() / 255).ravel() for i in range(len(data))])
            for data in (query, gallery)
        )
        distances = ((asked[:, None] - answers[None]) ** 2).sum(2)
        found = gallery.labels[distances.argmin(1)]
        return (found == query.labels).float().mean().item()

    def thumbnail(image):
        return image.reshape(3, 8, 8, 8, 8).mean((2, 4))

    def colours(image):
        return np.histogramdd(image.reshape(3, -1).T, bins=5, range=[(0, 1)] * 3)[0] / 100

    assert recall(thumbnail) < 0.4
    assert recall(lambda image: image.mean((1, 2))) < 0.3
    assert recall(colours) < 0.4


@pytest.mark.slow
def test_the_demo_configuration_fits_the_demo(paths):
    config = read_config(RECIPE / "config/arcface/resnet18-arcface_demo.py")
    settings = config["train_dataloader"]["dataset"]
    data = InShop(paths.data_root, "train", build_pipeline(settings["pipeline"]))
    assert data.num_classes == config["model"]["head"]["num_classes"]
    assert Path(settings["data_root"]) == demo.DemoPaths(Path("demo")).data_root
    assert data[0].image.shape == (3, 64, 64)


def test_items_differ_in_cut_pattern_or_colour():
    styles = [style for _, style, _ in demo._items(0)]
    assert len(styles) == 160
    assert {style.pattern for style in styles} == set(PATTERNS)
    looks = {
        (s.sleeves, s.length, s.is_flared, s.has_v_neck, s.pattern, *s.cloth.round(3))
        for s in styles
    }
    assert len(looks) == 160
    assert num_styles() == 2160


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others(tmp_path, small):
    first, again, other = (
        digests(demo.build(tmp_path / name, seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again and len(first) == 3 * 6 + 3
    images = {digest for name, digest in first.items() if name.endswith(".jpg")}
    assert len(images) == 18
    assert not images & {digest for name, digest in other.items() if name.endswith(".jpg")}


def test_a_finished_build_is_kept_and_a_partial_one_is_drawn_again(tmp_path, small):
    paths = demo.build(tmp_path)
    files = [path for path in paths.data_root.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    demo.build(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    digest = digests(paths)
    next(paths.images.rglob("*.jpg")).unlink()
    demo.build(tmp_path)
    assert digests(paths) == digest
    (paths.root / "demo.json").unlink()
    paths.partition.write_text("half")
    demo.build(tmp_path)
    assert digests(paths) == digest


def test_another_seed_leaves_no_picture_of_the_one_before(tmp_path, small):
    demo.build(tmp_path, seed=0)
    paths = demo.build(tmp_path, seed=1)
    listed = {line.split()[0] for line in paths.partition.read_text().splitlines()[2:]}
    found = {str(path.relative_to(paths.images)) for path in paths.images.rglob("*.jpg")}
    assert found == listed


def test_a_garment_keeps_its_look_when_only_the_shot_changes():
    rng = np.random.default_rng(0)
    ours, other = style_of(100, rng), style_of(1100, rng)
    shots = [draw_shot("front", rng) for _ in range(2)]
    image, (left, top, right, bottom) = draw_garment(ours, shots[0])
    assert image.shape == (112, 112, 3) and image.dtype == np.uint8
    assert np.array_equal(image, draw_garment(ours, shots[0])[0])
    assert not np.array_equal(image, draw_garment(ours, shots[1])[0])
    others_image, others_box = draw_garment(other, shots[0])
    changed = (image != others_image).any(2)
    assert changed[top : bottom + 1, left : right + 1].mean() > 0.3
    # The rest of the picture is the shot's; a box leaves out pixels that are covered in part.
    assert not changed[: min(top, others_box[1]) - 2].any()
    assert not changed[:, : min(left, others_box[0]) - 2].any()
