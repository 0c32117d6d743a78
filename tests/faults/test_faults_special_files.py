"""What is not a regular file (a pipe, a device, a socket) in place of one that is read.

A pipe without a writer is waited for without end, a link to /dev/zero is read until memory ends.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arcface.run_scripts import run_arcface
from face_distill import embed, extract_teacher, train_distill
from face_distill.demo_data import demo as face_demo
from face_distill.distill import teacher_networks
from lavic.src import knowledge_distillation, prompt_tuning
from multimodal import run_training
from multimodal.pairs.coco import Coco
from shared.files import read_json
from tests import arcface_nano, lavic_nano, multimodal_data, vase_filter_nano
from tests.face_students import write_run
from tests.faults import probe_recipe
from tests.harness import PROBE, ROOT, Outcome, run_here, start
from vasevqa.filter import classifier, clipfilter1, clipfilter2, model

FILTER = ROOT / "vasevqa" / "filter"
ARCFACE = ROOT / "arcface" / "run_scripts" / "run_arcface.py"
MONITOR = ROOT / "shared" / "tools" / "monitor.py"
REPORT = ROOT / "shared" / "tools" / "report.py"
NOT_READ = "not a regular file"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)
    os.chdir(here)


KINDS = [pipe, device, unix_socket]


@pytest.fixture(autouse=True)
def _limited_memory() -> Iterator[None]:
    """A device that is read ends in MemoryError, not with the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 8 * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def replaced(path: Path, put: Callable[[Path], None]) -> Path:
    path.unlink(missing_ok=True)
    put(path)
    return path


def run(*words: object, timeout: float = 100) -> Outcome:
    """The script `words[0]`; a file that it writes ends at a gigabyte."""
    limited = ["prlimit", f"--fsize={10**9}", sys.executable]
    with start(list(words), program=limited) as running:
        return running.finish(timeout=timeout)


# --- pictures -------------------------------------------------------------------------------------

Main = Callable[[list[str]], int]


@pytest.mark.slow
@pytest.mark.parametrize("put", KINDS)
def test_a_filter_scores_the_other_pictures(tmp_path, put):
    views = vase_filter_nano.write_views(tmp_path / "in", 2, 2)
    path = replaced(next(views.rglob("*.jpg")), put)
    outcome = run(
        FILTER / "clipfilter1.py", "--input_dir", views, "--output_dir", tmp_path / "out",
        "--model_cache_dir", vase_filter_nano.write_clip(tmp_path / "clip"), "--threshold", 0,
        "--cache_dir", tmp_path / "cache", "--workers", 0,
    )  # fmt: skip
    assert outcome.code == 0, outcome.text
    report = read_json(tmp_path / "out" / "filtering_report.json")
    name = path.relative_to(views).as_posix()
    assert report["unreadable"] == [{"filename": name, "reason": f"cannot be read: {NOT_READ}"}]
    assert len(report["results"]) == 3
    placed = tmp_path / "out" / "quarantine" / name
    assert placed.is_symlink() and placed.readlink() == path.resolve()


@pytest.mark.slow
@pytest.mark.parametrize("put", KINDS)
def test_arcface_trains_on_the_other_pictures(tmp_path, put):
    data = arcface_nano.build_inshop(tmp_path / "data")
    config = arcface_nano.write_config(tmp_path / "nano.py")
    path = replaced(sorted((data / "Img").rglob("*.jpg"))[0], put)
    outcome = run(ARCFACE, "--config", config, "--data-root", data, "--work-dir", tmp_path / "run")
    assert outcome.code == 0, outcome.text
    assert f"{path} (cannot be read: {NOT_READ})" in outcome.text


def test_lavic_counts_a_pipe_as_a_missing_picture(tmp_path):
    paths = lavic_nano.build_nano(tmp_path / "nano")
    line = json.loads(paths.val_data.read_text(encoding="utf-8").splitlines()[0])
    replaced(paths.valid_images / line["image_name"], pipe)
    flags = [*lavic_nano.flags_of(paths, tmp_path / "run"), "--dry-run"]
    outcome = run_here(knowledge_distillation.main, flags)
    assert outcome.code == 0 and "validation: 5 samples; 1 more have no picture" in outcome.text


def multimodal(root: Path) -> tuple[Main, list[object], Path]:
    data = multimodal_data.build(root / "data").data_root
    flags = ["--data-root", data, "--output-dir", root / "run", "--model-size", "nano"]
    flags += ["--batch-size", 4, "--epochs", 3, "--workers", 0, "--clip-seconds", 1]
    flags += ["--init", "random"]
    picture = Coco(data / "coco", "train").path(0)
    return run_training.main, [*flags, "--no-use-checkpoint"], picture


def quality(root: Path) -> tuple[Main, list[object], Path]:
    data = vase_filter_nano.write_quality_set(root / "data", each=40)
    flags = ["--data_dir", data, "--arch", "resnet10", "--image_size", 32, "--pretrained", "none"]
    flags += ["--batch_size", 8, "--workers", 0, "--num_epochs", 1, "--output_dir", root / "run"]
    return model.main, flags, sorted((data / "1").iterdir())[0]


@pytest.mark.slow
@pytest.mark.limit(300)
@pytest.mark.parametrize("recipe", [multimodal, quality])
def test_a_pipe_among_training_pictures_is_left_out(recipe, tmp_path):
    main, flags, picture = recipe(tmp_path)
    replaced(picture, pipe)
    outcome = run_here(main, flags)
    assert outcome.code == 0, outcome.text
    assert picture.name in outcome.text and NOT_READ in outcome.text


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tower")
    face_demo.write_tower(directory, 0)
    return directory


