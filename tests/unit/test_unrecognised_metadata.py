"""A list in which nothing is recognised is refused by whoever reads it, with its name.

A reader that takes such a list for an empty one trains on what the list was to hold out.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from arcface.inshop_retrieval.inshop import read_list
from face_distill.distill.pairs import read_pairs
from face_distill.distill.teacher import TeacherFeatures
from lavic.src.catalogue import read_pictures, read_samples, read_titles
from multimodal.datasets import AudioCaps, Clotho, Coco
from shared.errors import UserError
from tests import multimodal_data
from vasevqa.model import training_files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return multimodal_data.build(tmp_path_factory.mktemp("multimodal"))


@pytest.fixture
def coco(made, tmp_path):
    return shutil.copytree(made.coco, tmp_path / "coco")


def renumber(path: Path, kind: str, key: str) -> None:
    """Have the entries of a JSON list speak of other pictures."""
    content = json.loads(path.read_text())
    for entry in content[kind]:
        entry[key] += 1_000_000
    path.write_text(json.dumps(content))


# --- multimodal -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "kind", "key", "said"),
    [
        ("karpathy/coco_test_karpathy.json", "images", "id", "of 8 pictures .* none is"),
        ("annotations/captions_val2017.json", "annotations", "image_id", r"none of \d+ captions"),
        ("annotations/instances_*2017.json", "annotations", "image_id", "no image_id is one of"),
    ],
)
def test_lists_of_other_pictures_than_cocos(coco, files, kind, key, said):
    for path in coco.glob(files):
        renumber(path, kind, key)
    name = Path(files).name.replace("*", r"\*")
    with pytest.raises(UserError, match=rf"{name}: {said}"):
        Coco(coco, "train")


@pytest.mark.parametrize("name", ["validation", None])
def test_karpathys_list_with_other_names_of_the_splits(coco, name):
    shutil.rmtree(coco / "karpathy")
    first = Coco(coco, "train").group_of(0)
    listed = [{"cocoid": first, "split": "test"}, {"cocoid": first + 1, "split": name}]
    (coco / "dataset_coco.json").write_text(json.dumps({"images": listed}))
    with pytest.raises(UserError, match=r"dataset_coco\.json: of 0 pictures of the split val"):
        Coco(coco, "train")


def test_clothos_metadata_of_other_clips(made, tmp_path):
    clotho = shutil.copytree(made.clotho, tmp_path / "clotho")
    path = clotho / "clotho_metadata_evaluation.csv"
    shutil.copy(clotho / "clotho_metadata_development.csv", path)
    with pytest.raises(UserError, match=r"metadata_evaluation\.csv has keywords for none of the 6"):
        Clotho(clotho, "test")


@pytest.mark.parametrize(
    ("data_set", "name"),
    [(Clotho, "clotho_captions_development.csv"), (AudioCaps, "train.csv")],
)
def test_a_table_of_a_header_alone(made, tmp_path, data_set, name):
    root = made.clotho if data_set is Clotho else made.audiocaps
    header = (root / name).read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / name).write_text(header + "\n")
    with pytest.raises(UserError, match=rf"{name} lists no clips"):
        data_set(tmp_path, "train")


def test_a_table_with_another_separator(made, tmp_path):
    text = (made.audiocaps / "train.csv").read_text().replace(",", ";")
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match=r"train\.csv has no column audiocap_id"):
        AudioCaps(tmp_path, "train")


# --- the other recipes ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{}, {"maps": "features"}])
def test_a_teachers_manifest_without_a_known_name(tmp_path, content):
    np.save(tmp_path / "teacher_embedding.npy", np.ones((2, 4), np.float32))
    np.save(tmp_path / "teacher_feat_map.npy", np.full((2, 49), 1 / 49, np.float32))
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json: expected a JSON object with map, sel"):
        TeacherFeatures(tmp_path)


ITEMS = json.dumps({"B0": {"name": "Sign", "image": "B0_0.jpg"}, "B1": {"name": "Mat"}})
NO_ADDRESS = json.dumps({"B0": {"title": "x", "images": [{"hi_res": "https://x.example/1"}]}})
FOREIGN = {  # file: its content, its reader, and what is said
    "titles.json": (ITEMS, read_titles, "gives none of its 2 items a title"),
    "samples.json": (
        ITEMS,
        lambda path: read_samples(path, path.parent),
        "no usable sample: it describes 0 pictures",
    ),
    "addresses.json": (ITEMS, lambda path: read_pictures("train", path), "names no picture"),
    "other.json": (
        NO_ADDRESS,
        lambda path: read_pictures("train", path),
        "none of 1 pictures has an",
    ),
    "list_eval_partition.txt": (
        "0\nimage_name item_id evaluation_status\n",
        lambda path: read_list(path).split("train"),
        "no line has the status train",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_list_of_another_schema(tmp_path, name):
    content, read, said = FOREIGN[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}.* {said}"):
        read(tmp_path / name)


def test_pairs_without_a_pair(tmp_path):
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([], [])))
    with pytest.raises(UserError, match=r"lfw\.bin is no verification set"):
        read_pairs(tmp_path / "lfw.bin")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"picture": "a.jpg", "question": "?", "answer": "!"},
            "names a picture under picture: call it images",
        ),
        ({"images": ["a.jpg"], "asked": "?", "said": "!"}, "has no conversations"),
    ],
)
def test_rows_about_vases_of_another_schema(tmp_path, row, said):
    (tmp_path / "train.json").write_text(json.dumps([row]))
    found = training_files.open_file(tmp_path / "train.json", [tmp_path], is_grpo=False)
    assert f"train.json, row 1: {said}" in found.problems[0]
