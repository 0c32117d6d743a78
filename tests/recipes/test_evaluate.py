"""face_distill/evaluate.py: figures against independent computations, the files, the refusals."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from face_distill import evaluate
from face_distill.demo_data import demo
from face_distill.distill import model, pairs, verification
from face_distill.distill.images import Preprocess
from shared.files import read_json
from tests.face_students import BEST, student_of, write_run
from tests.harness import run_here
from tests.trainings import small_faces


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> demo.DemoPaths:
    """A demo of few faces, 60 pairs of strangers among them, and a student trained on nothing."""
    root = tmp_path_factory.mktemp("recipe") / "demo"
    paths = small_faces(root, NUM_PEOPLE=2, PICTURES_EACH=2, PAIRS_A_FOLD=6)
    write_run(root / "runs" / "checkpoints", paths.weights)
    return paths


@pytest.fixture
def checkpoint(faces, tmp_path) -> Path:
    """The student's file in a run directory of its own."""
    return Path(shutil.copytree(faces.root / "runs" / "checkpoints", tmp_path / "run")) / BEST


@pytest.fixture
def flags(faces, checkpoint):
    return ["--checkpoint", checkpoint, "--data-root", faces.pairs, "--device", "cpu"]


def pair_file(path: Path) -> tuple[list[bytes], np.ndarray]:
    jpegs, same = pickle.loads(path.read_bytes())
    return jpegs, np.array(same)


def distances_by_hand(jpegs: list[bytes], embed) -> np.ndarray:
    """Image after image, mirrored by numpy, without a line of the code under test."""
    rows = []
    for jpeg in jpegs:
        pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        both = [torch.from_numpy(p.transpose(2, 0, 1).copy()) for p in (pixels, pixels[:, ::-1])]
        with torch.no_grad():
            row = sum(embed(Preprocess(112)(image[None]))[0].double() for image in both)
        rows.append((row / row.norm()).numpy())
    return np.square(np.array(rows[0::2]) - np.array(rows[1::2])).sum(1)


def check(figures: dict, distances: np.ndarray, same: np.ndarray) -> None:
    """The JSON's figures of one model against those of distances by hand."""
    expected = verification.accuracy_of(distances, same)  # against its definition in tests/unit
    assert figures["accuracy"] == pytest.approx(expected.mean, abs=1e-12)
    assert figures["accuracy_std"] == pytest.approx(expected.std, abs=1e-12)
    assert figures["auc"] == pytest.approx(roc_auc_score(same, -distances), abs=1e-12)
    far, tar, _ = roc_curve(same, -distances, drop_intermediate=False)
    exact = figures["tar_at_far"]
    assert exact["0.1"]["tar"] == pytest.approx(tar[far <= 0.1 + 1e-12].max(), abs=1e-12)
    for target in ("0.01", "0.001", "0.0001"):  # 30 pairs of two people
        assert exact[target]["tar"] is None and "less than one of the 30" in exact[target]["reason"]


@pytest.fixture(scope="module")
def results(faces, tmp_path_factory) -> tuple[dict, str, Path]:
    """The JSON, the printed text and the directory of a run with the stored teacher."""
    out = tmp_path_factory.mktemp("out") / "new"
    outcome = run_here(
        evaluate.main,
        ["--checkpoint", faces.root / "runs" / "checkpoints", "--data-root", faces.data_root,
         "--teacher", faces.teacher_pairs.parent, "--out", out, "--device", "cpu"],
    )  # fmt: skip
    assert outcome.code == 0, outcome.text
    return read_json(out / "verification.json"), outcome.text, out


def test_the_figures_are_those_of_an_independent_computation(results, faces):
    jpegs, same = pair_file(faces.pairs)
    tower, student = model.load_tower(faces.weights), student_of(faces.weights).eval()
    rows = np.load(faces.teacher_pairs).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    distances = {
        "untrained student": distances_by_hand(jpegs, lambda x: tower(x).last_hidden_state[:, 0]),
        "student": distances_by_hand(jpegs, lambda x: student(x)[0]),
        "teacher": np.square(rows[0::2] - rows[1::2]).sum(1),
    }
    found = results[0]["metrics"]["lfw"]
    assert list(found) == list(distances)
    for name, expected in distances.items():
        check(found[name], expected, same)
    assert found["untrained student"]["auc"] != found["student"]["auc"]
    assert found["teacher"]["accuracy"] > 0.9


