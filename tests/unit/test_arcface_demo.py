"""The demo's files: In-shop's layout, same seed same bytes, unseen items, no easy way out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcface.demo_data import inshop_tree as demo
from arcface.inshop_retrieval.config import RECIPE, read_config
from arcface.inshop_retrieval.inshop import InShop, read_list
from arcface.inshop_retrieval.pipeline import build_pipeline


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return demo.build(tmp_path_factory.mktemp("demo"))


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
