"""Stage 2 of lavic through prompt_tuning.py, on a nano model and a few conversations."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lavic.src import prompt_tuning
from lavic.src.recommend import evaluation
from shared.files import read_json_lines
from tests.harness import ROOT, losses, run_here, start, status_of
from tests.lavic_talks import nano

SCRIPT = ROOT / "lavic" / "src" / "prompt_tuning.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Vectors of all pictures, computed by the first test that needs them."""
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture
def flags(tmp_path, cache):
    return nano().flags(tmp_path / "out", cache)


def rows(run_dir: Path, split: str) -> list[dict[str, float]]:
    return [r for r in read_json_lines(run_dir / "metrics.jsonl") if r["split"] == split]


def train_losses(run_dir: Path) -> dict[int, float]:
    return losses(run_dir, "train_loss")


def adapter_of(run_dir: Path):
    return load_file(run_dir / "trained_lora_adapter" / "adapter_model.safetensors")


def test_a_run_leaves_the_documented_files_and_says_what_it_reached(flags, tmp_path):
    outcome = run_here(prompt_tuning.main, [*flags, "--candidate_type", "candidates_gpt_large"])
    run_dir = tmp_path / "out"
    assert outcome.code == 0, outcome.text
    names = {path.name for path in (run_dir / "trained_lora_adapter").iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json",
        "recommender.json", "vision_lora_adapter",
    } <= names  # fmt: skip
    status = status_of(run_dir)
    assert status["state"] == "done" and status["total_steps"] == len(train_losses(run_dir))
    assert status["result"]["name"] == "Recall@1"
    assert status["result"]["before"] is not None
    assert {"unit", "n", "chance", "majority"} <= status["result"].keys()
    assert 0 < status["result"]["chance"] < 0.5
    first, *_ = read_json_lines(nano().talks("test"))
    answers = list(read_json_lines(run_dir / "test_results_candidates_gpt_large.jsonl"))
    assert len(answers) == 7
    assert {"recommended_gpt_large", "response_gpt_large", *first} == set(answers[0])
    assert answers[0]["context"] == first["context"]
    text = (run_dir / "results_summary.csv").read_text()
    (row,) = csv.DictReader(text.splitlines())
    assert row["candidate_type"] == "candidates_gpt_large" and row["num_epochs"] == "3"
    assert float(row["recall@1"]) == status["result"]["after"]
    assert float(row["recall@1"]) <= float(row["recall_ceiling@1"]) <= 1
    assert row["without_picture"] == "2" and "2 of 24 candidates" in outcome.text
    assert outcome.text.count("Recall@1") == 2  # before and after


def test_the_validation_loss_is_a_number_and_falls(flags, tmp_path):
    assert run_here(prompt_tuning.main, [*flags, "--num_epochs", 6]).code == 0
    losses = [row["val_loss"] for row in rows(tmp_path / "out", "val")]
    assert len(losses) == 6 and min(losses[1:]) < losses[0] - 0.2


def test_the_adapter_kept_is_that_of_the_lowest_validation_loss(flags, tmp_path, monkeypatch):
    """Validation losses are set by hand: the second epoch's is the lowest."""

    def run(name: str, *losses: float):
        found = iter(losses)
        monkeypatch.setattr(
            "lavic.src.recommend.evaluation.validation_loss", lambda *_: next(found)
        )
        options = [*flags, "--num_epochs", len(losses), "--finetune_output_dir", tmp_path / name]
        outcome = run_here(prompt_tuning.main, [*options, "--no-evaluate-before"])
        assert outcome.code == 0, outcome.text
        answers = list(read_json_lines(tmp_path / name / "test_results_candidates_st.jsonl"))
        return outcome.text, adapter_of(tmp_path / name), answers

    text, kept, answers = run("three", 2.0, 1.0, float("nan"))
    _, second, answers_of_two = run("two", 2.0, 1.0)
    assert "after epoch 2: Recall@1" in text
    assert all((kept[name] == second[name]).all() for name in kept)
    assert answers == answers_of_two  # it is that one which is tested


