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
    scores, result = read_json(runs / "evaluation" / "vqa.json"), status["result"]
    assert result["n"] == 280 and result["chance"] < result["majority"] < 0.4
    assert_fine_tuning_taught_content(scores)
    assert result["after SFT"] == scores["between"]["contained"]
    assert result["after"] == scores["metrics"]["contained"]
    losses = logged(runs / "7B", "loss")
    assert losses[max(losses)] < losses[min(losses)] / 2
    assert max(logged(runs / "GRPO", "reward_std").values()) > 0
    tokens = re.findall(r"\[151655 \* (\d+)\]", outcome.text)
    assert tokens and min(map(int, tokens)) > 1


@pytest.mark.parametrize("seed", [1, 2])
def test_vases_of_other_seeds_are_learnt_too(tmp_path, seed):
    paths, nano = demo.build(tmp_path, seed=seed), Nano(tmp_path)
    target = ["--output_dir", paths.merged]
    for script in ("sft", "merge", "grpo", "merge"):
        flags = target if script == "merge" else demo.flags(script, paths)
        assert nano.run(script, *flags).code == 0, script
    flags = ["--checkpoint", paths.merged, "--data-root", paths.questions, "--out", tmp_path]
    size = ["--max-new-tokens", 12, "--batch-size", 32, "--device", "cpu"]
    outcome = run_here(evaluate.main, [*flags, *size])
    assert outcome.code == 0, outcome.text
    assert_fine_tuning_taught_content(read_json(tmp_path / "vqa.json"))


def assert_fine_tuning_taught_content(scores):
    """SFT beats the base and the majority answer by five points, in content, on unseen vases."""
    rivals = (scores["before"]["contained"], scores["majority"])
    assert scores["between"]["contained"] >= max(rivals) + 0.05, scores
