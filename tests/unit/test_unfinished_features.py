"""An extraction that can end at any moment: rows are kept, and none is taken for another's."""

import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from face_distill.distill import teacher
from face_distill.distill.teacher import TeacherFeatures, UnfinishedFeatures
from shared.errors import UserError

PLAN = {"num_images": 7, "embedding_shape": [2], "map_shape": [4], "map": "probability"}
LABELS = np.arange(7)
EMBEDDINGS = np.random.default_rng(0).normal(size=(7, 2)).astype("f4")
MAPS = np.random.default_rng(1).dirichlet(np.ones(4), 7).astype("f4")


def written(out: Path, rows: int, plan: dict = PLAN) -> UnfinishedFeatures:
    """An extraction that was killed after so many rows."""
    out.mkdir(exist_ok=True)
    store = UnfinishedFeatures(out, plan)
    assert store.begin() == 0
    for first in range(0, rows, 3):
        last = min(first + 3, rows)
        store.write(first, EMBEDDINGS[first:last], MAPS[first:last])
    return store


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def test_the_files_hold_the_rows_that_were_written(tmp_path):
    written(tmp_path, 7).finish(LABELS)
    whole = {"embedding": EMBEDDINGS, "feat_map": MAPS, "labels": LABELS}
    for name, expected in whole.items():
        assert np.array_equal(np.load(tmp_path / f"teacher_{name}.npy"), expected)
    assert names(tmp_path) == {
        "manifest.json", "teacher_embedding.npy", "teacher_feat_map.npy", "teacher_labels.npy",
    }  # fmt: skip


def test_a_kill_before_the_note_was_dropped_leaves_a_finished_extraction(tmp_path):
    store = written(tmp_path, 7)
    note = (tmp_path / "unfinished.json").read_bytes()
    store.finish(LABELS)
    (tmp_path / "unfinished.json").write_bytes(note)
    assert store.begin() is None
    assert "unfinished.json" not in names(tmp_path)


def test_no_training_takes_features_that_are_not_finished(tmp_path):
    written(tmp_path, 3)
    with pytest.raises(UserError, match=r"not finished \(3 rows so far\).* it continues"):
        TeacherFeatures(tmp_path)


def test_features_of_unknown_origin_are_moved_aside_too(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "teacher_embedding.npy").write_bytes(b"downloaded")
    assert UnfinishedFeatures(out, PLAN).begin() == 0
    assert (tmp_path / "out.1" / "teacher_embedding.npy").read_bytes() == b"downloaded"


def test_settings_that_never_finished_a_row_leave_nothing_aside(tmp_path):
    written(tmp_path / "out", 0)
    assert UnfinishedFeatures(tmp_path / "out", PLAN | {"num_images": 5}).begin() == 0
    assert names(tmp_path) == {"out"}


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "gone": lambda path: path.unlink(),
    "other shapes": lambda path: np.save(path, np.zeros((7, 9), "f4")),
}


@pytest.mark.parametrize(
    ("damage", "is_finished"), [("cut off", False), ("gone", True), ("other shapes", False)]
)
def test_damaged_arrays_are_never_continued(tmp_path, damage, is_finished):
    out = tmp_path / "out"
    store = written(out, 7)
    if is_finished:
        store.finish(LABELS)
    DAMAGE[damage](out / "teacher_embedding.npy")
    store = UnfinishedFeatures(out, PLAN)
    assert store.begin() == 0
    store.write(0, EMBEDDINGS, MAPS)
    store.finish(LABELS)
    assert np.array_equal(np.load(out / "teacher_embedding.npy"), EMBEDDINGS)


@pytest.mark.parametrize("note", ["[]", {"rows": 99}, {"rows": "3"}, {"rows": -1}])
def test_a_damaged_note_starts_anew(tmp_path, note):
    out = tmp_path / "out"
    written(out, 3)
    text = json.dumps({"plan": PLAN} | note) if isinstance(note, dict) else note
    (out / "unfinished.json").write_text(text)
    assert UnfinishedFeatures(out, PLAN).begin() == 0
    assert "teacher_embedding.npy" in names(tmp_path / "out.1")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    plan = PLAN | {"num_images": 1000, "embedding_shape": [512], "map_shape": [512, 7, 7]}
    needed = 4 * 1000 * (512 + 512 * 49)
    for free, enough in ((needed - 1, False), (needed, True)):
        usage = namedtuple("usage", "free")(free)
        monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _path, u=usage: u)
        if enough:
            assert UnfinishedFeatures(tmp_path, plan).begin() == 0
        else:
            with pytest.raises(UserError, match=r"0\.10 GB free, 0\.10 GB needed .* --limit"):
                UnfinishedFeatures(tmp_path, plan).begin()