def test_accumulation_takes_the_steps_of_whole_batches(flags, tmp_path):
    for size, times in ((4, 1), (2, 2)):
        extra = ["--batch_size", size, "--grad-accum", times, "--num_epochs", 1, "--lr", 1e-12]
        options = [*flags, *extra, "--no-evaluate-before", "--finetune_output_dir"]
        assert run_here(prompt_tuning.main, [*options, tmp_path / f"{size}x{times}"]).code == 0
    whole, parts = (train_losses(tmp_path / name) for name in ("4x1", "2x2"))
    assert whole.keys() == parts.keys() and len(whole) > 2
    # the adapter still is without effect: so dropout is too, and the losses are exact
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.serial
def test_two_processes_take_the_same_conversations_and_answer_all_of_them(flags, tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    shared = [*flags, "--num_epochs", 1, "--lr", 1e-12, "--finetune_output_dir"]
    assert run_here(prompt_tuning.main, [*shared, one, "--batch_size", 4]).code == 0
    with start([SCRIPT, *shared, two, "--batch_size", 2, "--nproc", 2]) as running:
        assert running.finish().code == 0, running.text
    # the adapter still is without effect: so dropout is too, and the losses are exact
    assert train_losses(two) == pytest.approx(train_losses(one), rel=1e-5)
    assert rows(two, "val")[0]["val_loss"] == pytest.approx(
        rows(one, "val")[0]["val_loss"], rel=1e-6
    )
    answers = [list(read_json_lines(d / "test_results_candidates_st.jsonl")) for d in (one, two)]
    assert answers[0] == answers[1] and len(answers[0]) == 7


def test_a_tuning_that_stalls_ends_and_tests_its_best_epoch(flags, tmp_path):
    stalling = ["--num_epochs", 9, "--patience", 1, "--lr", 1.0, "--no-evaluate-before"]
    outcome = run_here(prompt_tuning.main, [*flags, *stalling])
    assert outcome.code == 0, outcome.text
    validated = [row["val_loss"] for row in rows(tmp_path / "out", "val")]
    best = validated.index(min(validated)) + 1
    assert len(validated) == best + 1 < 9, validated
    assert f"after epoch {best}: Recall@1" in outcome.text


def test_a_stop_in_the_test_at_the_end_keeps_the_training(flags, tmp_path, monkeypatch):
    options = [*flags, "--no-evaluate-before"]
    say = evaluation._say

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return say(*args)

    monkeypatch.setattr(evaluation, "_say", signalled)
    assert run_here(prompt_tuning.main, options).code == 143
    assert status_of(tmp_path / "out")["state"] == "stopped"
    steps = train_losses(tmp_path / "out")
    monkeypatch.undo()
    resumed = run_here(prompt_tuning.main, options)
    assert resumed.code == 0 and "continuing from" in resumed.text
    assert train_losses(tmp_path / "out") == steps
    assert status_of(tmp_path / "out")["result"]["after"] is not None


def test_a_stop_in_a_validation_or_a_test_is_answered_before_the_next_batch(
    flags, tmp_path, monkeypatch
):
    """The signal comes while the second batch is worked on, of the first test or a validation."""
    for name, what in (("test", "_say"), ("validation", "label_tokens")):
        calls = []
        original = getattr(evaluation, what)

        def signalled(*args, calls=calls, original=original):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        monkeypatch.setattr(evaluation, what, signalled)
        out, quick = tmp_path / name, ["--eval_batch_size", 1, "--num_epochs", 1]
        options = [*flags, *quick, "--finetune_output_dir", out]
        assert run_here(prompt_tuning.main, options).code == 143
        assert len(calls) == 2
        status = status_of(out)
        assert status["state"] == "stopped" and (out / "last.pt").is_file()
        assert status["step"] == (0 if name == "test" else status["total_steps"])
        monkeypatch.undo()
        assert run_here(prompt_tuning.main, options).code == 0
        assert status_of(out)["state"] == "done"


def test_the_summary_keeps_the_lines_of_earlier_runs(flags, tmp_path):
    quick = [*flags, "--num_epochs", 1, "--no-evaluate-before"]
    assert run_here(prompt_tuning.main, quick).code == 0
    assert run_here(prompt_tuning.main, [*quick, "--lr", 0.001]).code == 0
    text = (tmp_path / "out" / "results_summary.csv").read_text()
    assert [row["lr"] for row in csv.DictReader(text.splitlines())] == ["0.01", "0.001"]
    assert (tmp_path / "out.1" / "trained_lora_adapter").is_dir()


def test_a_limit_takes_so_many_conversations(flags, tmp_path):
    few = [*flags, "--max_samples", 5, "--num_epochs", 1, "--no-evaluate-before"]
    assert run_here(prompt_tuning.main, few).code == 0
    answers = tmp_path / "out" / "test_results_candidates_st.jsonl"
    assert len(list(read_json_lines(answers))) == 5


def broken(tmp_path: Path, name: str, content: str) -> Path:
    """The nano's data with one file replaced."""
    import shutil

    root = tmp_path / "data"
    shutil.copytree(nano().root / "data", root)
    (root / name).write_text(content)
    return root


def test_a_bad_line_of_the_conversations_is_named_before_the_model_is_loaded(
    flags, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "lavic.src.recommend.model.load_base", lambda *_: pytest.fail("the model was loaded")
    )
    root = broken(tmp_path, "all_beauty/valid.jsonl", '{"context": "a"}\n')
    outcome = run_here(prompt_tuning.main, [*flags, "--data-root", root])
    assert outcome.code == 2 and "valid.jsonl line 1: no list of ids" in outcome.last_line
