"""Which teacher files are accepted, what rows come out, and that mismatches name both sides."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from face_distill.distill import teacher as teacher_module
from face_distill.distill.teacher import TeacherFeatures
from shared.errors import UserError

N, D = 6, 5


class Faces:
    """A data set of N images of three people, without the images."""

    root = Path("datasets/faces_emore")

    def __init__(self, labels=(0, 0, 1, 1, 2, 2)):
        self.labels = np.array(labels)

    def __len__(self):
        return len(self.labels)

    def selection_sha256(self):
        return "ab" * 32


def probabilities(n=N, shape=(49,)):
    p = np.random.default_rng(0).uniform(0.1, 1, (n, *shape))
    return (p / p.reshape(n, -1).sum(1).reshape(n, *[1] * len(shape))).astype(np.float32)


def stored(directory, embedding=None, feat_map=None, labels=None, manifest=None):
    if embedding is None:
        embedding = np.arange(N * D, dtype=np.float32).reshape(N, D)
    np.save(directory / "teacher_embedding.npy", embedding)
    np.save(directory / "teacher_feat_map.npy", probabilities() if feat_map is None else feat_map)
    if labels is not None:
        np.save(directory / "teacher_labels.npy", np.asarray(labels))
    if manifest is not None:
        (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_rows_come_in_the_order_asked_for(tmp_path):
    maps = probabilities()
    teacher = TeacherFeatures(stored(tmp_path, feat_map=maps))
    embeddings, rows = teacher.rows(torch.tensor([4, 0, 4]))
    assert embeddings.tolist() == [[20, 21, 22, 23, 24], [0, 1, 2, 3, 4], [20, 21, 22, 23, 24]]
    assert torch.equal(rows, torch.from_numpy(maps[[4, 0, 4]]).view(3, 7, 7))
    assert (len(teacher), teacher.dim, teacher.kind) == (N, D, "probability")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_every_float_type_comes_out_as_float32(tmp_path, dtype):
    embedding = np.linspace(0, 1, N * D).reshape(N, D).astype(dtype)
    folder = stored(tmp_path, embedding, probabilities(shape=(7, 7)).astype(dtype))
    embeddings, maps = TeacherFeatures(folder).rows([1, 2])
    assert embeddings.dtype == maps.dtype == torch.float32
    np.testing.assert_array_equal(embeddings, embedding[1:3].astype(np.float32))


def test_features_keep_their_channels_and_tokens_become_channels_over_a_square(tmp_path):
    features = np.random.default_rng(0).normal(size=(N, 4, 3, 3)).astype(np.float32)
    tokens = features.reshape(N, 4, 9).transpose(0, 2, 1)
    for feat_map in (features, tokens):
        teacher = TeacherFeatures(stored(tmp_path, feat_map=feat_map))
        assert (teacher.kind, teacher.map_shape) == ("features", (4, 3, 3))
        assert torch.equal(teacher.rows([2])[1], torch.from_numpy(features[[2]]))


def test_a_manifest_can_say_that_square_maps_are_features(tmp_path):
    maps = probabilities(shape=(16, 16))
    assert TeacherFeatures(stored(tmp_path, feat_map=maps)).kind == "probability"
    teacher = TeacherFeatures(stored(tmp_path, feat_map=maps, manifest={"map": "features"}))
    assert (teacher.kind, teacher.map_shape) == ("features", (16, 4, 4))


@pytest.mark.parametrize(
    ("feat_map", "message"),
    [
        (2 * probabilities(), "row 0 sums to 2"),
        (probabilities() - np.eye(N, 49, dtype=np.float32), "no probability map.*lowest is -0"),
        (probabilities(shape=(48,)), "48 places an image, which is no square"),
        (2 * probabilities(shape=(7, 7)), "7 places an image, which is no square"),
        (np.zeros((N, 49), np.int64), "int64"),
        (np.zeros((N, 1, 1, 7, 7), np.float32), r"\(N, C, H, W\)"),
        (probabilities(4), r"embedding\.npy has 6 rows, .*feat_map\.npy has 4"),
    ],
)
def test_maps_of_no_known_kind_are_refused(tmp_path, feat_map, message):
    with pytest.raises(UserError, match=message):
        TeacherFeatures(stored(tmp_path, feat_map=feat_map))


def test_a_manifest_that_contradicts_the_maps_is_refused(tmp_path):
    features = np.ones((N, 3, 7, 7), np.float32)
    with pytest.raises(UserError, match="no probability map"):
        TeacherFeatures(stored(tmp_path, feat_map=features, manifest={"map": "probability"}))


def test_rows_with_nan_are_counted_over_all_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "_CHUNK_BYTES", 2 * D * 4)  # two rows a chunk
    embedding = np.ones((N, D), np.float32)
    embedding[1, 0], embedding[5, 4] = np.nan, -np.inf
    with pytest.raises(UserError, match=r"embedding\.npy: 2 of 6 rows .* the first are 1, 5;"):
        TeacherFeatures(stored(tmp_path, embedding))
    maps = probabilities()
    maps[3, 48] = np.nan
    with pytest.raises(UserError, match=r"feat_map\.npy: 1 of 6 rows .* are 3;"):
        TeacherFeatures(stored(tmp_path, feat_map=maps))


def test_pickles_and_lfs_pointers_are_refused(tmp_path):
    path = stored(tmp_path) / "teacher_embedding.npy"
    np.save(path, np.array([{"a": 1}] * N, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"teacher_embedding\.npy cannot be read"):
        TeacherFeatures(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        TeacherFeatures(tmp_path)


def test_a_manifest_that_is_no_object_is_refused(tmp_path):
    (stored(tmp_path) / "manifest.json").write_text("[1]")
    with pytest.raises(UserError, match=r"manifest\.json"):
        TeacherFeatures(tmp_path)


def test_aligned_data_passes_whatever_the_numbering_of_people(tmp_path):
    manifest = {"selection_sha256": "ab" * 32}
    folder = stored(tmp_path, labels=[7, 7, 3, 3, 99, 99], manifest=manifest)
    TeacherFeatures(folder).check_alignment(Faces())
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "teacher_labels.npy").unlink()
    TeacherFeatures(folder).check_alignment(Faces())


@pytest.mark.parametrize(
    ("labels", "manifest", "faces", "message"),
    [
        (None, None, Faces([0, 0, 1]), r"embedding\.npy has 6 rows, .*faces_emore gives 3"),
        ([0, 0, 1, 2, 2, 2], None, Faces(), r"labels\.npy puts row 3 to identity 2 .*image 3 .*1;"),
        ([0, 0, 0, 1, 1, 1], None, Faces(), "3 of each: type --selection per_id --per-id 3"),
        (None, {"selection_sha256": "cd" * 32}, Faces(), r"manifest\.json says .*cdcd.*abab"),
    ],
)
def test_features_of_other_images_name_both_sides(tmp_path, labels, manifest, faces, message):
    teacher = TeacherFeatures(stored(tmp_path, labels=labels, manifest=manifest))
    with pytest.raises(UserError, match=message):
        teacher.check_alignment(faces)
