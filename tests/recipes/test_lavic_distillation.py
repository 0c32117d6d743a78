"""Stage 1 through its documented script, on a few pictures and a tiny LLaVA-NeXT."""

import json
import math
import os
import shutil
import signal
import time

import pytest

from lavic.src import knowledge_distillation
from lavic.src.vision import model
from shared import checkpoint
from shared.files import read_json_lines
from tests.harness import ROOT, losses, run_here, start, status_of, wait_for_step, wait_until
from tests.lavic_nano import NUM_VALID, build_nano, flags_of

SCRIPT = ROOT / "lavic" / "src" / "knowledge_distillation.py"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "out_distilled"


@pytest.fixture
def flags(paths, run_dir):
    return flags_of(paths, run_dir)


def train(flags):
    return run_here(knowledge_distillation.main, flags)


def rows(run_dir, split="train"):
    return [row for row in read_json_lines(run_dir / "metrics.jsonl") if row["split"] == split]


def train_losses(run_dir):
    return losses(run_dir, "train_loss")


def test_a_run_leaves_the_documented_files(flags, run_dir, tmp_path):
    outcome = train([*flags, "--validate_before_training"])
    assert outcome.code == 0, outcome.text
    adapter = run_dir / "vision_lora_adapter_best"
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert "processor_config.json" in names
    assert any(line.endswith("| Best LoRA adapter saved.") for line in outcome.text.splitlines())
    values = [row["val_loss"] for row in rows(run_dir, "val")]
    assert len(values) == 3  # before, and after each of two epochs
    for number in (1, 2):
        lines = (run_dir / f"val_metrics_epoch_{number}.txt").read_text().splitlines()
        loss, perplexity = (float(line.rpartition(" ")[2]) for line in lines)
        assert lines == [f"Val Loss: {loss}", f"Val PPL: {perplexity}"]
        assert loss == pytest.approx(values[number], rel=1e-6)  # the record keeps float32
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-12)
    assert len(list((tmp_path / "lightning_logs" / "version_0").glob("events.out.tfevents*"))) == 1
    status = status_of(run_dir)
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 10)
    result = status["result"]
    assert (result["name"], result["higher_is_better"]) == ("val_loss", False)
    assert (result["unit"], result["n"]) == ("nats a token", NUM_VALID)
    assert result["before"] == pytest.approx(values[0], rel=1e-6)
    assert result["after"] == pytest.approx(min(values[1:]), rel=1e-6)
    assert status["outputs"] == [str(adapter)] and status["best"]["val_loss"] == min(values[1:])
    first = rows(run_dir)[0]
    assert {"train_loss", "lr", "grad_norm", "skipped", "samples_per_s"} <= set(first)


def test_the_language_model_is_not_touched_and_the_loss_falls(flags, run_dir, paths):
    assert train([*flags, "--num_epochs", 6, "--lr", 5e-3]).code == 0
    found = list(train_losses(run_dir).values())
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    state = checkpoint.load(run_dir / "last.pt")
    assert set(state["parts"]) == {"adapter", "optimizer", "amp", "samples", "tally", "best"}
    names = state["parts"]["adapter"]
    assert names and all("vision_tower" in n or "multi_modal_projector" in n for n in names)
    size = sum(tensor.numel() for tensor in names.values())
    assert (run_dir / "last.pt").stat().st_size < 3 * 4 * size + 200_000  # adapter and two moments


def test_a_training_without_a_lower_val_loss_ends_after_its_patience(flags, run_dir):
    outcome = train([*flags, "--num_epochs", 9, "--patience", 2, "--lr", 3.0])
    assert outcome.code == 0, outcome.text
    validated = [row["val_loss"] for row in rows(run_dir, "val")]
    best = validated.index(min(validated)) + 1
    assert len(validated) == best + 2 < 9, validated
    assert "nothing better for 2 epoch(s)" in outcome.text
    assert status_of(run_dir)["state"] == "done"