def test_json_table_page_and_chart_show_the_same_figures(results, faces):
    written, text, out = results
    assert written["counts"]["lfw"] == {
        "pairs": 60, "same": 30, "different": 30, "far_step": 1 / 30, "pairs_in_file": 60,
    }  # fmt: skip
    assert written["protocol"]["headline"] == "tar_at_far"
    assert written["data"] == str(faces.data_root)
    assert written["checkpoint"].endswith("runs/checkpoints/best_student_adapter_face.pth")
    models = written["metrics"]["lfw"]
    folded = models["student"]["tar_at_far_10_fold"]["0.1"]
    assert {"tar", "tar_std", "far", "reason"} == folded.keys() and 0 <= folded["tar"] <= 1

    rows = [line.split() for line in text.splitlines() if line.startswith("lfw  ")]
    assert [row[1] for row in rows] == ["untrained", "student", "teacher"]
    student = models["student"]
    assert rows[1][2:] == [
        f"{student['accuracy']:.4f}", "±", f"{student['accuracy_std']:.4f}",
        f"{student['threshold']:.2f}", f"{student['auc']:.4f}",
        f"{student['tar_at_far']['0.1']['tar']:.4f}", "-", "-", "-",
    ]  # fmt: skip
    assert "lfw: 60 pairs, 30 of two people: FAR moves in steps of 0.033; 0.01, 0.001," in text

    page, chart = (out / "verification.html").read_text(), (out / "roc_lfw.svg").read_text()
    for name, figures in models.items():
        assert f"{figures['accuracy']:.4f} ± {figures['accuracy_std']:.4f}" in page
        assert f"{name}, AUC {figures['auc']:.4f}" in chart
    assert page.count("<svg") == 1 and "<script" not in page
    assert sorted(path.name for path in out.iterdir()) == [
        "roc_lfw.svg", "verification.html", "verification.json",
    ]  # fmt: skip


def test_the_curve_rises_where_a_pair_of_two_people_is_let_in():
    curve = verification.Roc(np.array([0, 0, 0.5, 0.5, 1]), np.array([0, 0.2, 0.2, 0.6, 1]))
    far, tar = evaluate._staircase(curve)
    assert far.tolist() == [0, 0.5, 0.5, 1, 1]
    assert tar.tolist() == [0.2, 0.2, 0.6, 0.6, 1]


# ---------------------------------------------------------------- ways to run it


def test_results_lie_beside_the_checkpoint_in_the_usual_order_of_the_sets(
    faces, flags, checkpoint, tmp_path
):
    """A teacher may know some of them alone; training's own file stays as it is."""
    trainings = checkpoint.parent / "verification.json"
    before = trainings.read_text()
    data = tmp_path / "data"
    data.mkdir()
    for name in ("agedb_30.bin", "lfw.bin", "unknown.bin"):
        shutil.copy(faces.pairs, data / name)
    more = ["--data-root", data, "--teacher", faces.teacher_pairs.parent, "--limit", 10]
    outcome = run_here(evaluate.main, [*flags, *more])
    assert outcome.code == 0, outcome.text
    assert trainings.read_text() == before
    out = checkpoint.parent / "evaluation"
    written = read_json(out / "verification.json")
    assert list(written["metrics"]) == ["lfw", "agedb_30"]
    assert list(written["metrics"]["agedb_30"]) == ["untrained student", "student"]
    assert "teacher" in written["metrics"]["lfw"]
    assert "no embeddings of the teacher for agedb_30" in outcome.text
    assert written["blip_path"].endswith("weights/blip2_weights")  # out of the run's settings
    assert (out / "roc_agedb_30.svg").is_file()


