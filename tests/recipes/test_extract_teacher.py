"""extract_teacher.py: the numbers, the files training takes, and every way to be interrupted."""

import hashlib
import io
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from face_distill import extract_teacher, train_distill
from face_distill.demo_data import demo
from face_distill.distill import teacher_networks
from face_distill.distill.recordio import RecordReader
from face_distill.distill.teacher import TeacherFeatures, UnfinishedFeatures
from face_distill.FaceDataset import FaceDataset
from shared import lock
from shared.files import read_json, read_object
from tests.harness import ROOT, Outcome, run_here, start, status_of, wait_until
from tests.trainings import small_faces

SCRIPT = ROOT / "face_distill" / "extract_teacher.py"
FILES = ("teacher_embedding.npy", "teacher_feat_map.npy", "teacher_labels.npy", "manifest.json")


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> demo.DemoPaths:
    """Five people of four pictures each, and a tiny tower."""
    return small_faces(tmp_path_factory.mktemp("faces"))


class Small(nn.Module):
    """A teacher of one convolution; `repeats` more make it slow."""

    def __init__(self, repeats: int):
        super().__init__()
        self.repeats = repeats
        self.conv = nn.Conv2d(3, 6, 16, 16)
        self.slow = nn.Conv2d(3, 3, 9, padding=4)

    def forward(self, images):
        waste = images
        for _ in range(self.repeats):
            waste = torch.tanh(self.slow(waste))
        maps = self.conv(images) + 0.0 * waste.mean()
        return maps.mean((2, 3)), maps


def exported(path: Path, repeats: int) -> Path:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Small(repeats).eval()), path)
    return path


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, Path]:
    """A seeded IResNet-18, and a module of its own that is quick, and one that is slow."""
    root = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    network = teacher_networks.build_iresnet("iresnet18")
    nn.init.constant_(network.layer4[-1].bn3.weight, 0.03)  # energies as small as trained ones
    nn.init.constant_(network.layer4[0].downsample[1].weight, 0.03)
    torch.save(network.state_dict(), root / "backbone.pth")
    return {
        "iresnet18": root / "backbone.pth",
        "quick": exported(root / "quick.pt", 0),
        "slow": exported(root / "slow.pt", 12),
    }


def flags_for(faces, weights, out, *more):
    arch = [] if weights.suffix == ".pth" else ["--arch", "torchscript"]
    return [
        "--weights", weights, *arch, "--data-root", faces.data_root, "--limit", 20,
        "--workers", 0, "--out", out, "--batch-size", 3, *more,
    ]  # fmt: skip


def extracted(flags):
    outcome = run_here(extract_teacher.main, flags)
    assert outcome.code == 0, outcome.text
    return outcome


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def pixels_of(faces) -> np.ndarray:
    """The 20 pictures as Pillow decodes them, (20, 112, 112, 3)."""
    reader = RecordReader(faces.data_root / "train.rec", faces.data_root / "train.idx")
    jpegs = [reader.labelled(key).content for key in range(1, 21)]
    return np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs])


