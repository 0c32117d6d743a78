"""Stage 2 of lavic through prompt_tuning.py, on a nano model and a few conversations."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lavic.src import prompt_tuning
from lavic.src.recommend import evaluation
from shared.files import read_json_lines
from tests.harness import losses, run_here, status_of
from tests.lavic_nano import in_two_processes
from tests.lavic_talks import nano


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Vectors of all pictures, computed by the first test that needs them."""
    return tmp_path_factory.mktemp("vectors")


@pytest.fixture
def flags(tmp_path, cache):
    return nano().flags(tmp_path / "out", cache)


def validated(run_dir: Path) -> list[float]:
    rows = read_json_lines(run_dir / "metrics.jsonl")
    return [row["val_loss"] for row in rows if row["split"] == "val"]


def train_losses(run_dir: Path) -> dict[int, float]:
    return losses(run_dir, "train_loss")


def answers_of(run_dir: Path, kind: str = "st") -> list[dict[str, object]]:
    return list(read_json_lines(run_dir / f"test_results_candidates_{kind}.jsonl"))


def test_a_run_learns_leaves_the_documented_files_and_says_what_it_reached(flags, tmp_path):
    words = [*flags, "--candidate_type", "candidates_gpt_large", "--num_epochs", 6]
    outcome, run_dir = run_here(prompt_tuning.main, words), tmp_path / "out"
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
    answers = answers_of(run_dir, "gpt_large")
    assert len(answers) == 7
    assert {"recommended_gpt_large", "response_gpt_large", *first} == set(answers[0])
    assert answers[0]["context"] == first["context"]
    text = (run_dir / "results_summary.csv").read_text()
    documented = "model_dir,candidate_type,lr,weight_decay,num_epochs,recall@1,validity@1"
    assert text.startswith(documented + ",output_file,")
    (row,) = csv.DictReader(text.splitlines())
    assert row["candidate_type"] == "candidates_gpt_large" and row["num_epochs"] == "6"
    assert float(row["recall@1"]) == status["result"]["after"]
    assert float(row["recall@1"]) <= float(row["recall_ceiling@1"]) <= 1
    assert row["without_picture"] == "2" and "2 of 24 candidates" in outcome.text
    assert outcome.text.count("Recall@1") == 2  # before and after
    found = validated(run_dir)
    assert len(found) == 6 and min(found[1:]) < found[0] - 0.2


def test_the_adapter_kept_and_tested_is_that_of_the_lowest_validation_loss(
    flags, tmp_path, monkeypatch
):
    """Validation losses are set by hand: the second epoch's is the lowest."""
    found = {}
    for name, values in (("three", [2.0, 1.0, float("nan")]), ("two", [2.0, 1.0])):
        left = iter(values)
        monkeypatch.setattr(evaluation, "validation_loss", lambda *_, left=left: next(left))
        out = tmp_path / name
        options = [*flags, "--num_epochs", len(values), "--finetune_output_dir", out]
        outcome = run_here(prompt_tuning.main, [*options, "--no-evaluate-before"])
        assert outcome.code == 0, outcome.text
        assert "after epoch 2: Recall@1" in outcome.text
        adapter = load_file(out / "trained_lora_adapter" / "adapter_model.safetensors")
        found[name] = (adapter, answers_of(out))
    (kept, answers), (second, answers_of_two) = found["three"], found["two"]
    assert all((kept[name] == second[name]).all() for name in kept)
    assert answers == answers_of_two