def test_a_limit_takes_pairs_of_both_kinds_over_the_whole_file_with_their_teachers_rows(
    faces, tmp_path
):
    jpegs, same = pair_file(faces.pairs)
    few = pairs.read_set(faces.pairs, 20)  # folds of 6 pairs, half and half: one of each kind
    assert few.image_numbers[::2].tolist() == [
        12 * fold + shift for fold in range(10) for shift in (0, 6)
    ]
    assert (few.image_numbers[1::2] == few.image_numbers[::2] + 1).all()
    assert few.pairs.images == [jpegs[number] for number in few.image_numbers]
    assert few.pairs.same.tolist() == [True, False] * 10
    rows = np.zeros((120, 3), np.float32)  # axis 0 or 1: distance 0 for one person, 2 for two
    rows[0::2, 0] = 1
    rows[np.arange(1, 120, 2), np.where(same, 0, 1)] = 1
    np.save(tmp_path / "lfw.npy", rows)
    distances = verification.stored_distances(tmp_path / "lfw.npy", [few])["lfw"]
    assert distances.tolist() == np.where(few.pairs.same, 0.0, 2.0).tolist()
    kinds = pairs.read_set(faces.pairs, 23).pairs.same
    assert len(kinds) == 23 and kinds.sum() in (11, 12)


