"""Parts of an extraction: kept whole, bound to their plan, joined byte for byte, never mixed."""

import io
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest

from face_distill import teacher_parts
from face_distill.teacher_parts import Parts
from shared import lock
from shared.errors import UserError
from tests.harness import ROOT

PLAN = {"num_images": 7, "batch_size": 3, "embedding_shape": [2], "map_shape": [4], "map": "x"}
LABELS = np.arange(7)


def arrays(number, rows=3):
    rng = np.random.default_rng(number)
    return (rng.normal(size=(rows, 2)).astype("f4"), rng.normal(size=(rows, 4)).astype("f4"))


def filled(out, plan=PLAN):
    parts = Parts(out, plan)
    out.mkdir(exist_ok=True)
    for number in parts.begin():
        parts.write(number, *arrays(number, len(parts.rows(number))))
    return parts


def test_the_last_part_holds_what_is_left():
    parts = Parts(None, PLAN)
    assert [parts.rows(number) for number in range(len(parts))] == [
        range(3), range(3, 6), range(6, 7),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("images", "batch", "rows"), [(12_000, 64, 64), (64_000, 64, 64), (5_822_653, 64, 5824)]
)
def test_there_are_at_most_a_thousand_parts_of_whole_batches(images, batch, rows):
    parts = Parts(None, PLAN | {"num_images": images, "batch_size": batch})
    assert parts.rows_each == rows and rows % batch == 0 and len(parts) <= 1000
    assert parts.rows(len(parts) - 1).stop == images


def test_the_joined_files_are_the_ones_numpy_would_write(tmp_path):
    parts = filled(tmp_path)
    parts.assemble(LABELS)
    rows = [arrays(0), arrays(1), arrays(2, 1)]
    whole = [np.concatenate(column) for column in zip(*rows, strict=True)]
    for name, expected in zip(
        ("teacher_embedding", "teacher_feat_map", "teacher_labels"), [*whole, LABELS], strict=True
    ):
        stream = io.BytesIO()
        np.save(stream, expected)
        assert (tmp_path / f"{name}.npy").read_bytes() == stream.getvalue()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json", "teacher_embedding.npy", "teacher_feat_map.npy", "teacher_labels.npy",
    ]  # fmt: skip


def test_the_same_plan_continues_with_the_parts_that_are_missing(tmp_path):
    parts = filled(tmp_path)
    (tmp_path / "parts" / "000001.npz").unlink()
    assert parts.begin() == [1]


def test_a_kill_while_the_files_were_joined_costs_no_part(tmp_path):
    parts = filled(tmp_path)
    (tmp_path / "teacher_embedding.npy").write_bytes(b"of an earlier try")
    (tmp_path / "teacher_feat_map.npy.tmp.999999999").write_bytes(b"half")
    assert parts.begin() == []
    parts.assemble(LABELS)
    assert parts.begin() is None
    assert not list(tmp_path.glob("*.tmp.*"))


def test_a_kill_before_the_parts_were_dropped_leaves_a_finished_extraction(tmp_path):
    parts = filled(tmp_path)
    shutil.copytree(tmp_path / "parts", tmp_path / "copy")
    parts.assemble(LABELS)
    (tmp_path / "copy").rename(tmp_path / "parts")
    assert parts.begin() is None
    assert not (tmp_path / "parts").exists()


def test_another_plans_parts_and_files_are_moved_aside_with_the_difference(tmp_path, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "out"
    filled(out).assemble(LABELS)
    (out / "notes.txt").write_text("the user's own")
    other = Parts(out, PLAN | {"map": "y"})
    assert other.begin() == [0, 1, 2]
    assert "map: x → y" in caplog.text and "out.1" in caplog.text
    assert {path.name for path in out.iterdir()} == {"parts", "notes.txt"}
    assert (tmp_path / "out.1" / "teacher_embedding.npy").exists()
    other.write(0, *arrays(0))
    assert Parts(out, PLAN).begin() == [0, 1, 2]  # and back: nothing of the other plan is used
    assert (tmp_path / "out.2" / "parts").exists()


def test_features_of_unknown_origin_are_moved_aside_too(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "teacher_embedding.npy").write_bytes(b"downloaded")
    assert Parts(out, PLAN).begin() == [0, 1, 2]
    assert (tmp_path / "out.1" / "teacher_embedding.npy").read_bytes() == b"downloaded"


def test_settings_that_never_finished_a_part_leave_nothing_aside(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert Parts(out, PLAN).begin() == [0, 1, 2]
    (out / "status.json").write_text("{}")
    assert Parts(out, PLAN | {"batch_size": 7}).begin() == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_finished_extraction_that_lost_a_file_is_made_again(tmp_path):
    parts = filled(tmp_path / "out")
    parts.assemble(LABELS)
    (tmp_path / "out" / "teacher_labels.npy").unlink()
    assert parts.begin() == [0, 1, 2]


class Evil:
    def __reduce__(self):
        return os.abort, ()


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "a changed byte": lambda path: path.write_bytes(path.read_bytes().replace(b"\x93NUMPY", b"??")),
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "other shapes": lambda path: np.savez(path, embedding=np.zeros((3, 9), "f4"), map=0),
    "other names": lambda path: np.savez(path, a=1),
    "objects": lambda path: np.savez(path, embedding=np.array([Evil()], object)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_named_deleted_and_computed_again(tmp_path, damage):
    parts = filled(tmp_path)
    path = tmp_path / "parts" / "000001.npz"
    DAMAGE[damage](path)
    with pytest.raises(UserError, match=r"000001\.npz was damaged .* the same command again"):
        parts.assemble(LABELS)
    assert not (tmp_path / "manifest.json").exists()
    assert parts.begin() == [1]


def test_a_part_that_another_host_wrote_elsewhere_is_missing_by_name(tmp_path):
    parts = filled(tmp_path)
    (tmp_path / "parts" / "000002.npz").unlink()
    with pytest.raises(UserError, match=r"000002\.npz is missing: --out .* all processes share"):
        parts.assemble(LABELS)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    plan = PLAN | {"num_images": 1000, "embedding_shape": [512], "map_shape": [512, 7, 7]}
    needed = 2 * 4 * 1000 * (512 + 512 * 49)
    for free, enough in ((needed - 1, False), (needed, True)):
        usage = namedtuple("usage", "free")(free)
        monkeypatch.setattr(teacher_parts.shutil, "disk_usage", lambda _path, u=usage: u)
        if enough:
            assert Parts(tmp_path, plan).begin()
        else:
            with pytest.raises(UserError, match=r"0\.20 GB free, 0\.20 GB needed .* --limit"):
                Parts(tmp_path, plan).begin()


def test_two_extractions_into_one_directory_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_DYING", 0.1)
    holder = (
        "import sys, pathlib; from face_distill.teacher_parts import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError, match="in use by a live run"),
            teacher_parts.locked(tmp_path),
        ):
            pytest.fail("both hold it")
        other.stdin.close()
    with teacher_parts.locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_an_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with (
        pytest.raises(UserError, match=r"out cannot be written.* choose another --out"),
        teacher_parts.locked(tmp_path / "out"),
    ):
        pytest.fail("a file is no directory")