def test_accumulated_batches_and_two_processes_are_one_large_batch(flags, tmp_path):
    """4 requests a step: at once, in parts without activations kept, on two processes."""
    shared = [*flags, "--num_epochs", 1, "--lora_dropout", 0, "--lr", 1e-3, "--no-evaluate-before"]
    sides = {
        "whole": ["--batch_size", 4],
        "parts": ["--batch_size", 2, "--grad-accum", 2, "--gradient_checkpointing", "on"],
        "two": ["--batch_size", 2],
    }
    for name, extra in sides.items():
        words = [*shared, *extra, "--finetune_output_dir", tmp_path / name]
        if name == "two":
            assert in_two_processes(prompt_tuning.main, words) == [0, 0]
        else:
            assert run_here(prompt_tuning.main, words).code == 0
    whole = train_losses(tmp_path / "whole")
    assert len(whole) > 2 and len(answers_of(tmp_path / "whole")) == 7
    for name in ("parts", "two"):
        assert train_losses(tmp_path / name) == pytest.approx(whole, rel=2e-5)
        assert validated(tmp_path / name) == pytest.approx(validated(tmp_path / "whole"), rel=2e-5)
        assert answers_of(tmp_path / name) == answers_of(tmp_path / "whole")


def test_a_tuning_that_stalls_ends_and_tests_its_best_epoch(flags, tmp_path):
    stalling = ["--num_epochs", 9, "--patience", 1, "--lr", 1.0, "--no-evaluate-before"]
    outcome = run_here(prompt_tuning.main, [*flags, *stalling])
    assert outcome.code == 0, outcome.text
    found = validated(tmp_path / "out")
    best = found.index(min(found)) + 1
    assert len(found) == best + 1 < 9, found
    assert f"after epoch {best}: Recall@1" in outcome.text


@pytest.mark.parametrize(
    ("where", "call", "extra"),
    [
        ("_say", 2, ["--evaluate-before"]),
        ("label_tokens", 2, []),
        ("_say", 1, []),
    ],
    ids=["first test", "validation", "last test"],
)
def test_a_stop_in_a_validation_or_a_test_is_answered_before_the_next_batch(
    flags, tmp_path, monkeypatch, where, call, extra
):
    """The signal comes while that batch is worked on; what was trained is not trained again."""
    calls, original = [], getattr(evaluation, where)

    def signalled(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    quick = ["--eval_batch_size", 1, "--num_epochs", 1, "--max_samples", 4]
    options = [*flags, *quick, *(extra or ["--no-evaluate-before"])]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, where, signalled)
        assert run_here(prompt_tuning.main, options).code == 143
    assert len(calls) == call
    status = status_of(tmp_path / "out")
    assert status["state"] == "stopped" and (tmp_path / "out" / "last.pt").is_file()
    assert status["step"] == (0 if extra else status["total_steps"])
    steps = train_losses(tmp_path / "out")
    resumed = run_here(prompt_tuning.main, options)
    assert resumed.code == 0 and "continuing from" in resumed.text
    assert not steps or train_losses(tmp_path / "out") == steps
    assert status_of(tmp_path / "out")["result"]["after"] is not None


def test_the_summary_keeps_the_lines_of_earlier_runs_which_move_aside(flags, tmp_path):
    quick = [*flags, "--num_epochs", 1, "--no-evaluate-before", "--max_samples", 5]
    assert run_here(prompt_tuning.main, quick).code == 0
    assert run_here(prompt_tuning.main, [*quick, "--lr", 0.001]).code == 0
    text = (tmp_path / "out" / "results_summary.csv").read_text()
    assert [row["lr"] for row in csv.DictReader(text.splitlines())] == ["0.01", "0.001"]
    assert (tmp_path / "out.1" / "trained_lora_adapter").is_dir()
    assert len(answers_of(tmp_path / "out")) == 5


def test_a_bad_line_of_the_conversations_is_named_before_the_model_is_loaded(
    flags, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "lavic.src.recommend.model.load_base", lambda *_: pytest.fail("the model was loaded")
    )
    root = shutil.copytree(nano().root / "data", tmp_path / "data")
    (root / "all_beauty" / "valid.jsonl").write_text('{"context": "a"}\n')
    outcome = run_here(prompt_tuning.main, [*flags, "--data-root", root])
    assert outcome.code == 2 and "valid.jsonl line 1: no list of ids" in outcome.last_line
