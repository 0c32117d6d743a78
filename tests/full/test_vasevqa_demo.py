"""The demo of vasevqa as typed, and its model half on vases of another seed."""

from __future__ import annotations

import re
import sys

import pytest

from shared.files import read_json
from tests.harness import ROOT, run_here, start, status_of
from tests.vasevqa_nano import Nano, logged
from vasevqa.demo_data import demo
from vasevqa.model import evaluate

pytestmark = [pytest.mark.full, pytest.mark.limit(1200)]
RECIPE = ROOT / "vasevqa"


def test_the_whole_demo_learns_at_every_stage():
    with start(["--demo"], program=[RECIPE / "run_all.sh"], PYTHON=sys.executable) as running:
        outcome = running.finish(timeout=1100)
        assert running.leaves_nothing()
    assert outcome.code == 0, outcome.text[-4000:]
    runs = RECIPE / "demo" / "runs"
    status = status_of(runs / "flow")
    assert (status["state"], status["step"], status["total_steps"]) == ("done", 9, 9)
    assert status["result"]["n"] == 280
    scores = read_json(runs / "evaluation" / "vqa.json")
    assert (
        scores["metrics"]["normalised"] > scores["before"]["normalised"] + 0.2
    )  # the form, learnt
    assert status["result"]["before"] == scores["before"]["contained"]
    losses = logged(runs / "7B", "loss")
    assert losses[max(losses)] < losses[min(losses)] / 2
    assert max(logged(runs / "GRPO", "reward_std").values()) > 0
    tokens = re.findall(r"\[151655 \* (\d+)\]", outcome.text)
    assert tokens and min(map(int, tokens)) > 1


def test_vases_of_another_seed_are_learnt_too(tmp_path):
    paths = demo.build(tmp_path, seed=1)
    nano = Nano(tmp_path)
    assert nano.run("sft", *demo.flags("sft", paths)).code == 0
    assert nano.run("merge", "--output_dir", paths.merged).code == 0
    flags = ["--checkpoint", paths.merged, "--data-root", paths.questions]
    size = ["--max-new-tokens", 12, "--batch-size", 32, "--device", "cpu", "--out", tmp_path]
    outcome = run_here(evaluate.main, [*flags, *size])
    assert outcome.code == 0, outcome.text
    result = read_json(tmp_path / "vqa.json")
    assert result["metrics"]["normalised"] > result["before"]["normalised"] + 0.2