def test_accumulated_batches_and_two_processes_are_one_large_batch(flags, tmp_path):
    """4 samples a step: at once, two by two, one by one, and on two processes; dropout off.

    The sixth step has one sample: of two processes one has nothing to do.
    """
    shared = [*flags, "--lora_dropout", 0, "--num_epochs", 1, "--max_samples", 21]
    sides = {
        "at once": ["--batch_size", 4],
        "two by two": ["--batch_size", 2, "--grad_accum", 2],
        "one by one": ["--batch_size", 1, "--grad_accum", 4],
        "prompts as a whole": ["--batch_size", 4, "--no-reuse-prompt"],
        "no activations kept": ["--batch_size", 4, "--gradient_checkpointing", "on"],
    }
    for name, extra in sides.items():
        outcome = train([*shared, *extra, "--output_dir", tmp_path / name])
        assert outcome.code == 0, outcome.text
    with start([SCRIPT, *shared, "--batch_size", 2, "--nproc", 2,
                "--output_dir", tmp_path / "two"]) as running:  # fmt: skip
        assert running.finish().code == 0, running.text
    expected = train_losses(tmp_path / "at once")
    assert len(expected) == 6
    for name in [*sides, "two"]:
        found = train_losses(tmp_path / name)
        assert found == pytest.approx(expected, rel=2e-5), name
        ours = rows(tmp_path / name, "val")[0]["val_loss"]
        assert ours == pytest.approx(rows(tmp_path / "at once", "val")[0]["val_loss"], rel=2e-5)


@pytest.mark.parametrize(("extra", "steps"), [(["--batch_size", 3], 7), (["--batch_size", 64], 1)])
def test_samples_that_make_no_whole_batch_are_trained_on(flags, run_dir, tmp_path, extra, steps):
    shared = [*flags, *extra, "--lora_dropout", 0, "--num_epochs", 1]
    assert train(shared).code == 0
    alone = train_losses(run_dir)
    assert len(alone) == steps == status_of(run_dir)["total_steps"]
    if steps == 7:  # 2 samples in the last: on two processes one each
        one = [*shared, "--batch_size", 1, "--grad_accum", 3, "--output_dir", tmp_path / "one"]
        assert train(one).code == 0
        assert train_losses(tmp_path / "one") == pytest.approx(alone, rel=2e-5)


@pytest.mark.slow
@pytest.mark.serial
def test_a_stop_in_the_validation_is_answered_at_once_and_the_epoch_is_saved(
    flags, paths, run_dir, tmp_path
):
    # it says where it is every two seconds: long enough for the fastest machine, as it is stopped
    lines = paths.val_data.read_text(encoding="utf-8") * 2000
    (tmp_path / "long.jsonl").write_text(lines, encoding="utf-8")
    options = [*flags, "--val_data", tmp_path / "long.jsonl", "--batch_size", 1, "--num_epochs", 1]
    with start([SCRIPT, *options]) as running:
        wait_until(
            lambda: "validation: batch" in str(status_of(run_dir).get("doing")),
            "the validation", 60, running,
        )  # fmt: skip
        running.signal(signal.SIGTERM)
        began = time.monotonic()
        assert running.finish().code == 143, running.text
        assert time.monotonic() - began < 10
    status = status_of(run_dir)
    assert (status["state"], status["step"]) == ("stopped", status["total_steps"])
    steps = train_losses(run_dir)
    (tmp_path / "long.jsonl").write_text(paths.val_data.read_text(encoding="utf-8"))
    resumed = train(options)
    assert resumed.code == 0 and "continuing from" in resumed.text, resumed.text
    assert train_losses(run_dir) == steps and len(rows(run_dir, "val")) == 1
    boards = run_dir.parent / "lightning_logs"  # it goes on with its own
    assert [path.name for path in boards.iterdir()] == ["version_0"]


