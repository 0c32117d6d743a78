"""face_distill through its documented scripts, on a few faces in the real formats."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from face_distill import train_distill
from face_distill.demo_data import demo
from face_distill.distill import model
from face_distill.distill.recordio import RecordReader
from shared.files import read_json, read_json_lines
from tests.harness import ROOT, losses, run_here, start, status_of
from tests.trainings import small_faces

SCRIPT = ROOT / "face_distill" / "train_distill.py"


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> demo.DemoPaths:
    """Five people of four pictures each, a tiny tower, and 24 pairs of strangers."""
    return small_faces(tmp_path_factory.mktemp("faces"))


def flags_for(faces, run_dir: Path) -> list[object]:
    return [
        "--blip-path", faces.weights, "--data-root", faces.data_root,
        "--teacher-feat-dir", faces.teacher, "--batch-size", 4, "--epochs", 6,
        "--adapter-layers", "spread:2", "--workers", 0, "--log-every", 1, "--run-dir", run_dir,
    ]  # fmt: skip


@pytest.fixture
def flags(faces, tmp_path):
    """The flags of a run on those faces, into an empty directory."""
    return flags_for(faces, tmp_path / "checkpoints")


def trained(flags: list[object], *more: object) -> str:
    """The text of a training that ends well."""
    outcome = run_here(train_distill.main, [*flags, *more])
    assert outcome.code == 0, outcome.text
    return outcome.text


def rows_of(run_dir: Path, split: str) -> list[dict[str, Any]]:
    return [row for row in read_json_lines(run_dir / "metrics.jsonl") if row["split"] == split]


@pytest.fixture(scope="module")
def whole(faces, tmp_path_factory) -> tuple[Path, str]:
    """The run directory of all six epochs, and its text."""
    run_dir = tmp_path_factory.mktemp("whole") / "checkpoints"
    return run_dir, trained(flags_for(faces, run_dir), "--verify", faces.pairs)


@pytest.fixture(scope="module")
def short(faces, tmp_path_factory) -> Path:
    """The run directory of two epochs."""
    run_dir = tmp_path_factory.mktemp("short") / "checkpoints"
    trained(flags_for(faces, run_dir), "--epochs", 2)
    return run_dir


def test_a_run_leaves_the_documented_files_and_says_what_it_reached(whole):
    run_dir, _ = whole
    names = {path.name for path in run_dir.glob("*.pth")}
    assert {
        "best_student_adapter_face.pth", "student_adapter_face_epoch_5.pth", "last.pth",
    } <= names  # fmt: skip
    assert "student_adapter_face_epoch_6.pth" not in names
    assert list((run_dir.parent / "logs" / "adapter_face_distill").glob("events.out.tfevents*"))
    status = status_of(run_dir)
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 30)
    assert set(status["result"]) == {
        *("name", "before", "after", "higher_is_better", "chance", "n")
    }
    first = rows_of(run_dir, "train")[0]
    assert {"Loss/Total", "Loss/ArcFace", "Loss/AT", "Loss/RKD", "LR", "samples_per_s"} <= set(
        first
    )
    config = read_json(run_dir / "config.json")
    assert config["settings"]["batch_size"] == 4 and config["identity"]["world_size"] == 1


def test_the_first_epoch_trains_arcface_alone_and_later_ones_the_weighted_sum(whole):
    run_dir, text = whole
    for row in rows_of(run_dir, "train"):
        everything = row["Loss/ArcFace"] + 1000 * row["Loss/AT"] + row["Loss/RKD"]
        expected = row["Loss/ArcFace"] if row["epoch"] == 0 else everything
        assert row["Loss/Total"] == pytest.approx(expected, rel=1e-5)
    assert "attention transfer kl_energy on probability maps" in text
    assert "epoch 1/6: ArcFace alone (warm-up) | training loss" in text
    assert "epoch 2/6 with all terms from here on | training loss" in text
    assert "epoch 3/6 | training loss" in text


def test_a_step_in_pieces_is_the_step_of_the_whole_batch(flags, short, tmp_path):
    trained(flags, "--epochs", 2, "--micro-batch", 1)
    found, expected = (
        list(read_json_lines(run_dir / "metrics.jsonl"))
        for run_dir in (tmp_path / "checkpoints", short)
    )
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for tag in ("Loss/Total", "Loss/RKD", "epoch/loss"):
            assert ours.get(tag, 0) == pytest.approx(theirs.get(tag, 0), rel=1e-4)


def test_early_stopping_counts_from_the_loss_with_all_its_terms(flags, tmp_path):
    """With a learning rate that moves nothing, only the fixed order of sums could improve."""
    trained(flags, "--lr", 1e-30, "--patience", 2, "--warmup-epochs", 3, "--epochs", 50)
    run_dir = tmp_path / "checkpoints"
    rows = [row for row in read_json_lines(run_dir / "metrics.jsonl") if "epoch/loss" in row]
    full = [row["epoch/loss"] for row in rows][3:]  # the warm-up's are smaller: never the best
    best, bad, stopped_after = np.inf, 0, 0
    for number, loss in enumerate(full, 1):  # the rule, by hand
        best, bad = (loss, 0) if loss < best else (best, bad + 1)
        if bad == 2:
            stopped_after = number
            break
    assert len(full) == stopped_after < 47
    assert status_of(run_dir)["reason"] == "the loss did not fall for 2 epochs"


def test_a_held_out_share_gives_the_validation_loss_and_a_damaged_picture_is_in_neither(
    flags, faces, short, tmp_path
):
    """And --full-checkpoint writes the whole student."""
    data = Path(shutil.copytree(faces.data_root, tmp_path / "faces_emore"))
    offset = RecordReader(data / "train.rec", data / "train.idx").offset_of(3)
    content = bytearray((data / "train.rec").read_bytes())
    content[offset + 32 : offset + 1032] = bytes(1000)  # of the picture, not of its label
    (data / "train.rec").write_bytes(content)
    # 5 held-out images in batches of 4: pairs need two, so the last joins those before
    more = ["--val-fraction", 0.25, "--epochs", 2, "--lambda-at", 0.001, "--full-checkpoint"]
    text = trained(flags, "--data-root", data, *more)
    assert "14 images of 5 identities, 5 held out, 1 damaged left out" in text
    assert f"left out: {data / 'train.rec'} key 3 at byte" in text
    assert status_of(tmp_path / "checkpoints")["data"]["damaged"] == 1
    assert "validation loss" in text
    assert max(losses(tmp_path / "checkpoints", "Loss/Total")) == 2 * (14 // 4)
    assert "% of the gradients on the adapters" in text and "lower --lambda-at" not in text
    name = "best_student_adapter_face.pth"
    full = tmp_path / "checkpoints" / name
    student = model.FaceStudent(model.load_tower(faces.weights), [0, 3])
    model.load_student(student, full)
    assert 4 * (short / name).stat().st_size < full.stat().st_size


def test_a_term_that_drowns_arcface_is_named_with_the_flag_to_lower(whole):
    run_dir, text = whole
    assert text.count("lower --lambda-at") == 1
    pulls = rows_of(run_dir, "terms")
    assert [row["step"] for row in pulls] == [1, 10, 20, 30]
    assert all(row["Pull/AT"] > 20 * row["Pull/ArcFace"] for row in pulls)


@pytest.mark.serial
def test_two_processes_train_as_one_does_on_the_same_batches(flags, short, tmp_path):
    with start([SCRIPT, *flags, "--epochs", 2, "--nproc", 2]) as running:
        assert running.finish().code == 0, running.text
    one, two = (losses(r, "Loss/Total") for r in (short, tmp_path / "checkpoints"))
    assert one.keys() == two.keys() and len(one) == 10
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=2e-5), step


def test_an_indivisible_batch_names_the_nearest_sizes(monkeypatch, flags):
    monkeypatch.setattr(train_distill, "world_size", lambda: 3)
    outcome = run_here(train_distill.main, [*flags, "--batch-size", 10])
    assert outcome.code == 2
    assert "cannot be split over 3; use 9 or 12" in outcome.last_line


def test_visible_gpus_are_used_up_to_the_largest_number_that_divides_the_default_batch():
    assert train_distill.processes_that_fit([], 4) == 4
    assert train_distill.processes_that_fit([], 6) == 4  # 128 = 4 x 32
    assert train_distill.processes_that_fit(["--batch-size", "96"], 6) == 6  # typed: kept, checked


def test_teacher_rows_that_do_not_match_the_records_name_both_sides(flags, faces, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(faces.teacher, teacher)
    (teacher / "manifest.json").unlink()
    np.save(teacher / "teacher_labels.npy", np.zeros(20, np.int64))
    outcome = run_here(train_distill.main, [*flags, "--teacher-feat-dir", teacher])
    assert outcome.code == 2
    assert "teacher_labels.npy" in outcome.last_line and str(faces.data_root) in outcome.last_line


def test_editing_a_constant_is_the_documented_way_and_changes_the_default(tmp_path):
    house = tmp_path / "house"
    shutil.copytree(ROOT / "face_distill", house / "face_distill", ignore=_not_code)
    (house / "shared").symlink_to(ROOT / "shared")
    script = house / "face_distill" / "train_distill.py"
    script.write_text(script.read_text().replace("BATCH_SIZE = 128", "BATCH_SIZE = 64"))
    shown = subprocess.run(
        [sys.executable, script.name, "--print-config"], cwd=script.parent, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert json.loads(shown.stdout)["batch_size"] == 64


def test_the_script_starts_through_a_link_from_elsewhere(flags, tmp_path):
    link = tmp_path / "a link.py"
    link.symlink_to(SCRIPT)
    command = [sys.executable, link, *map(str, flags), "--dry-run"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "1 process(es) x 4" in shown.stdout
    assert not (tmp_path / "checkpoints").exists()


def test_the_documents_bare_import_works_beside_the_script(faces, monkeypatch):
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", [str(ROOT / "face_distill"), *elsewhere])
    bare = importlib.import_module("FaceDataset")
    assert str(ROOT) in sys.path
    assert len(bare.FaceDataset(faces.data_root, "first_n", limit=8)) == 8


def _not_code(_directory: str, names: list[str]) -> set[str]:
    return {name for name in names if not name.endswith(".py")}


@pytest.mark.parametrize("words", [[sys.executable, "train_distill.py"], ["bash", "train.sh"]])
def test_a_copy_of_the_directory_alone_says_once_what_is_missing(tmp_path, words):
    shutil.copytree(ROOT / "face_distill", tmp_path / "face_distill",
                    ignore=shutil.ignore_patterns("demo", "checkpoints", "logs"))  # fmt: skip
    ended = subprocess.run(
        words, cwd=tmp_path / "face_distill", capture_output=True, text=True, check=False
    )
    expected = "error: shared/ is missing beside face_distill/: copy the whole repository\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "", expected)
