"""The demo's files: In-shop's layout, unseen items, no easy way out."""

from pathlib import Path

import numpy as np
import pytest

from arcface.demo_data import inshop_tree as demo
from arcface.inshop_retrieval.config import RECIPE, read_config
from arcface.inshop_retrieval.inshop import InShop, read_list
from arcface.inshop_retrieval.pipeline import build_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return demo.build(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def config():
    return read_config(RECIPE / "config/arcface/resnet18-arcface_demo.py")


def test_the_tree_is_in_shops(paths):
    lines = paths.partition.read_text().splitlines()
    assert lines[0] == str(len(lines) - 2) == "960"
    name = lines[2].split()[0]
    assert (paths.images / name).is_file()
    boxes = (paths.annotations / "list_bbox_inshop.txt").read_text().splitlines()
    assert boxes[2].split()[0] == name and len(boxes) == len(lines)
    left, top, right, bottom = map(int, boxes[2].split()[3:])
    assert 0 <= left < right < 112 and 0 <= top < bottom < 112
    assert (paths.annotations / "list_item_inshop.txt").read_text().splitlines()[0] == "160"


def test_no_test_item_is_trained_on_and_each_has_queries_and_gallery(paths):
    partition = read_list(paths.partition)
    assert partition.remarks() == []
    assert partition.train[0].name.endswith("/id_00000001/01_1_front.jpg")
    train, query, gallery = (
        [picture.item for picture in partition.split(name)]
        for name in ("train", "query", "gallery")
    )
    assert len(set(train)) == 120 and {train.count(item) for item in set(train)} == {6}
    assert not set(train) & {*query, *gallery}
    assert set(query) == set(gallery) and len(set(query)) == 40
    for split in (query, gallery):
        assert {split.count(item) for item in set(split)} == {3}


def test_the_demo_configuration_fits_the_demo(paths, config):
    settings = config["train_dataloader"]["dataset"]
    data = InShop(paths.data_root, "train", build_pipeline(settings["pipeline"]))
    assert data.num_classes == config["model"]["head"]["num_classes"]
    assert Path(settings["data_root"]) == demo.DemoPaths(Path("demo")).data_root
    assert data[0].image.shape == (3, 64, 64)


def thumbnails(images):
    return images.reshape(-1, 3, 8, 8, 8, 8).mean((3, 5))


def colours(images):
    """How often each of 5 x 5 x 5 colours occurs, in hundreds of pixels."""
    red, green, blue = (images * 4.999).astype(int).reshape(len(images), 3, -1).swapaxes(0, 1)
    bins = 25 * red + 5 * green + blue
    return np.stack([np.bincount(picture, minlength=125) for picture in bins]) / 100


def test_raw_pixels_and_colours_do_not_tell_the_items(paths, config):
    pipeline = build_pipeline(config["val_dataloader"]["dataset"]["pipeline"])
    query, gallery = (InShop(paths.data_root, split, pipeline) for split in ("query", "gallery"))
    asked, answers = (
        np.stack([data[i].image.numpy() for i in range(len(data))]) / 255
        for data in (query, gallery)
    )

    def recall(features):
        left, right = (features(images).reshape(len(images), -1) for images in (asked, answers))
        distances = ((left[:, None] - right[None]) ** 2).sum(2)
        return (gallery.labels[distances.argmin(1)] == query.labels).float().mean().item()

    found = [recall(thumbnails), recall(lambda images: images.mean((2, 3))), recall(colours)]
    print(f"found by thumbnail, mean colour and colours: {found}")
    assert found[0] < 0.4 and found[1] < 0.3 and found[2] < 0.4
