"""lavic's stage 1 under kill -9 at seeded random moments, and its demo on another seed."""

import random
import time
from pathlib import Path

import pytest

from lavic import demo
from lavic.src import knowledge_distillation
from shared.files import read_json_lines
from tests.harness import ROOT, run_here, start, status_of, wait_until
from tests.lavic_nano import build_nano, flags_of

pytestmark = pytest.mark.full
SCRIPT = ROOT / "lavic" / "src" / "knowledge_distillation.py"
KILLS = 10


def losses(run_dir: Path) -> dict[int, float]:
    rows = [r for r in read_json_lines(run_dir / "metrics.jsonl") if r.get("split") == "train"]
    found = {row["step"]: row["train_loss"] for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.limit(900)
def test_ten_kills_change_no_loss(tmp_path):
    paths, run_dir = build_nano(tmp_path / "nano"), tmp_path / "run"
    more = ["--num_epochs", 60, "--save_every", 4, "--num_workers", 2]
    options = [*flags_of(paths, run_dir), *more]
    whole = run_here(knowledge_distillation.main, [*options, "--output_dir", tmp_path / "whole"])
    assert whole.code == 0, whole.text
    generator, steps = random.Random(0), []
    for _ in range(KILLS):
        before = max(losses(run_dir), default=0)
        with start([SCRIPT, *options]) as running:
            wait_until(
                lambda least=before: max(losses(run_dir), default=0) > least + 4,
                f"a step after {before}",
                running=running,
            )
            time.sleep(generator.uniform(0.0, 0.3))  # the moment of the kill is the experiment
            running.process.kill()
            running.finish()
            assert running.leaves_nothing()
        steps.append(max(losses(run_dir)))
    outcome = run_here(knowledge_distillation.main, options)
    assert outcome.code == 0 and "continuing from" in outcome.text, outcome.text
    assert losses(run_dir) == losses(tmp_path / "whole")
    assert status_of(run_dir)["state"] == "done"
    print(f"killed at steps {steps} of {max(losses(run_dir))}")


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
    assert result["before"] > 0.6 > result["after"], result
