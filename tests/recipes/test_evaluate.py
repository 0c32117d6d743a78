"""face_distill/evaluate.py: figures against independent computations, the files, the refusals."""

import io
import json
import pickle
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from face_distill import evaluate
from face_distill.demo_data import demo
from face_distill.distill import model, pairs, verification
from face_distill.distill.images import Preprocess
from shared.files import read_json, write_json
from tests.harness import run_here
from tests.trainings import small_faces

LAYERS = [0, 3]


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> demo.DemoPaths:
    """A demo of few faces, 60 pairs of strangers among them, and a student trained on nothing."""
    paths = small_faces(
        tmp_path_factory.mktemp("recipe") / "demo", NUM_PEOPLE=2, PICTURES_EACH=2, PAIRS_A_FOLD=6
    )
    run_dir = paths.root / "runs" / "checkpoints"
    run_dir.mkdir(parents=True)
    torch.save(model.trainable_state(student_of(paths)), run_dir / "best_student_adapter_face.pth")
    write_json(run_dir / "config.json", {"settings": {"blip_path": str(paths.weights)}})
    return paths


@pytest.fixture
def checkpoint(faces, tmp_path) -> Path:
    """The student's file in a run directory of its own."""
    shutil.copytree(faces.root / "runs" / "checkpoints", tmp_path / "run")
    return tmp_path / "run" / "best_student_adapter_face.pth"


@pytest.fixture
def flags(faces, checkpoint):
    return ["--checkpoint", checkpoint, "--data-root", faces.pairs, "--device", "cpu"]


