"""Stage 1 through its documented script, on a few pictures and a tiny LLaVA-NeXT.

What it shares with the other trainings, as ends and resumes: tests/faults/test_faults_recipes.py.
"""

import json
import math
import os
import shutil
import signal

import pytest

from lavic.src import knowledge_distillation
from lavic.src.vision import model, training
from shared import checkpoint
from shared.files import read_json_lines
from tests.harness import losses, run_here, status_of
from tests.lavic_nano import NUM_VALID, build_nano, flags_of, in_two_processes


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "out_distilled"


@pytest.fixture
def flags(paths, run_dir):
    return flags_of(paths, run_dir)


@pytest.fixture
def few(flags):
    """Flags of a run of two steps."""
    return [*flags, "--max_samples", 8, "--num_epochs", 1]


def train(flags):
    return run_here(knowledge_distillation.main, flags)


def rows(run_dir, split="train"):
    return [row for row in read_json_lines(run_dir / "metrics.jsonl") if row["split"] == split]


def train_losses(run_dir):
    return losses(run_dir, "train_loss")


def test_fault_34_a_run_on_any_path_learns_and_leaves_the_documented_files(paths, tmp_path):
    run_dir = tmp_path / "数据 集" / "$(touch X)'\"" / "-out"
    flags = [*flags_of(paths, run_dir), "--num_epochs", 5, "--lr", 5e-3]
    outcome = train([*flags, "--validate_before_training"])
    assert outcome.code == 0, outcome.text
    adapter = run_dir / "vision_lora_adapter_best"
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert "processor_config.json" in names
    assert any(line.endswith("| Best LoRA adapter saved.") for line in outcome.text.splitlines())
    values = [row["val_loss"] for row in rows(run_dir, "val")]
    assert len(values) == 6  # before, and after each epoch
    for number in range(1, 6):
        lines = (run_dir / f"val_metrics_epoch_{number}.txt").read_text().splitlines()
        loss, perplexity = (float(line.rpartition(" ")[2]) for line in lines)
        assert lines == [f"Val Loss: {loss}", f"Val PPL: {perplexity}"]
        assert loss == pytest.approx(values[number], rel=1e-6)  # the record keeps float32
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-12)
    boards = run_dir.parent / "lightning_logs" / "version_0"
    assert len(list(boards.glob("events.out.tfevents*"))) == 1
    status = status_of(run_dir)
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 25)
    assert status["result"] == {
        "name": "val_loss", "higher_is_better": False, "unit": "nats a token", "n": NUM_VALID,
        "before": pytest.approx(values[0], rel=1e-6),
        "after": pytest.approx(min(values[1:]), rel=1e-6),
    }  # fmt: skip
    assert status["outputs"] == [str(adapter)] and status["best"]["val_loss"] == min(values[1:])
    assert {"train_loss", "lr", "grad_norm", "skipped", "samples_per_s"} <= set(rows(run_dir)[0])
    found = list(train_losses(run_dir).values())
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    state = checkpoint.load(run_dir / "last.pt")
    assert set(state["parts"]) == {"adapter", "optimizer", "amp", "samples", "tally", "best"}
    names = state["parts"]["adapter"]
    assert names and all("vision_tower" in n or "multi_modal_projector" in n for n in names)
    size = sum(tensor.numel() for tensor in names.values())
    assert (run_dir / "last.pt").stat().st_size < 3 * 4 * size + 200_000  # adapter and two moments
    assert not list(tmp_path.rglob("X"))


def test_a_training_without_a_lower_val_loss_ends_after_its_patience(few, run_dir):
    outcome = train([*few, "--num_epochs", 9, "--patience", 2, "--lr", 3.0])
    assert outcome.code == 0, outcome.text
    validated = [row["val_loss"] for row in rows(run_dir, "val")]
    best = validated.index(min(validated)) + 1
    assert len(validated) == best + 2 < 9, validated
    assert "nothing better for 2 epoch(s)" in outcome.text
    assert status_of(run_dir)["state"] == "done"