class Corner(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images[:, :, 40:44, 30:34].flatten(1), images[:, :, ::16, ::16]


def test_a_network_teaches_with_its_mirrored_images_too_and_models_come_one_by_one(
    faces, flags, tmp_path, monkeypatch
):
    alive, most = set(), []

    class Counted(model.FaceEmbedder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    monkeypatch.setattr(model, "FaceEmbedder", Counted)
    torch.jit.script(Corner()).save(str(tmp_path / "teacher.pt"))
    teacher = ["--teacher", tmp_path / "teacher.pt", "--teacher-arch", "torchscript"]
    outcome = run_here(evaluate.main, [*flags, *teacher, "--out", tmp_path / "out"])
    assert outcome.code == 0, outcome.text
    jpegs, same = pair_file(faces.pairs)

    def embed(image):  # from CLIP's normalisation, which the hand computation brings, to 0.5, 0.5
        clip = Preprocess(112)
        levels = image * clip.std.view(3, 1, 1) + clip.mean.view(3, 1, 1)
        return ((levels - 0.5) / 0.5)[:, :, 40:44, 30:34].flatten(1)

    written = read_json(tmp_path / "out" / "verification.json")
    check(written["metrics"]["lfw"]["teacher"], distances_by_hand(jpegs, embed), same)
    assert most == [1, 1]


def as_folder(pair_file_: Path, root: Path, size: int = 112) -> Path:
    """The pairs as LFW keeps them: a folder a person, and pairs.txt."""
    jpegs, same = pair_file(pair_file_)
    lines = ["10\t3"]
    for number, is_same in enumerate(same):
        names = [f"P_{2 * number}", f"P_{2 * number}" if is_same else f"Q_{2 * number}"]
        for place, name in enumerate(names):
            path = root / name / f"{name}_{place + 1:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpegs[2 * number + place])
            if size != 112:
                Image.open(path).resize((size, size)).save(path)
        one, two = names
        lines.append(f"{one}\t1\t2" if is_same else f"{one}\t1\t{two}\t2")
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    return root


def test_lfw_as_a_folder_gives_the_pairs_of_its_bin_file(faces, tmp_path, caplog):
    root = as_folder(faces.pairs, tmp_path / "my lfw")
    listed, pickled = (pairs.read_set(path) for path in (root / "pairs.txt", faces.pairs))
    assert (listed.name, pickled.name) == ("my lfw", "lfw")
    assert listed.pairs.images == pickled.pairs.images
    assert listed.pairs.same.tolist() == pickled.pairs.same.tolist()
    assert "aligned crops" not in caplog.text
    pairs.read_set(as_folder(faces.pairs, tmp_path / "lfw", size=250) / "pairs.txt")
    assert "250 x 250: aligned crops of 112 x 112 are expected" in caplog.text


def test_a_wrong_line_of_the_pairs_is_named(faces, flags, tmp_path):
    folder = as_folder(faces.pairs, tmp_path / "lfw")
    lines = (folder / "pairs.txt").read_text().splitlines()
    for line, message in {
        "A_B one two": "pairs.txt line 5: expected 'name number number'",
        "A_B 1 2": "A_B_0001.jpg is missing: unpack the whole of LFW",
    }.items():
        (folder / "pairs.txt").write_text("\n".join([*lines[:4], line, *lines[4:]]))
        refused([*flags, "--data-root", folder], message)


def test_the_demo_takes_the_demos_student_pairs_and_teacher(faces, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "PROJECT_ROOT", str(tmp_path))
    refused(["--demo"], "type ./train.sh --demo first")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(evaluate, "PROJECT_ROOT", str(faces.root.parent))
    words = ["--demo", "--out", tmp_path, "--device", "cpu", "--limit", 10]
    outcome = run_here(evaluate.main, words)
    assert outcome.code == 0, outcome.text
    written = read_json(tmp_path / "verification.json")
    assert written["data"] == str(faces.pairs)
    assert "teacher" in written["metrics"]["drawn pairs"]


# ---------------------------------------------------------------- refusals


def refused(arguments, *messages: str) -> None:
    outcome = run_here(evaluate.main, arguments)
    assert outcome.code == 2, outcome.text
    assert "Traceback" not in outcome.text
    for message in messages:
        assert message in outcome.last_line
    assert "accuracy" not in outcome.text  # nothing was embedded


def test_a_tower_of_another_size_and_a_file_without_adapters_are_refused(faces, flags, tmp_path):
    other = tmp_path / "tower"
    shutil.copytree(faces.weights, other)
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 32
    (other / "config.json").write_text(json.dumps(config))
    refused([*flags, "--blip-path", other], "of another shape")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    refused([*flags, "--checkpoint", tmp_path / "other.pth", "--blip-path", faces.weights],
            "holds no face adapters")  # fmt: skip


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damaged_sets(faces, tmp_path) -> dict[str, object]:
    """What is said of a set → what is in it."""
    jpegs, same = pair_file(faces.pairs)
    broken = [*jpegs[:17], jpegs[17][:100], *jpegs[18:]]
    small = io.BytesIO()
    Image.new("RGB", (64, 64)).save(small, "PNG")
    return {
        "is refused: it asks for": (jpegs, [Touch(tmp_path / "ran"), *same[1:]]),
        "image 17 of the pairs cannot be decoded": (broken, same.tolist()),
        "image 119 has another": ([*jpegs[:-1], small.getvalue()], same.tolist()),
        "9 pairs cannot be split into 10 folds": (jpegs[:18], same[:9].tolist()),
        "60 pairs of one person and 0 of two": (jpegs, [True] * 60),
    }


def test_a_bad_set_is_named_before_anything_is_embedded(faces, flags, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(faces.pairs, data / "lfw.bin")
    for message, content in damaged_sets(faces, tmp_path).items():
        (data / "cplfw.bin").write_bytes(pickle.dumps(content))
        refused([*flags, "--data-root", data], str(data / "cplfw.bin"), message)
    (data / "cplfw.bin").write_bytes(faces.pairs.read_bytes()[:5000])
    refused([*flags, "--data-root", data], "cplfw.bin is cut off")
    assert not (tmp_path / "ran").exists()


ROWS = {
    "expected (120, D)": np.ones((119, 4), np.float32),
    "holds int64 (120, 4)": np.ones((120, 4), np.int64),
    "row 55 is empty, NaN or": np.array([[1.0]] * 55 + [[np.nan]] + [[1.0]] * 64),
    "row 0 is empty": np.ones((120, 0), np.float32),
}


def test_teacher_rows_that_do_not_fit_the_pairs_are_refused(faces, flags, tmp_path):
    for message, rows in ROWS.items():
        np.save(tmp_path / "lfw.npy", rows)
        refused([*flags, "--teacher", tmp_path / "lfw.npy"], str(tmp_path / "lfw.npy"), message)
    for name in ("lfw.bin", "calfw.bin"):
        shutil.copy(faces.pairs, tmp_path / name)
    refused([*flags, "--data-root", tmp_path, "--teacher", faces.teacher_pairs],
            "is one file for 2 sets: give the directory of lfw.npy, calfw.npy")  # fmt: skip


def test_teacher_files_that_are_no_arrays_are_refused_and_do_not_run(flags, tmp_path):
    path = tmp_path / "lfw.npy"
    np.save(path, np.array([Touch(tmp_path / "ran")], dtype=object), allow_pickle=True)
    refused([*flags, "--teacher", path], "lfw.npy is cut off or no array")
    for content in (b"", b"\x93NUMPY\x01\x00", b"version https://git-lfs"):
        path.write_bytes(content)
        refused([*flags, "--teacher", path], "lfw.npy is cut off or no array")
    path.unlink()
    refused([*flags, "--teacher", tmp_path], "holds none of lfw.npy")
    assert not (tmp_path / "ran").exists()