def student_of(paths: demo.DemoPaths) -> model.FaceStudent:
    """The tower with strong random adapters, the same at every call."""
    student = model.FaceStudent(model.load_tower(paths.weights), LAYERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for layer in LAYERS:
            adapter = student.vit.encoder.layers[layer].mlp.adapter
            for parameter in adapter.parameters():
                parameter.data = 0.3 * torch.randn(parameter.shape)
    return student.eval()


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


def accuracy_by_hand(distances: np.ndarray, same: np.ndarray) -> tuple[float, float]:
    thresholds, accuracies = np.arange(0, 4, 0.01), []
    for train, test in KFold(10, shuffle=False).split(distances):
        right = [((distances[train] < t) == same[train]).mean() for t in thresholds]
        best = thresholds[int(np.argmax(right))]
        accuracies.append(((distances[test] < best) == same[test]).mean())
    return float(np.mean(accuracies)), float(np.std(accuracies))


def check(figures: dict, distances: np.ndarray, same: np.ndarray) -> None:
    """The JSON's figures of one model against sklearn's."""
    mean, std = accuracy_by_hand(distances, same)
    assert figures["accuracy"] == pytest.approx(mean, abs=1e-12)
    assert figures["accuracy_std"] == pytest.approx(std, abs=1e-12)
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


def test_the_students_figures_are_those_of_an_independent_computation(results, faces):
    jpegs, same = pair_file(faces.pairs)
    student = student_of(faces)
    distances = distances_by_hand(jpegs, lambda image: student(image)[0])
    check(results[0]["metrics"]["lfw"]["student"], distances, same)


def test_the_untrained_students_figures_are_those_of_the_bare_tower(results, faces):
    jpegs, same = pair_file(faces.pairs)
    tower = model.load_tower(faces.weights)
    distances = distances_by_hand(jpegs, lambda image: tower(image).last_hidden_state[:, 0])
    untrained, student = (
        results[0]["metrics"]["lfw"][name] for name in ("untrained student", "student")
    )
    check(untrained, distances, same)
    assert untrained["auc"] != student["auc"]


def test_the_stored_teachers_figures_are_those_of_its_rows(results, faces):
    _, same = pair_file(faces.pairs)
    rows = np.load(faces.teacher_pairs).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    distances = np.square(rows[0::2] - rows[1::2]).sum(1)
    teacher = results[0]["metrics"]["lfw"]["teacher"]
    check(teacher, distances, same)
    assert teacher["accuracy"] > 0.9


def test_the_json_says_what_was_compared_and_which_figure_leads(results, faces):
    written = results[0]
    assert {"schema", "metrics", "counts", "checkpoint", "data"} <= written.keys()
    assert list(written["metrics"]["lfw"]) == ["untrained student", "student", "teacher"]
    assert written["counts"]["lfw"] == {
        "pairs": 60, "same": 30, "different": 30, "far_step": 1 / 30, "pairs_in_file": 60,
    }  # fmt: skip
    assert written["protocol"]["headline"] == "tar_at_far"
    assert written["data"] == str(faces.data_root)
    assert written["checkpoint"].endswith("runs/checkpoints/best_student_adapter_face.pth")
    folded = written["metrics"]["lfw"]["student"]["tar_at_far_10_fold"]["0.1"]
    assert {"tar", "tar_std", "far", "reason"} == folded.keys() and 0 <= folded["tar"] <= 1


def test_one_table_is_printed_with_the_resolution_under_it(results):
    written, text, _ = results
    rows = [line.split() for line in text.splitlines() if line.startswith("lfw  ")]
    assert [row[1] for row in rows] == ["untrained", "student", "teacher"]
    student = written["metrics"]["lfw"]["student"]
    assert rows[1][2:] == [
        f"{student['accuracy']:.4f}", "±", f"{student['accuracy_std']:.4f}",
        f"{student['threshold']:.2f}", f"{student['auc']:.4f}",
        f"{student['tar_at_far']['0.1']['tar']:.4f}", "-", "-", "-",
    ]  # fmt: skip
    assert "lfw: 60 pairs, 30 of two people: FAR moves in steps of 0.033; 0.01, 0.001," in text


class Texts(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.cells, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.cells.append(data)


def test_page_and_charts_show_the_same_figures(results):
    written, _, out = results
    page = Texts((out / "verification.html").read_text())
    for figures in written["metrics"]["lfw"].values():
        assert f"{figures['accuracy']:.4f} ± {figures['accuracy_std']:.4f}" in page.cells
    assert page.tags.count("svg") == 1 and "script" not in page.tags
    svg = ElementTree.parse(out / "roc_lfw.svg").getroot()
    texts = [element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    for name, figures in written["metrics"]["lfw"].items():
        assert f"{name}, AUC {figures['auc']:.4f}" in texts
    assert sorted(path.name for path in out.iterdir()) == [
        "roc_lfw.svg", "verification.html", "verification.json",
    ]  # fmt: skip


def test_the_curve_rises_where_a_pair_of_two_people_is_let_in():
    curve = verification.Roc(np.array([0, 0, 0.5, 0.5, 1]), np.array([0, 0.2, 0.2, 0.6, 1]))
    far, tar = evaluate._staircase(curve)
    assert far.tolist() == [0, 0.5, 0.5, 1, 1]
    assert tar.tolist() == [0.2, 0.2, 0.6, 0.6, 1]


# ---------------------------------------------------------------- ways to run it


def test_results_lie_beside_the_checkpoint_and_leave_trainings_file_alone(flags, checkpoint):
    trainings = checkpoint.parent / "verification.json"
    trainings.write_text('{"before": 0.5}')
    outcome = run_here(evaluate.main, [*flags, "--limit", 20])
    assert outcome.code == 0, outcome.text
    assert trainings.read_text() == '{"before": 0.5}'
    written = read_json(checkpoint.parent / "evaluation" / "verification.json")
    assert list(written["metrics"]["lfw"]) == ["untrained student", "student"]
    assert written["blip_path"].endswith("weights/blip2_weights")  # out of the run's settings


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
    assert verification.judge(distances, few.pairs.same).accuracy.mean == 1.0
    assert pairs.read_set(faces.pairs, 1000).pairs.images == jpegs
    for limit in range(10, 60):
        kinds = pairs.read_set(faces.pairs, limit).pairs.same
        assert len(kinds) == limit and abs(kinds.sum() - limit / 2) <= 0.5


def test_a_network_teaches_with_its_mirrored_images_too(faces, flags, tmp_path):
    class Corner(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images[:, :, 40:44, 30:34].flatten(1), images[:, :, ::16, ::16]

    torch.jit.script(Corner()).save(str(tmp_path / "teacher.pt"))
    outcome = run_here(
        evaluate.main,
        [*flags, "--teacher", tmp_path / "teacher.pt", "--teacher-arch", "torchscript",
         "--out", tmp_path / "out"],
    )  # fmt: skip
    assert outcome.code == 0, outcome.text
    jpegs, same = pair_file(faces.pairs)

    def embed(image):  # from CLIP's normalisation, which the hand computation brings, to 0.5, 0.5
        clip = Preprocess(112)
        levels = image * clip.std.view(3, 1, 1) + clip.mean.view(3, 1, 1)
        return ((levels - 0.5) / 0.5)[:, :, 40:44, 30:34].flatten(1)

    written = read_json(tmp_path / "out" / "verification.json")
    check(written["metrics"]["lfw"]["teacher"], distances_by_hand(jpegs, embed), same)


def test_several_sets_come_in_the_usual_order_and_a_teacher_may_know_some_alone(
    faces, flags, tmp_path
):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("agedb_30.bin", "lfw.bin", "unknown.bin"):
        shutil.copy(faces.pairs, data / name)
    outcome = run_here(
        evaluate.main,
        [*flags, "--data-root", data, "--teacher", faces.teacher_pairs.parent, "--limit", 10,
         "--out", tmp_path / "out"],
    )  # fmt: skip
    assert outcome.code == 0, outcome.text
    metrics = read_json(tmp_path / "out" / "verification.json")["metrics"]
    assert list(metrics) == ["lfw", "agedb_30"]
    assert "teacher" in metrics["lfw"] and "teacher" not in metrics["agedb_30"]
    assert "no embeddings of the teacher for agedb_30" in outcome.text
    assert (tmp_path / "out" / "roc_agedb_30.svg").is_file()


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


def test_lfw_as_a_folder_gives_the_figures_of_its_bin_file(faces, flags, tmp_path):
    folder = as_folder(faces.pairs, tmp_path / "my lfw")
    for data, out in ((faces.pairs, "bin"), (folder, "folder")):
        outcome = run_here(
            evaluate.main, [*flags, "--data-root", data, "--out", tmp_path / out, "--limit", 20]
        )
        assert outcome.code == 0, outcome.text
    bin_file, listed = (
        read_json(tmp_path / out / "verification.json")["metrics"] for out in ("bin", "folder")
    )
    assert listed["my lfw"] == bin_file["lfw"]
    assert "aligned crops" not in outcome.text


def test_pictures_that_are_no_aligned_crops_are_said(faces, flags, tmp_path):
    folder = as_folder(faces.pairs, tmp_path / "lfw", size=250)
    outcome = run_here(
        evaluate.main, [*flags, "--data-root", folder, "--out", tmp_path / "out", "--limit", 10]
    )
    assert outcome.code == 0, outcome.text
    assert "250 x 250: aligned crops of 112 x 112 are expected" in outcome.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("A_B 1", "pairs.txt line 5: expected 'name number number'"),
        ("A_B one two", "pairs.txt line 5: expected 'name number number'"),
        ("A_B 1 2", "A_B_0001.jpg is missing: unpack the whole of LFW"),
    ],
)
def test_a_wrong_line_of_the_pairs_is_named(faces, flags, tmp_path, line, message):
    folder = as_folder(faces.pairs, tmp_path / "lfw")
    lines = (folder / "pairs.txt").read_text().splitlines()
    (folder / "pairs.txt").write_text("\n".join([*lines[:4], line, *lines[4:]]))
    refused([*flags, "--data-root", folder], message)


def test_the_demo_takes_the_demos_student_pairs_and_teacher(faces, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "PROJECT_ROOT", str(faces.root.parent))
    outcome = run_here(evaluate.main, ["--demo", "--out", tmp_path, "--device", "cpu"])
    assert outcome.code == 0, outcome.text
    written = read_json(tmp_path / "verification.json")
    assert written["data"] == str(faces.pairs)
    assert "teacher" in written["metrics"]["drawn pairs"]


def test_the_demo_before_its_training_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "PROJECT_ROOT", str(tmp_path))
    outcome = run_here(evaluate.main, ["--demo"])
    assert outcome.code == 2
    assert "type ./train.sh --demo first" in outcome.last_line
    assert not list(tmp_path.iterdir())


def test_one_model_is_in_memory_at_a_time(faces, monkeypatch, flags, tmp_path):
    alive, most = set(), []

    class Counted(model.FaceEmbedder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    monkeypatch.setattr(model, "FaceEmbedder", Counted)
    out = ["--out", tmp_path / "out", "--limit", 10]
    assert run_here(evaluate.main, [*flags, *out]).code == 0
    assert most == [1, 1]


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


def damaged_sets(faces, tmp_path) -> dict[str, tuple[object, str]]:
    jpegs, same = pair_file(faces.pairs)
    broken = [*jpegs[:17], jpegs[17][:100], *jpegs[18:]]
    small = io.BytesIO()
    Image.new("RGB", (64, 64)).save(small, "PNG")
    return {
        "hostile": ((jpegs, [Touch(tmp_path / "ran"), *same[1:]]), "is refused: it asks for"),
        "broken image": ((broken, same.tolist()), "image 17 of the pairs cannot be decoded"),
        "mixed sizes": (([*jpegs[:-1], small.getvalue()], same.tolist()), "image 119 has another"),
        "too few": ((jpegs[:18], same[:9].tolist()), "9 pairs cannot be split into 10 folds"),
        "one kind": ((jpegs, [True] * 60), "60 pairs of one person and 0 of two"),
    }


@pytest.mark.parametrize(
    "damage", ["hostile", "broken image", "mixed sizes", "too few", "one kind"]
)
def test_a_bad_set_is_named_before_anything_is_embedded(faces, flags, tmp_path, damage):
    content, message = damaged_sets(faces, tmp_path)[damage]
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(faces.pairs, data / "lfw.bin")
    (data / "cplfw.bin").write_bytes(pickle.dumps(content))
    refused([*flags, "--data-root", data], str(data / "cplfw.bin"), message)
    assert not (tmp_path / "ran").exists()


def test_a_set_that_is_cut_off_is_named(faces, flags, tmp_path):
    (tmp_path / "cut.bin").write_bytes(faces.pairs.read_bytes()[:5000])
    refused([*flags, "--data-root", tmp_path / "cut.bin"], "cut.bin is cut off")


ROWS = {
    "one row short": (np.ones((119, 4), np.float32), "expected (120, D)"),
    "whole numbers": (np.ones((120, 4), np.int64), "holds int64 (120, 4)"),
    "three dimensions": (np.ones((120, 2, 2), np.float32), "expected (120, D)"),
    "not finite": (np.array([[1.0]] * 55 + [[np.nan]] + [[1.0]] * 64), "row 55 is empty, NaN or"),
    "no columns": (np.ones((120, 0), np.float32), "row 0 is empty"),
}


@pytest.mark.parametrize("fault", ROWS)
def test_teacher_rows_that_do_not_fit_the_pairs_are_refused(flags, tmp_path, fault):
    rows, message = ROWS[fault]
    np.save(tmp_path / "lfw.npy", rows)
    refused([*flags, "--teacher", tmp_path / "lfw.npy"], str(tmp_path / "lfw.npy"), message)


def test_teacher_files_that_are_no_arrays_are_refused_and_do_not_run(flags, tmp_path):
    path = tmp_path / "lfw.npy"
    np.save(path, np.array([Touch(tmp_path / "ran")], dtype=object), allow_pickle=True)
    refused([*flags, "--teacher", path], "lfw.npy is cut off or no array")
    for content in (b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04nonsense", b"version https://git-lfs"):
        path.write_bytes(content)
        refused([*flags, "--teacher", path], "lfw.npy is cut off or no array")
    path.unlink()
    refused([*flags, "--teacher", tmp_path], "holds none of lfw.npy")
    assert not (tmp_path / "ran").exists()


def test_one_teacher_file_for_two_sets_is_refused(faces, flags, tmp_path):
    for name in ("lfw.bin", "calfw.bin"):
        shutil.copy(faces.pairs, tmp_path / name)
    refused([*flags, "--data-root", tmp_path, "--teacher", faces.teacher_pairs],
            "is one file for 2 sets: give the directory of lfw.npy, calfw.npy")  # fmt: skip
