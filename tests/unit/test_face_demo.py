"""The demo's files: real formats, same seed same bytes, unseen people, learnable relations."""

import io
import json
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from face_distill.demo_data import demo
from face_distill.distill.model import load_tower
from face_distill.distill.recordio import RecordReader
from face_distill.distill.teacher import TeacherFeatures
from face_distill.distill.verification import accuracy_of, pair_distances
from face_distill.FaceDataset import FaceDataset

pytestmark = pytest.mark.slow  # draws a demo: three seconds


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """40 of the 100 people, half of the strangers, and a teacher of 250 people in place of 500."""
    changes = {"NUM_PEOPLE": 40, "PICTURES_OF_STRANGER": 5, "TEACHER_PEOPLE": 250}
    with mock.patch.multiple(demo, **changes):
        return demo.build(tmp_path_factory.mktemp("demo"))


def test_records_are_those_of_faces_emore_and_the_teachers_rows_are_theirs(paths):
    reader = RecordReader(paths.data_root / "train.rec", paths.data_root / "train.idx")
    assert len(reader) == 1 + 160 + 40
    assert np.asarray(reader.label_of(0)).tolist() == [161, 201]
    assert np.asarray(reader.label_of(161 + 39)).tolist() == [157, 161]
    assert (paths.data_root / "property").read_text() == "40,112,112\n"
    record = reader.labelled(5)
    assert (record.flag, record.labels, record.record_id) == (0, 1.0, 5)
    assert Image.open(io.BytesIO(record.content)).size == (112, 112)
    faces = FaceDataset(paths.data_root, "first_n", limit=160)
    assert faces.num_classes == 40 and (np.bincount(faces.labels) == 4).all()
    teacher = TeacherFeatures(paths.teacher)
    teacher.check_alignment(faces)
    assert teacher.kind == "probability" and teacher.map_shape == (7, 7)


def test_relations_between_people_outweigh_those_between_their_pictures(paths):
    embeddings = TeacherFeatures(paths.teacher).rows(np.arange(160))[0].view(40, 4, -1)
    centres = embeddings.mean(1)
    within = (embeddings - centres[:, None]).norm(dim=2).mean()
    between = torch.pdist(centres)
    assert between.mean() > 3 * within
    assert between.max() > 4 * between.min()  # some people are more alike than others


def test_maps_point_at_what_tells_people_apart(paths):
    maps = TeacherFeatures(paths.teacher).rows(np.arange(160))[1]
    assert maps[:, 1:6, 1:6].sum((1, 2)).mean() > 0.7  # of 0.51 of the places
    assert maps[:, 3:5, (1, 5)].mean() > 2 / 49  # the sides of the face
    assert maps.std(0).mean() > 0.002  # they follow the picture
    entropy = -(maps * maps.log()).sum((1, 2)).mean()
    assert 1.5 < entropy < 3.6  # a map, neither a point nor uniform (3.89)


def test_pairs_are_half_same_and_no_person_is_in_two_folds(paths):
    jpegs, same = pickle.loads(paths.pairs.read_bytes())
    assert len(jpegs) == 2 * len(same) == 1200 and sum(same) == 300
    assert all(isinstance(jpeg, bytes) for jpeg in jpegs)
    assert all(isinstance(truth, bool) for truth in same)
    folds = [set(jpegs[120 * f : 120 * f + 120]) for f in range(10)]
    assert sum(map(len, folds)) == len(set().union(*folds))
    assert [sum(same[60 * f : 60 * f + 60]) for f in range(10)] == [30] * 10
    assert all(jpegs[2 * i] != jpegs[2 * i + 1] for i in range(600))


def test_the_teachers_rows_of_the_pairs_belong_to_their_pictures(paths):
    jpegs, same = pickle.loads(paths.pairs.read_bytes())
    rows = np.load(paths.teacher_pairs, allow_pickle=False)
    assert rows.shape == (1200, 24) and rows.dtype == np.float32
    row_of = dict(zip(jpegs, rows, strict=True))
    assert all(np.array_equal(row_of[j], row) for j, row in zip(jpegs, rows, strict=True))
    assert len(np.unique(rows, axis=0)) == len(row_of) > 200
    assert accuracy_of(pair_distances(rows), np.array(same)).mean > 0.97


def test_every_stream_still_draws_what_training_was_tuned_to():
    """Whole numbers alone: other processors and libraries may round the pictures differently."""
    parts = (demo._PEOPLE, demo._PICTURES, demo._STRANGERS, demo._PAIRS, demo._TEACHER)
    drawn = [int(demo._stream(0, part).integers(1 << 31)) for part in parts]
    assert drawn == [1016164991, 2096660437, 1122378210, 2081058648, 382170507]
    pairs = demo._fold(demo._stream(0, demo._PAIRS))
    assert pairs[0] == ((3, 6), (3, 7)) and pairs[-1] == ((3, 1), (5, 5))


def test_the_tower_is_in_two_shards_and_sees_its_input(paths):
    index = json.loads((paths.weights / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {shard for name, shard in index.items() if name.startswith("vision_model.")}
    assert len(set(index.values())) == 2 and len(shards) == 2
    faces = FaceDataset(paths.data_root, limit=2, cache=False)
    pixels = faces.images([0, 1]).float() / 128 - 1
    with torch.no_grad():
        tokens = load_tower(paths.weights)(pixel_values=pixels).last_hidden_state
    assert tokens.shape == (2, 1 + 49, 64)
    assert (tokens[0, 0] - tokens[1, 0]).abs().max() > 0.01
    energy = tokens[:, 1:].square().sum(2)
    assert energy.std(1).min() > 0.1  # and an attention map can be read from it
