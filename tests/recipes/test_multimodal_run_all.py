"""run_all: the stages in order, each once; what cannot be had is named and stops nothing else."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from multimodal import run_all
from tests import multimodal_data
from tests.harness import ROOT, wait_until

SCRIPT = ROOT / "multimodal" / "run_all.sh"


@pytest.fixture(autouse=True)
def _python(monkeypatch):
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def markers(output):
    folder = output.with_name("outputs_stages")
    return {path.stem for path in folder.glob("*.json")} if folder.is_dir() else set()


def chain(output):
    """run_all.sh on a few pictures, few steps of training; its exit code and all it said."""
    data = output.with_name("data")
    data.mkdir(exist_ok=True)
    if not (data / "coco").exists():
        (data / "coco").symlink_to(multimodal_data.made().coco)
    command = [
        SCRIPT, "--skip-download", "--data-root", data,
        "--output-dir", output, "--model-size", "nano", "--init", "random", "--batch-size", 4,
        "--max-steps", 3, "--epochs", 3, "--workers", 0, "--clip-seconds", 1,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=output.parent
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.limit(400)
def test_the_whole_way_once_and_then_what_was_lost(tmp_path):
    output = tmp_path / "o ü $(touch X)" / "outputs"
    output.parent.mkdir()
    code, text = chain(output)
    assert code == 0, text
    names = ("preflight", "environment", "training", "evaluation", "report")
    assert set(names) <= markers(output)
    for name in names:
        assert f"stage {name}: starts" in text
    assert "Karpathy test  image to text" in text
    (report,) = (output / "reports").glob("report_*.json")
    told = json.loads(report.read_text())
    assert told["retrieval"]
    assert {"clotho", "audiocaps"} <= {row["data set"] for row in told["left_out"]}
    # what was evaluated is gone, and the report was never made: these two alone run again
    (output / "evaluation/evaluation.json").unlink()
    output.with_name("outputs_stages").joinpath("report.json").unlink()
    code, text = chain(output)
    assert code == 0, text
    assert "stage training: already done" in text
    assert "stage evaluation: runs again" in text and "stage report: starts" in text
    assert len(list((output / "reports").glob("report_*.json"))) == 1
    assert not list(output.parent.parent.rglob("X"))


def test_flags_of_the_training_go_to_it_and_wrong_ones_end_the_preflight(tmp_path, caplog):
    (tmp_path / "d").mkdir()
    flags = ["--data-root", str(tmp_path / "d"), "--output-dir", str(tmp_path / "o")]
    assert run_all.main([*flags, "--skip-download", "--modle-size", "base"]) == 2
    assert "unknown argument --modle-size; did you mean --model-size?" in caplog.text
    assert markers(tmp_path / "outputs") == set() and not (tmp_path / "o").exists()


def free_disk(monkeypatch, free):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**13, 10**13, free))


def test_a_disk_too_small_ends_the_preflight(tmp_path, monkeypatch, capsys):
    free_disk(monkeypatch, 10**9)
    flags = ["--data-root", str(tmp_path / "data"), "--output-dir", str(tmp_path / "outputs")]
    assert run_all.main([*flags, "--datasets", "coco"]) == 2
    said = capsys.readouterr().err
    assert f"GB are needed in {tmp_path / 'data'} for archives and what they hold" in said


def test_what_is_missing_ends_the_environment_stage(tmp_path, monkeypatch, capsys):
    told = tmp_path / "site/torchaudio-2.0.dist-info/METADATA"
    told.parent.mkdir(parents=True)
    told.write_text("Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.0\n")
    fake = tmp_path / "site/torchaudio/__init__.py"
    fake.parent.mkdir()
    fake.write_text("raise RuntimeError('compiled with different CUDA versions')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    output = tmp_path / "outputs"
    flags = ["--demo", "--output-dir", str(output), "--only", "environment"]
    assert run_all.main(flags) == 3
    said = capsys.readouterr().err
    assert "different CUDA versions" in said and "pip uninstall torchaudio" in said


def test_what_this_machine_cannot_fetch_is_said_at_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VOXCELEB_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "py7zr", None)
    free_disk(monkeypatch, 10**13)
    flags = ["--data-root", tmp_path / "data", "--output-dir", tmp_path / "outputs"]
    flags += ["--datasets", "clotho", "audiocaps", "voxceleb", "--only", "preflight"]
    assert run_all.main(list(map(str, flags))) == 0
    for line in ("clotho: no program for 7z", "yt-dlp and ffmpeg missing", "VOXCELEB_KEY is not"):
        assert line in caplog.text


def test_named_data_sets_that_are_not_whole_are_left_to_the_report(tmp_path, monkeypatch, capsys):
    (tmp_path / "coco").mkdir()
    monkeypatch.setattr("multimodal.download_datasets.lacking", lambda form, root: (
        "" if form.name == "coco" and root.is_dir() else "train2017 missing"
    ))  # fmt: skip
    flags = ["--data-root", str(tmp_path), "--datasets", "coco", "voxceleb", "--lr", "1e-3"]
    assert run_all.main([*flags, "--dry-run"]) == 0
    (line,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("training: ")]
    assert "--datasets coco --lr 1e-3" in line and "voxceleb" not in line


def test_a_demo_is_made_continued_and_evaluated(capsys):
    """As commands; what they do: the full tier."""
    assert run_all.main(["--demo", "--dry-run"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    words = {stage: shlex.split(line) for stage, line in lines.items()}
    assert words["download"][1:] == [str(run_all.HERE / "download_datasets.py"), "--demo"]
    assert words["training"][-3:] == ["--demo", "--resume", "auto"]
    assert words["training"][3] == str(run_all.HERE / "demo" / "data")
    assert words["evaluation"][-1] == "--demo"


@pytest.mark.full
@pytest.mark.serial
@pytest.mark.limit(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_at_three_places_and_resumed(tmp_path, number):
    """While the environment, the training and the evaluation run; the same command goes on."""
    output = tmp_path / "outputs"
    command = [SCRIPT, "--demo", "--output-dir", output, "--epochs", "6"]
    for sign in ("stage environment: starts", "stage training: starts", "stage evaluation: starts"):
        log = tmp_path / "log"
        with log.open("w") as stream:
            running = subprocess.Popen(
                list(map(str, command)), stdout=stream, stderr=stream, start_new_session=True
            )
            wait_until(lambda log=log, sign=sign: sign in log.read_text(), sign, 200)
            time.sleep(4 if "training" in sign else 0.3)
            os.kill(running.pid, number)
            running.wait(120)
        assert running.returncode not in (0, None), log.read_text()
        time.sleep(3)  # what was started dies with it
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage training: already done" in done.stdout
    newest = max((output / "reports").glob("report_*.json"))  # every start writes one
    assert json.loads(newest.read_text())["retrieval"]


@pytest.mark.full
@pytest.mark.limit(900)
def test_demo_finds_held_out_pairs_five_times_as_often_as_chance(tmp_path):
    """On the test splits, which no setting was chosen on; other seeds: multimodal_kinds.py."""
    output = tmp_path / "outputs"
    command = [str(SCRIPT), "--demo", "--output-dir", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((output / "evaluation/evaluation.json").read_text())["retrieval"]
    assert len(rows) == 8
    for row in rows:
        assert row["R@1"] >= 5 * row["chance"], row