def test_accumulated_batches_and_two_processes_are_one_large_batch(flags, tmp_path):
    """4 samples a step: at once, in parts, on two processes, and without each shortcut.

    The sixth step has one sample: of two processes one has nothing to do. Dropout is off.
    """
    shared = [*flags, "--lora_dropout", 0, "--num_epochs", 1, "--max_samples", 21]
    sides = {
        "at once": ["--batch_size", 4],
        "two by two": ["--batch_size", 2, "--grad_accum", 2],
        "one by one": ["--batch_size", 1, "--grad_accum", 4],
        "no shortcut": ["--no-reuse-prompt", "--gradient_checkpointing", "on"],
        "bfloat16": ["--dtype", "bfloat16"],
    }
    for name, extra in sides.items():
        outcome = train([*shared, *extra, "--output_dir", tmp_path / name])
        assert outcome.code == 0, outcome.text
    two = [*shared, "--batch_size", 2, "--output_dir", tmp_path / "two"]
    assert in_two_processes(knowledge_distillation.main, two) == [0, 0]
    expected = train_losses(tmp_path / "at once")
    validated = rows(tmp_path / "at once", "val")[0]["val_loss"]
    assert len(expected) == 6
    for name in [*sides, "two"]:
        close = 2e-2 if name == "bfloat16" else 2e-5  # it keeps 8 bits
        found = train_losses(tmp_path / name)
        assert found == pytest.approx(expected, rel=close), name
        assert rows(tmp_path / name, "val")[0]["val_loss"] == pytest.approx(validated, rel=close)
    assert train_losses(tmp_path / "bfloat16") != expected


@pytest.fixture
def stopped(few, run_dir, monkeypatch):
    """The flags of a run to which SIGTERM came in its validation."""
    validate = training.mean_nll

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "mean_nll", signalled)
        outcome = train(few)
    assert outcome.code == 143, outcome.text
    status = status_of(run_dir)
    assert (status["state"], status["step"]) == ("stopped", status["total_steps"])
    assert rows(run_dir, "val") == []
    return few


def test_after_a_stop_in_the_validation_the_epoch_is_not_trained_again(stopped, run_dir):
    steps = train_losses(run_dir)
    resumed = train(stopped)
    assert resumed.code == 0 and "continuing from" in resumed.text, resumed.text
    assert train_losses(run_dir) == steps and len(rows(run_dir, "val")) == 1
    boards = run_dir.parent / "lightning_logs"  # it goes on with its own
    assert [path.name for path in boards.iterdir()] == ["version_0"]


@pytest.fixture
def images(paths, tmp_path):
    """A folder with the training's pictures, and their names in the file's order."""
    folder = shutil.copytree(paths.train_images, tmp_path / "images")
    items = json.loads(paths.train_data.read_text()).values()
    return folder, [name for item in items for name in item["image_descriptions_llava_cleaned"]]


def test_other_samples_than_before_are_not_continued_on(stopped, images):
    folder, names = images
    (folder / names[0]).unlink()
    outcome = train([*stopped, "--train_images_dir", folder])
    assert outcome.code == 2 and "samples does not fit" in outcome.last_line
    assert "--resume never" in outcome.last_line


def test_fault_27_a_cut_picture_is_left_out_named_once_and_counted(few, run_dir, images):
    folder, names = images
    (folder / names[3]).write_bytes((folder / names[3]).read_bytes()[:150])
    (folder / names[5]).unlink()
    outcome = train([*few, "--num_epochs", 2, "--train_images_dir", folder])
    assert outcome.code == 0, outcome.text
    named = [line for line in outcome.text.splitlines() if "left out: " in line]
    assert len(named) == 1 and names[3] in named[0]
    assert f"1 more have no picture in {folder} ({names[5]})" in outcome.text
    assert rows(run_dir)[-1]["skipped"] == 1 and "| 1 left out" in outcome.text


def test_fault_29_no_usable_picture_is_refused_before_the_model_is_loaded(few, images, monkeypatch):
    monkeypatch.setattr(model, "load_base", lambda *_: pytest.fail("it was loaded"))
    folder, names = images
    for name in names:
        (folder / name).write_bytes(b"<html>")
    outcome = train([*few, "--train_images_dir", folder])
    assert outcome.code == 2
    assert "none of the 8 training samples has a usable picture" in outcome.last_line


def test_more_than_half_left_out_ends_the_run_with_what_to_do(few, images):
    folder, names = images
    for name in names[1:6]:
        (folder / name).write_bytes(b"")
    found = train([*few, "--train_images_dir", folder])
    assert found.code == 2
    assert "5 of the epoch's 8 samples could not be used" in found.last_line
    assert "crawl_images.py" in found.last_line


def test_a_new_run_of_a_finished_one_takes_the_next_version(few, run_dir):
    for _ in range(2):
        assert train(few).code == 0
    boards = run_dir.parent / "lightning_logs"
    assert sorted(path.name for path in boards.iterdir()) == ["version_0", "version_1"]
    assert (run_dir.parent / "out_distilled.1" / "vision_lora_adapter_best").is_dir()
    shutil.rmtree(boards)  # as the document allows
    assert train(few).code == 0