def faces(root: Path) -> Path:
    """Six faces of two people."""
    for number in range(6):
        path = root / f"person {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (112, 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


@pytest.mark.parametrize("put", KINDS)
def test_the_other_faces_are_embedded(tower, tmp_path, put):
    folder = faces(tmp_path / "faces")
    replaced(folder / "person 0" / "0.png", put)
    checkpoint = write_run(tmp_path / "run", tower)
    out = tmp_path / "rows.npy"
    outcome = run_here(embed.main, [folder, "--checkpoint", checkpoint, "--out", out])
    assert outcome.code == 0, outcome.text
    skipped = {"file": "person 0/0.png", "reason": f"cannot be read: {NOT_READ}"}
    assert read_json(out.with_suffix(".json"))["skipped"] == [skipped]
    assert np.load(out).shape[0] == 5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "iresnet18.pth"
    torch.save(teacher_networks.build_iresnet("iresnet18").state_dict(), path)
    return path


def extract(folder: Path, teacher: Path) -> list[object]:
    flags = ["--weights", teacher, "--data-root", folder, "--limit", 6, "--workers", 0]
    return [*flags, "--out", folder.parent / "out"]


@pytest.mark.parametrize("put", KINDS)
def test_a_face_of_the_training_data_is_refused_by_name(teacher, tmp_path, put):
    folder = faces(tmp_path / "faces")
    path = replaced(folder / "person 0" / "0.png", put)
    outcome = run_here(extract_teacher.main, extract(folder, teacher))
    assert outcome.code == 2 and f"{path} cannot be read: {NOT_READ}" in outcome.text


def test_a_png_that_ends_torchvisions_decoder_is_refused_by_name(teacher, tmp_path):
    """Zeros in bytes 200 to 249 end the process there (SIGSEGV)."""
    folder = faces(tmp_path / "faces")
    path = folder / "person 0" / "0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])
    outcome = run(ROOT / "face_distill" / "extract_teacher.py", *extract(folder, teacher))
    assert outcome.code == 2, outcome.text
    assert f"left out: {path} (key 0) (the image is corrupt" in outcome.text
    assert "1 of 6 pictures cannot be used" in outcome.text


# --- settings and files of a run ------------------------------------------------------------------

SCRIPTS: dict[str, Main] = {
    "probe": probe_recipe.main,
    "face_distill": train_distill.main,
    "lavic stage 1": knowledge_distillation.main,
    "lavic stage 2": prompt_tuning.main,
    "multimodal": run_training.main,
    "classifier": classifier.main,
    "quality network": model.main,
    "first filter": clipfilter1.main,
    "second filter": clipfilter2.main,
    "arcface": run_arcface.main,
}


@pytest.mark.parametrize("put", KINDS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_settings_are_refused_by_name(tmp_path, name, put):
    path = replaced(tmp_path / "settings.yaml", put)
    outcome = run_here(SCRIPTS[name], ["--config", path])
    assert outcome.code == 2, outcome.text
    assert f"--config {path}" in outcome.last_line and "\n" not in outcome.last_line


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    outcome = run_here(probe_recipe.main, ["--run-dir", run_dir])
    assert outcome.code == 0, outcome.text
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("put", KINDS)
def test_monitor_calls_the_status_unreadable(run_dir, put):
    replaced(run_dir / "status.json", put)
    outcome = run(MONITOR, run_dir, timeout=30)
    assert outcome.code == 1 and "status.json is missing or not readable" in outcome.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_monitor_shows_the_rest_of_the_run(run_dir, name):
    replaced(run_dir / name, pipe)
    outcome = run(MONITOR, run_dir, "--json", timeout=30)
    assert outcome.code == 0 and json.loads(outcome.text)["state"] == "done"


def test_monitor_shows_a_run_whose_log_is_a_pipe(run_dir):
    status = read_json(run_dir / "status.json")
    replaced(run_dir / "train.log", pipe)
    (run_dir / "status.json").write_text(json.dumps(status | {"log": str(run_dir / "train.log")}))
    outcome = run(MONITOR, run_dir, "--json", timeout=30)
    assert outcome.code == 0 and json.loads(outcome.text)["state"] == "done"


@pytest.mark.parametrize("put", KINDS)
@pytest.mark.parametrize("name", ["status.json", "config.json", "metrics.jsonl"])
def test_report_names_what_it_could_not_read(run_dir, name, put):
    replaced(run_dir / name, put)
    outcome = run(REPORT, run_dir, timeout=60)
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert outcome.code == 0, outcome.text
    assert f"{name} cannot be read" in page and NOT_READ in page


@pytest.mark.parametrize("name", ["status.json", "config.json", "last.pt"])
def test_the_same_command_starts_beside_what_is_no_file(run_dir, name):
    replaced(run_dir / name, pipe)
    outcome = run(PROBE, "--run-dir", run_dir)
    assert outcome.code == 0, outcome.text


def test_a_checkpoint_that_was_named_is_refused(run_dir):
    path = replaced(run_dir / "last.pt", pipe)
    outcome = run_here(probe_recipe.main, ["--run-dir", run_dir, "--resume", path])
    assert outcome.code == 2 and str(path) in outcome.last_line
