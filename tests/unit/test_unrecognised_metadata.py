"""A list in which nothing is recognised is refused by whoever reads it, with its name.

A reader that takes such a list for an empty one trains on what the list was to hold out.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from arcface.inshop_retrieval.inshop import read_list
from face_distill.distill.pairs import read_pairs
from face_distill.distill.teacher import TeacherFeatures
from lavic.src.catalogue import read_pictures, read_samples, read_titles
from multimodal.datasets import AudioCaps, Clotho, Coco
from multimodal.demo_data import demo
from shared.errors import UserError
from vasevqa.model import training_files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return demo.build(tmp_path_factory.mktemp("multimodal"))


@pytest.fixture
def coco(made, tmp_path):
    return shutil.copytree(made.coco, tmp_path / "coco")


@pytest.fixture
def clotho(made, tmp_path):
    return shutil.copytree(made.clotho, tmp_path / "clotho")


def changed(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def renumber(entries: list[dict], key: str) -> None:
    for entry in entries:
        entry[key] += 1_000_000


# --- COCO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_karpathys_list_of_other_pictures(coco, split):
    changed(coco / "karpathy/coco_test_karpathy.json", lambda c: renumber(c["images"], "id"))
    with pytest.raises(UserError, match=r"coco_test_karpathy\.json: of 100 pictures .* none is"):
        Coco(coco, split)


@pytest.mark.parametrize("name", ["validation", None])
def test_karpathys_list_with_other_names_of_the_splits(coco, name):
    shutil.rmtree(coco / "karpathy")
    first = Coco(coco, "train").group_of(0)
    listed = [{"cocoid": first, "split": "test"}, {"cocoid": first + 1, "split": name}]
    (coco / "dataset_coco.json").write_text(json.dumps({"images": listed}))
    with pytest.raises(UserError, match=r"dataset_coco\.json: of 0 pictures of the split val"):
        Coco(coco, "train")


def test_captions_of_other_pictures(coco):
    path = coco / "annotations/captions_val2017.json"
    changed(path, lambda content: renumber(content["annotations"], "image_id"))
    with pytest.raises(UserError, match=r"captions_val2017\.json: none of \d+ captions"):
        Coco(coco, "train")


def test_instances_of_other_pictures(coco):
    for path in (coco / "annotations").glob("instances_*.json"):
        changed(path, lambda content: renumber(content["annotations"], "image_id"))
    with pytest.raises(UserError, match=r"instances_\*2017\.json: no image_id is one of"):
        Coco(coco, "train")


# --- Clotho, AudioCaps ----------------------------------------------------------------------------


def test_clothos_metadata_of_other_clips(clotho):
    path = clotho / "clotho_metadata_evaluation.csv"
    shutil.copy(clotho / "clotho_metadata_development.csv", path)
    with pytest.raises(
        UserError, match=r"metadata_evaluation\.csv has keywords for none of the 60"
    ):
        Clotho(clotho, "test")


@pytest.mark.parametrize(("data_set", "name"), [(Clotho, "clotho_captions_development.csv"),
                                                (AudioCaps, "train.csv")])  # fmt: skip
def test_a_table_of_a_header_alone(made, tmp_path, data_set, name):
    root = made.clotho if data_set is Clotho else made.audiocaps
    header = (root / name).read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / name).write_text(header + "\n")
    with pytest.raises(UserError, match=rf"{name} lists no clips"):
        data_set(tmp_path, "train")


@pytest.mark.parametrize("separator", ["\t", ";", "|"])
def test_a_table_with_another_separator(made, tmp_path, separator):
    text = (made.audiocaps / "train.csv").read_text().replace(",", separator)
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match=r"train\.csv has no column audiocap_id"):
        AudioCaps(tmp_path, "train")


# --- the other recipes ----------------------------------------------------------------------------


def test_in_shops_list_of_no_picture(tmp_path):
    path = tmp_path / "list_eval_partition.txt"
    path.write_text("0\nimage_name item_id evaluation_status\n")
    with pytest.raises(UserError, match=r"partition\.txt: no line has the status train"):
        read_list(path).split("train")


@pytest.mark.parametrize("content", [{}, {"maps": "features"}])
def test_a_teachers_manifest_without_a_known_name(tmp_path, content):
    import numpy as np

    np.save(tmp_path / "teacher_embedding.npy", np.ones((2, 4), np.float32))
    np.save(tmp_path / "teacher_feat_map.npy", np.full((2, 49), 1 / 49, np.float32))
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json: expected a JSON object with map, sel"):
        TeacherFeatures(tmp_path)


ITEMS = {"B0": {"name": "Sign", "image": "B0_0.jpg"}, "B1": {"name": "Mat"}}


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda path: read_titles(path), "gives none of its 2 items a title"),
        (lambda path: read_samples(path, path.parent), "no usable sample: it describes 0 pictures"),
        (lambda path: read_pictures("train", path), "names no picture"),
    ],
    ids=["titles", "samples", "addresses"],
)
def test_products_of_another_schema(tmp_path, read, message):
    path = tmp_path / "item2meta_train.json"
    path.write_text(json.dumps(ITEMS))
    with pytest.raises(UserError, match=rf"item2meta_train\.json.* {message}"):
        read(path)


def test_products_whose_pictures_have_no_address(tmp_path):
    path = tmp_path / "item2meta_train.json"
    items = {item: {"title": "x", "images": [{"hi_res": "https://x.example/1"}]} for item in ITEMS}
    path.write_text(json.dumps(items))
    with pytest.raises(UserError, match=r"item2meta_train\.json: none of 2 pictures has an"):
        read_pictures("train", path)


def test_pairs_without_a_pair(tmp_path):
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([], [])))
    with pytest.raises(UserError, match=r"lfw\.bin is no verification set"):
        read_pairs(tmp_path / "lfw.bin")


def test_rows_about_vases_of_another_schema(tmp_path):
    (tmp_path / "train.json").write_text('[{"picture": "a.jpg", "question": "?", "answer": "!"}]')
    found = training_files.open_file(tmp_path / "train.json", [tmp_path], is_grpo=False)
    assert "train.json, row 1: names a picture under picture: call it images" in found.problems[0]
    (tmp_path / "train.json").write_text('[{"images": ["a.jpg"], "asked": "?", "said": "!"}]')
    found = training_files.open_file(tmp_path / "train.json", [tmp_path], is_grpo=False)
    assert "train.json, row 1: has no conversations" in found.problems[0]
