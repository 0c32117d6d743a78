"""face_distill through its documented scripts, on a few faces in the real formats."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.fixture
def flags(faces, tmp_path):
    """The flags of a run on those faces, into an empty directory."""
    return [
        "--blip-path", faces.weights, "--data-root", faces.data_root,
        "--teacher-feat-dir", faces.teacher, "--batch-size", 4, "--epochs", 6,
        "--adapter-layers", "spread:2", "--workers", 0, "--log-every", 1,
        "--run-dir", tmp_path / "checkpoints",
    ]  # fmt: skip


def totals(run_dir: Path) -> dict[int, float]:
    return losses(run_dir, "Loss/Total")


def test_a_run_leaves_the_documented_files_and_says_what_it_reached(flags, faces, tmp_path):
    outcome = run_here(train_distill.main, [*flags, "--verify", faces.pairs])
    run_dir = tmp_path / "checkpoints"
    assert outcome.code == 0, outcome.text
    names = {path.name for path in run_dir.glob("*.pth")}
    assert {
        "best_student_adapter_face.pth", "student_adapter_face_epoch_5.pth", "last.pth",
    } <= names  # fmt: skip
    assert "student_adapter_face_epoch_6.pth" not in names
    assert list((tmp_path / "logs" / "adapter_face_distill").glob("events.out.tfevents*"))
    status = status_of(run_dir)
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 30)
    assert set(status["result"]) == {
        *("name", "before", "after", "higher_is_better", "chance", "n")
    }
    assert "attention transfer kl_energy on probability maps" in outcome.text
    assert "training loss" in outcome.text
    first = next(read_json_lines(run_dir / "metrics.jsonl"))
    assert {"Loss/Total", "Loss/ArcFace", "Loss/AT", "Loss/RKD", "LR", "samples_per_s"} <= set(
        first
    )


def test_the_first_epoch_trains_arcface_alone_and_later_ones_the_weighted_sum(flags, tmp_path):
    assert run_here(train_distill.main, [*flags, "--epochs", 2]).code == 0
    rows = list(read_json_lines(tmp_path / "checkpoints" / "metrics.jsonl"))
    train = [row for row in rows if row["split"] == "train"]
    for row in train:
        whole = row["Loss/ArcFace"] + 1000 * row["Loss/AT"] + row["Loss/RKD"]
        expected = row["Loss/ArcFace"] if row["epoch"] == 0 else whole
        assert row["Loss/Total"] == pytest.approx(expected, rel=1e-5)


def test_a_step_in_pieces_is_the_step_of_the_whole_batch(flags, tmp_path):
    run_dir = tmp_path / "checkpoints"
    assert run_here(train_distill.main, [*flags, "--epochs", 2]).code == 0
    whole = list(read_json_lines(run_dir / "metrics.jsonl"))
    pieces = [*flags, "--epochs", 2, "--run-dir", tmp_path / "pieces", "--micro-batch", 1]
    assert run_here(train_distill.main, pieces).code == 0
    found = list(read_json_lines(tmp_path / "pieces" / "metrics.jsonl"))
    assert len(found) == len(whole)
    for ours, theirs in zip(found, whole, strict=True):
        for tag in ("Loss/Total", "Loss/RKD", "epoch/loss"):
            assert ours.get(tag, 0) == pytest.approx(theirs.get(tag, 0), rel=1e-4)


def test_early_stopping_counts_from_the_loss_with_all_its_terms(flags, tmp_path):
    """With a learning rate that moves nothing, only the fixed order of sums could improve."""
    still = [*flags, "--lr", 1e-30, "--patience", 2, "--warmup-epochs", 3, "--epochs", 50]
    outcome = run_here(train_distill.main, still)
    run_dir = tmp_path / "checkpoints"
    assert outcome.code == 0
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


def test_trainable_and_full_checkpoints_load_alike_and_the_small_one_is_small(
    flags, faces, tmp_path
):
    run_dir = tmp_path / "checkpoints"
    one_epoch = [*flags, "--epochs", 2]
    assert run_here(train_distill.main, one_epoch).code == 0
    small = run_dir / "best_student_adapter_face.pth"
    assert (
        run_here(train_distill.main, [*one_epoch, "--full-checkpoint", "--resume", "never"]).code
        == 0
    )
    aside = tmp_path / "checkpoints.1" / small.name
    students = []
    for path in (aside, small):
        student = model.FaceStudent(model.load_tower(faces.weights), [0, 3])
        model.load_student(student, path)
        students.append(student.eval())
    images = torch.randn(2, 3, students[0].image_size, students[0].image_size)
    assert torch.equal(students[0](images)[0], students[1](images)[0])
    assert aside.stat().st_size < small.stat().st_size / 4


def test_a_held_out_share_gives_the_validation_loss(flags, tmp_path):
    outcome = run_here(train_distill.main, [*flags, "--val-fraction", 0.2, "--epochs", 2])
    assert outcome.code == 0
    assert "validation loss" in outcome.text
    assert max(totals(tmp_path / "checkpoints")) == 2 * (16 // 4)


def test_a_last_held_out_batch_of_one_image_joins_the_one_before(flags, tmp_path):
    outcome = run_here(train_distill.main, [*flags, "--val-fraction", 0.25, "--epochs", 2])
    assert outcome.code == 0, outcome.text  # 5 of 20 images in batches of 4: pairs need two
    assert "15 images of 5 identities, 5 held out" in outcome.text


def test_a_held_out_share_too_small_for_pairs_on_each_process_is_refused(flags, tmp_path):
    with start([SCRIPT, *flags, "--val-fraction", 0.1, "--nproc", 2]) as running:
        outcome = running.finish()
    assert outcome.code == 2
    assert "holds out 2 of 20 images, 4 are needed" in outcome.last_line
    assert "use 0.2 or more, or 0" in outcome.last_line
    assert outcome.text.count("are needed") == 1


@pytest.mark.parametrize(("weight", "is_warned"), [(1000, True), (0.001, False)])
def test_a_term_that_drowns_arcface_is_named_with_the_flag_to_lower(
    flags, tmp_path, weight, is_warned
):
    outcome = run_here(train_distill.main, [*flags, "--lambda-at", weight, "--epochs", 3])
    assert outcome.code == 0
    assert outcome.text.count("lower --lambda-at") == is_warned
    assert "% of the gradients on the adapters" in outcome.text
    pulls = [row for row in read_json_lines(tmp_path / "checkpoints" / "metrics.jsonl")
             if row["split"] == "terms"]  # fmt: skip
    assert [row["step"] for row in pulls] == [1, 10]
    assert (pulls[1]["Pull/AT"] > 20 * pulls[1]["Pull/ArcFace"]) == is_warned


def test_watching_the_gradients_changes_no_number(flags, tmp_path, monkeypatch):
    watched = ["--run-dir", tmp_path / "watched", "--epochs", 3]
    assert run_here(train_distill.main, [*flags, *watched]).code == 0
    monkeypatch.setattr("face_distill.distill.losses.Balance.measure", lambda *_: {})
    assert run_here(train_distill.main, [*flags, "--epochs", 3]).code == 0
    assert totals(tmp_path / "watched") == totals(tmp_path / "checkpoints")


def test_the_log_says_which_terms_an_epoch_had(flags):
    outcome = run_here(train_distill.main, [*flags, "--epochs", 3])
    assert "epoch 1/3: ArcFace alone (warm-up) | training loss" in outcome.text
    assert "epoch 2/3 with all terms from here on | training loss" in outcome.text
    assert "epoch 3/3 | training loss" in outcome.text


@pytest.mark.serial
def test_two_processes_train_as_one_does_on_the_same_batches(flags, tmp_path):
    shared = [*flags, "--epochs", 2, "--run-dir"]
    assert run_here(train_distill.main, [*shared, tmp_path / "1"]).code == 0
    with start([SCRIPT, *shared, tmp_path / "2", "--nproc", 2]) as running:
        assert running.finish().code == 0, running.text
    one, two = totals(tmp_path / "1"), totals(tmp_path / "2")
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
        [sys.executable, script, "--print-config"], capture_output=True, text=True, check=True
    )
    assert json.loads(shown.stdout)["batch_size"] == 64


@pytest.mark.parametrize("place", ["root", "directory", "elsewhere", "link"])
def test_the_script_starts_from_anywhere(flags, tmp_path, place):
    link = tmp_path / "a link.py"
    link.symlink_to(SCRIPT)
    script, cwd = {
        "root": ("face_distill/train_distill.py", ROOT),
        "directory": ("train_distill.py", ROOT / "face_distill"),
        "elsewhere": (str(SCRIPT), tmp_path),
        "link": (str(link), tmp_path),
    }[place]
    command = [sys.executable, script, *map(str, flags), "--dry-run"]
    shown = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    assert "1 process(es) x 4" in shown.stdout
    assert not (tmp_path / "checkpoints").exists()


def test_the_documents_bare_import_works_beside_the_script(faces):
    code = (
        "from FaceDataset import FaceDataset; import sys; from pathlib import Path;"
        "print(len(FaceDataset(Path(sys.argv[1]), 'first_n', limit=8)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(faces.data_root)],
        cwd=ROOT / "face_distill", capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert shown.stdout.split() == ["8"]


def test_config_json_holds_what_a_resume_needs(flags, tmp_path):
    assert run_here(train_distill.main, [*flags, "--epochs", 1]).code == 0
    written = read_json(tmp_path / "checkpoints" / "config.json")
    assert written["settings"]["batch_size"] == 4
    assert written["identity"]["world_size"] == 1


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


def test_a_damaged_picture_is_left_out_of_the_training(flags, faces, tmp_path):
    data = Path(shutil.copytree(faces.data_root, tmp_path / "faces_emore"))
    offset = RecordReader(data / "train.rec", data / "train.idx").offset_of(3)
    content = bytearray((data / "train.rec").read_bytes())
    content[offset + 32 : offset + 1032] = bytes(1000)  # of the picture, not of its label
    (data / "train.rec").write_bytes(content)
    outcome = run_here(train_distill.main, [*flags, "--data-root", data, "--epochs", 1])
    assert outcome.code == 0, outcome.text
    assert "19 images of 5 identities, 0 held out, 1 damaged left out" in outcome.text
    assert f"left out: {data / 'train.rec'} key 3 at byte" in outcome.text
    assert status_of(tmp_path / "checkpoints")["data"]["damaged"] == 1
