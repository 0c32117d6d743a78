"""lavic's stage 1 under kill -9 at seeded random moments, and its demo on another seed."""

import random
import time

import pytest

from lavic.demo_data import demo
from lavic.src import knowledge_distillation
from tests.harness import ROOT, losses, run_here, start, status_of, wait_for_step
from tests.lavic_nano import build_nano, flags_of

pytestmark = pytest.mark.full
SCRIPT = ROOT / "lavic" / "src" / "knowledge_distillation.py"
KILLS = 10


@pytest.mark.limit(900)
def test_ten_kills_change_no_loss(tmp_path):
    paths, run_dir = build_nano(tmp_path / "nano"), tmp_path / "run"
    more = ["--num_epochs", 60, "--save_every", 4, "--num_workers", 2]
    options = [*flags_of(paths, run_dir), *more]
    whole = run_here(knowledge_distillation.main, [*options, "--output_dir", tmp_path / "whole"])
    assert whole.code == 0, whole.text
    generator, steps = random.Random(0), []
    for _ in range(KILLS):
        before = max(losses(run_dir, "train_loss"), default=0)
        with start([SCRIPT, *options]) as running:
            wait_for_step(run_dir, before + 5, running, key="train_loss")
            time.sleep(generator.uniform(0.0, 0.3))  # the moment of the kill is the experiment
            running.process.kill()
            running.finish()
            assert running.leaves_nothing()
        steps.append(max(losses(run_dir, "train_loss")))
    outcome = run_here(knowledge_distillation.main, options)
    assert outcome.code == 0 and "continuing from" in outcome.text, outcome.text
    assert losses(run_dir, "train_loss") == losses(tmp_path / "whole", "train_loss")
    assert status_of(run_dir)["state"] == "done"
    last = max(losses(run_dir, "train_loss"))
    print(f"killed at steps {steps} of {last}")


@pytest.mark.limit(900)
def test_the_demo_of_another_seed_is_learnt_as_well(tmp_path):
    paths = demo.build(tmp_path / "demo", seed=1)
    settings = {k: v for k, v in knowledge_distillation.DEMO.items() if not isinstance(v, bool)}
    sizes = [word for name, value in settings.items() for word in (f"--{name}", value)]
    given = flags_of(paths, tmp_path / "run")
    options = [*given, "--max_samples", "all", *sizes, "--validate_before_training"]
    outcome = run_here(knowledge_distillation.main, options)
    assert outcome.code == 0, outcome.text
    result = status_of(tmp_path / "run")["result"]
    assert result["after"] < result["before"] / 3, result  # 3.66 to 0.82 on one machine
