"""What users do wrong with lavic's stage 1: one line that says what and what to do, exit code 2.

SIGTERM, kill -9 and exact resumes are in tests/recipes/test_lavic_distillation.py.
"""

import math

import pytest

from lavic.src import knowledge_distillation
from lavic.src.vision.training import Best
from tests.harness import run_here
from tests.lavic_nano import build_nano, flags_of


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def flags(paths, tmp_path):
    return flags_of(paths, tmp_path / "out_distilled")


@pytest.mark.slow
def test_fault_34_paths_with_spaces_quotes_and_chinese_characters(flags, tmp_path):
    strange = tmp_path / "数据 集" / "$(touch X)'\"" / "-out"
    options = [*flags, "--num_epochs", 1, "--output_dir", strange]
    outcome = run_here(knowledge_distillation.main, options)
    assert outcome.code == 0, outcome.text
    assert (strange / "vision_lora_adapter_best" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.rglob("X"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_fault_17_a_validation_that_is_not_finite_is_never_the_best(bad):
    best = Best()
    assert not best.update(bad, 1) and best.epoch == 0
    assert best.update(2.0, 2) and not best.update(bad, 3)
    assert (best.loss, best.epoch) == (2.0, 2)
    again = Best()
    again.load_state_dict(best.state_dict())
    assert not again.update(bad, 4) and not again.update(2.5, 5) and again.update(1.5, 6)
