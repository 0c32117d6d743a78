"""lavic's stage 1 under kill -9 at seeded random moments, and its demo on another seed."""

import pytest

from lavic.demo_data import demo
from lavic.src import knowledge_distillation
from tests.harness import run_here, status_of
from tests.lavic_nano import flags_of

pytestmark = pytest.mark.full


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