def test_embeddings_and_maps_are_those_of_a_direct_computation(faces, networks, tmp_path):
    extracted(flags_for(faces, networks["iresnet18"], tmp_path / "out"))
    network = teacher_networks.build_iresnet("iresnet18").eval()
    network.load_state_dict(torch.load(networks["iresnet18"], weights_only=True))
    images = torch.from_numpy((pixels_of(faces) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        embeddings, maps = network.embed_and_map(images)
    energy = maps.double().square().sum(1).reshape(20, 49).numpy()
    weights = np.exp(energy - energy.max(axis=1, keepdims=True))
    expected = weights / weights.sum(axis=1, keepdims=True)
    found = TeacherFeatures(tmp_path / "out")
    np.testing.assert_allclose(found.rows(range(20))[0], embeddings, rtol=1e-3, atol=1e-4)
    stored = np.load(tmp_path / "out" / "teacher_feat_map.npy")
    np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(stored.sum(axis=1), 1, atol=1e-6)
    assert (expected > 1e-3).mean() > 0.5, "one place holds everything: the test sees nothing"
    assert np.load(tmp_path / "out" / "teacher_labels.npy").tolist() == [i // 4 for i in range(20)]


def test_the_manifest_says_what_was_done(faces, networks, tmp_path):
    more = ["--selection", "per_id", "--per-id", 2, "--limit", 6, "--temperature", 2]
    extracted(flags_for(faces, networks["quick"], tmp_path / "out", *more))
    manifest = read_json(tmp_path / "out" / "manifest.json")
    dataset = FaceDataset(faces.data_root, "per_id", 6, 2, cache=False)
    assert manifest == {
        "schema": 1, "teacher": "torchscript", "weights": "quick.pt",
        "weights_sha256": hashlib.sha256(networks["quick"].read_bytes()).hexdigest(),
        "selection": "per_id", "selection_sha256": dataset.selection_sha256(),
        "limit": 6, "per_id": 2, "num_images": 6,
        "image_size": 112, "resize": "bicubic, antialias", "colours": "RGB",
        "mean": [0.5] * 3, "std": [0.5] * 3,
        "embedding_shape": [6], "map": "probability", "map_shape": [49], "temperature": 2.0,
        "amp": "off", "batch_size": 3, "device": "cpu",
    }  # fmt: skip
    TeacherFeatures(tmp_path / "out").check_alignment(dataset)


def train(faces, features: Path, run_dir: Path, *more: object) -> Outcome:
    flags = [
        "--blip-path", faces.weights, "--data-root", faces.data_root, "--batch-size", 4,
        "--teacher-feat-dir", features, "--epochs", 1, "--adapter-layers", "spread:2",
        "--workers", 0, "--run-dir", run_dir,
    ]  # fmt: skip
    return run_here(train_distill.main, [*flags, *more])


def test_training_takes_the_directory_as_it_is_and_refuses_another_selection(
    faces, networks, tmp_path
):
    more = ["--selection", "per_id", "--per-id", 2, "--limit", 10, "--map", "features"]
    outcome = extracted(flags_for(faces, networks["quick"], tmp_path / "out", *more))
    wanted = "--selection per_id --per-id 2"
    assert wanted in outcome.text  # what to type for the training
    outcome = train(faces, tmp_path / "out", tmp_path / "run")
    assert outcome.code == 2
    assert str(tmp_path / "out") in outcome.last_line and str(faces.data_root) in outcome.last_line
    outcome = train(faces, tmp_path / "out", tmp_path / "again", *wanted.split())
    assert outcome.code == 0, outcome.text
    assert "attention transfer zagoruyko on features maps" in outcome.text


def test_a_folder_of_folders_is_read_too(faces, networks, tmp_path):
    root = tmp_path / "faces"
    for number in range(4):
        path = root / f"person{number // 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (150, 130), (40 * number, 90, 20)).save(path)
    extracted([*flags_for(faces, networks["quick"], tmp_path / "out"), "--data-root", root,
               "--limit", 0])  # fmt: skip
    assert np.load(tmp_path / "out" / "teacher_labels.npy").tolist() == [0, 0, 1, 1]
    outcome = train(faces, tmp_path / "out", tmp_path / "run", "--data-root", root)
    assert outcome.code == 0, outcome.text


def test_batches_workers_and_bfloat16_change_no_more_than_their_digits(faces, networks, tmp_path):
    out = {name: tmp_path / name for name in ("one", "workers", "whole", "bf16")}
    more = {"workers": ["--workers", 2], "whole": ["--batch-size", 20], "bf16": ["--amp", "bf16"]}
    for name, directory in out.items():
        extracted(flags_for(faces, networks["quick"], directory, *more.get(name, [])))
    assert contents(out["one"]) == contents(out["workers"])
    arrays = {
        name: [np.load(directory / file) for file in FILES[:2]] for name, directory in out.items()
    }
    for ours, theirs in zip(arrays["one"], arrays["whole"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    exact, rounded = arrays["one"][0], arrays["bf16"][0]
    assert 0 < np.abs(exact - rounded).max() < 0.02
    assert rounded.dtype == np.float32
    assert read_json(out["bf16"] / "manifest.json")["amp"] == "bf16"


def crash_after(monkeypatch, batches: int) -> None:
    """Let the extraction write that many batches, and break then."""
    write, written = UnfinishedFeatures.write, []

    def counted(self, first, *arrays):
        if len(written) == batches:
            raise RuntimeError("the machine is gone")
        written.append(first)
        write(self, first, *arrays)

    monkeypatch.setattr(UnfinishedFeatures, "write", counted)


def rows_in(out: Path) -> int:
    """How many rows an unfinished extraction has."""
    return read_object(out / "unfinished.json").get("rows", 0)


def test_rows_that_are_there_are_kept_and_not_computed_again(faces, networks, tmp_path):
    out = tmp_path / "out"
    flags = flags_for(faces, networks["quick"], out)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 3)
        assert run_here(extract_teacher.main, flags).code == 1
    assert not (out / "manifest.json").exists() and rows_in(out) == 9
    assert status_of(out)["state"] == "failed"
    stored = np.load(out / "teacher_embedding.npy", mmap_mode="r+")
    stored[:3] = 77  # what a recomputation would overwrite
    stored.flush()
    outcome = extracted(flags)
    assert "continuing: 9 of 20 rows are there" in outcome.text
    found = np.load(out / "teacher_embedding.npy")
    assert (found[:3] == 77).all() and not (found[3:] == 77).any()


def test_other_settings_never_continue_what_was_begun(faces, networks, tmp_path):
    flags = flags_for(faces, networks["quick"], tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, 3)
        run_here(extract_teacher.main, flags)
    outcome = extracted([*flags, "--temperature", 3])
    assert "continuing" not in outcome.text and "temperature: 1.0 → 3.0" in outcome.text
    extracted(flags_for(faces, networks["quick"], tmp_path / "fresh", "--temperature", 3))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_finished_extraction_is_left_alone_and_another_one_moves_it_aside(
    faces, networks, tmp_path
):
    out = tmp_path / "out"
    flags = flags_for(faces, networks["quick"], out)
    extracted(flags)
    before = contents(out)
    times = {name: (out / name).stat().st_mtime_ns for name in FILES}
    assert "nothing to do" in extracted(flags).last_line
    assert {name: (out / name).stat().st_mtime_ns for name in FILES} == times
    outcome = extracted([*flags, "--map", "features"])
    assert f"{out}.1" in outcome.text and "map: probability → features" in outcome.text
    assert contents(tmp_path / "out.1") == before
    assert np.load(out / "teacher_feat_map.npy").shape == (20, 6, 7, 7)


def test_nan_from_the_teacher_names_the_row(faces, tmp_path):
    class Broken(nn.Module):
        def forward(self, images):
            maps = images[:, :, :7, :7] + 0.0
            embeddings = maps.mean((2, 3))
            if embeddings.shape[0] == 2:  # the last batch: rows 18 and 19
                embeddings[1, 0] = float("nan")
            return embeddings, maps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Broken()), tmp_path / "broken.pt")
    flags = flags_for(faces, tmp_path / "broken.pt", tmp_path / "out")
    outcome = run_here(extract_teacher.main, flags)
    assert outcome.code == 2
    assert "NaN or infinity for row 19 (key 20 of" in outcome.last_line
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.fixture(scope="module")
def undisturbed(faces, networks, tmp_path_factory) -> dict[str, bytes]:
    """The files of an extraction by the slow module in batches of one."""
    out = tmp_path_factory.mktemp("undisturbed")
    extracted(flags_for(faces, networks["slow"], out, "--batch-size", 1))
    return contents(out)


@pytest.mark.serial
def test_kill_9_half_way_then_the_same_command_gives_the_undisturbed_bytes(
    faces, networks, undisturbed, tmp_path
):
    flags = flags_for(faces, networks["slow"], tmp_path / "out", "--batch-size", 1)
    with start([SCRIPT, *flags]) as running:
        wait_until(lambda: rows_in(tmp_path / "out") >= 4, "row 4", running=running)
        running.signal(signal.SIGKILL)
        running.finish()
        assert running.leaves_nothing()
    kept = rows_in(tmp_path / "out")
    assert 4 <= kept < 20
    assert f"continuing: {kept} of 20 rows are there" in extracted(flags).text
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.serial
@pytest.mark.parametrize(
    ("number", "code", "more"),
    [
        (signal.SIGTERM, 143, ["--nproc", 2]),
        pytest.param(signal.SIGINT, 130, [], marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, 143, ["--workers", 1], marks=pytest.mark.full),
    ],
)
def test_a_stop_signal_keeps_the_rows_and_says_how_to_go_on(
    faces, networks, undisturbed, tmp_path, number, code, more
):
    flags = flags_for(faces, networks["slow"], tmp_path / "out", "--batch-size", 1)
    with start([SCRIPT, *flags, *more]) as running:
        wait_until(lambda: rows_in(tmp_path / "out") >= 3, "row 3", running=running)
        running.signal(number)
        outcome = running.finish()
        assert running.leaves_nothing()
    kept = rows_in(tmp_path / "out")
    assert outcome.code == code, outcome.text
    assert 3 <= kept < 20
    line = f"{number.name}: {kept} of 20 rows are kept; the same command continues"
    assert line in outcome.last_line
    assert status_of(tmp_path / "out")["state"] == "stopped"
    assert f"continuing: {kept} of 20" in extracted(flags).text
    assert contents(tmp_path / "out") == undisturbed  # whoever computed the rows


def test_two_extractions_into_one_directory_do_not_meet(faces, networks, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_DYING", 0.1)
    held = lock.take(tmp_path, "--out")
    outcome = run_here(extract_teacher.main, flags_for(faces, networks["quick"], tmp_path))
    os.close(held)
    assert outcome.code == 2 and "in use by a live run" in outcome.last_line
    assert "another --out" in outcome.last_line


@pytest.mark.full
@pytest.mark.serial
def test_two_processes_write_the_bytes_of_one(faces, networks, tmp_path):
    extracted(flags_for(faces, networks["quick"], tmp_path / "one"))
    flags = flags_for(faces, networks["quick"], tmp_path / "two", "--nproc", 2)
    with start([SCRIPT, *flags]) as running:
        outcome = running.finish()
    assert outcome.code == 0, outcome.text
    assert "20 embeddings of 6 numbers and maps of 49" in outcome.last_line
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_the_demo_lends_its_faces_and_asks_for_a_teacher(faces, networks, tmp_path, monkeypatch):
    monkeypatch.setattr(extract_teacher, "PROJECT_ROOT", str(tmp_path))
    monkeypatch.setattr(demo, "build", lambda root: faces)
    outcome = run_here(extract_teacher.main, ["--demo"])
    assert outcome.code == 2 and "--weights is missing" in outcome.last_line
    extracted(["--demo", "--weights", networks["quick"], "--arch", "torchscript", "--workers", 0])
    assert len(np.load(tmp_path / "demo" / "teacher_extracted" / FILES[0])) == 20