@pytest.fixture
def broken(paths, flags, tmp_path):
    """Flags of a run whose folder has a cut picture among the 20, and lacks one of the file's."""
    folder = tmp_path / "images"
    shutil.copytree(paths.train_images, folder)
    names = [name for item in json.loads(paths.train_data.read_text()).values()
             for name in item["image_descriptions_llava_cleaned"]]  # fmt: skip
    (folder / names[3]).write_bytes((folder / names[3]).read_bytes()[:150])
    (folder / names[5]).unlink()
    return [*flags, "--train_images_dir", folder], names


def test_fault_27_a_cut_picture_is_left_out_named_once_and_counted(broken, run_dir):
    flags, names = broken
    outcome = train(flags)
    assert outcome.code == 0, outcome.text
    named = [line for line in outcome.text.splitlines() if "left out: " in line]
    assert len(named) == 1 and names[3] in named[0]
    assert f"1 more have no picture in {flags[-1]} ({names[5]})" in outcome.text
    assert rows(run_dir)[-1]["skipped"] == 1 and "| 1 left out" in outcome.text


def test_fault_29_no_usable_picture_is_refused_before_the_model_is_loaded(
    flags, paths, tmp_path, monkeypatch
):
    monkeypatch.setattr(model, "load_base", lambda *_: pytest.fail("it was loaded"))
    folder = tmp_path / "images"
    folder.mkdir()
    for path in paths.train_images.iterdir():
        (folder / path.name).write_bytes(b"<html>")
    outcome = train([*flags, "--train_images_dir", folder])
    assert outcome.code == 2
    assert "none of the 20 training samples has a usable picture" in outcome.last_line


def test_more_than_half_left_out_ends_the_run_with_what_to_do(flags, paths, run_dir, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(paths.train_images, folder)
    for path in sorted(folder.iterdir())[:300]:
        path.write_bytes(b"")
    found = train([*flags, "--max_samples", "all", "--train_images_dir", folder, "--num_epochs", 1])
    assert found.code == 2
    assert "samples could not be used" in found.last_line and "crawl_images.py" in found.last_line


def test_a_new_run_of_a_finished_one_takes_the_next_version(flags, run_dir):
    for _ in range(2):
        assert train([*flags, "--num_epochs", 1]).code == 0
    boards = sorted(path.name for path in run_dir.parent.glob("lightning_logs/*"))
    assert boards == ["version_0", "version_1"]
    assert (run_dir.parent / "out_distilled.1" / "vision_lora_adapter_best").is_dir()
    shutil.rmtree(run_dir.parent / "lightning_logs")  # as the document allows
    assert train([*flags, "--num_epochs", 1]).code == 0


def test_other_samples_than_before_are_not_continued_on(flags, run_dir, paths, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(paths.train_images, folder)
    options = [*flags, "--train_images_dir", folder]
    with start([SCRIPT, *options, "--num_epochs", 200]) as running:
        wait_for_step(run_dir, 2, running, key="train_loss")
        running.signal(signal.SIGTERM)
        assert running.finish().code == 143
    names = json.loads(paths.train_data.read_text())
    first = next(iter(names))
    os.unlink(folder / f"{first}_0.jpg")  # noqa: PTH108
    outcome = train([*options, "--num_epochs", 200])
    assert outcome.code == 2 and "samples does not fit" in outcome.last_line
    assert "--resume never" in outcome.last_line


def test_half_precision_is_the_same_within_its_own_bound(flags, tmp_path):
    """bfloat16 keeps 8 bits: the losses of the first steps agree to a few thousandths."""
    for name, extra in {"float32": [], "bfloat16": ["--dtype", "bfloat16"]}.items():
        more = ["--lora_dropout", 0, "--num_epochs", 1, "--output_dir", tmp_path / name]
        outcome = train([*flags, *extra, *more])
        assert outcome.code == 0, outcome.text
    whole, half = train_losses(tmp_path / "float32"), train_losses(tmp_path / "bfloat16")
    assert half != whole and half == pytest.approx(whole, rel=2e-2)
