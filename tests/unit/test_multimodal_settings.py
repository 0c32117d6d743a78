"""config.yaml, and how flags and resumed runs go with it."""

import json
from pathlib import Path

import pytest
import yaml

from multimodal import run_training
from multimodal.run_training import Config
from multimodal.training import settings_file
from shared.errors import UserError
from shared.settings import leaves, settings
from tests.harness import ROOT, run_here

# The document's block.
DOCUMENTED = """\
model:
  size: base
  embed_dim: 512
  use_checkpoint: true

training:
  epochs: 100
  batch_size: 8
  learning_rate: 1.0e-4
  use_amp: true
  gradient_accumulation_steps: 4

paths:
  data_root: ./data
  output_dir: ./outputs
"""


def settings_of(*flags: object) -> dict:
    outcome = run_here(run_training.main, [*flags, "--print-config"])
    assert outcome.code == 0, outcome.text
    return json.loads(outcome.text)


def refused(text: str, tmp_path: Path) -> str:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        settings_file.read(path, leaves(Config()))
    return str(error.value).removeprefix(f"{path}: ")


def test_the_file_is_the_documented_block():
    text = (ROOT / "multimodal" / "config.yaml").read_text()
    assert DOCUMENTED in text and yaml.safe_load(text) == yaml.safe_load(DOCUMENTED)


def test_the_documented_defaults_hold():
    found = settings_of()
    here = ROOT / "multimodal"
    assert (found["data_root"], found["output_dir"]) == (str(here / "data"), str(here / "outputs"))
    assert (found["model_size"], found["batch_size"], found["epochs"], found["lr"]) == (
        "base", 8, 100, 1e-4,
    )  # fmt: skip


def test_a_file_sets_defaults_and_flags_win(tmp_path, monkeypatch):
    path = tmp_path / "my.yaml"
    path.write_text(
        "model:\n  size: tiny\n  dropout: 0.1\n"
        "training:\n  batch_size: 3\n  learning_rate: 1e-3\n  seed: 5\n  datasets: [coco]\n"
        "paths:\n  data_root: sets\n"
    )
    found = settings_of("--config", path, "--batch-size", 6)
    assert (found["model_size"], found["dropout"], found["lr"]) == ("tiny", 0.1, 1e-3)
    assert (found["batch_size"], found["seed"], found["datasets"]) == (6, 5, ["coco"])
    assert found["data_root"] == str(ROOT / "multimodal" / "sets")
    assert found["epochs"] == 100
    monkeypatch.chdir(tmp_path)  # a path that is typed starts where it was typed
    typed = settings_of("--config", path, "--data-root", "./data")
    assert typed["data_root"] == str(tmp_path / "data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle:\n  size: tiny\n", "unknown section modle; did you mean model?"),
        ("training:\n  bach_size: 4\n", "unknown setting training.bach_size; did you mean batch"),
        ("training:\n  size: tiny\n", "unknown setting training.size; it belongs below model"),
        ("model: base\n", "model must hold `name: value` lines, found 'base'"),
        ("model:\n  size: huge\n", "model_size is 'huge', allowed: tiny, small, base, large"),
        ("training:\n  batch_size: many\n", "batch_size must be a whole number from 1"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_nearest(text, message, tmp_path):
    assert refused(text, tmp_path).startswith(message)


@pytest.mark.parametrize(
    ("flags", "mode"),
    [([], "auto"), (["--no-use-amp"], "off"), (["--amp", "bf16", "--no-use-amp"], "bf16")],
)
def test_use_amp_and_amp_are_one_decision(flags, mode):
    assert run_training._read_settings(flags).amp == mode


def test_a_settings_file_that_would_change_the_resumed_run_is_refused(tmp_path):
    cfg = run_training._read_settings(["--batch-size", "3", "--amp", "off", "--epochs", "7"])
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings(cfg)}))
    (tmp_path / "checkpoints").mkdir()
    stored = tmp_path / "checkpoints" / "checkpoint_epoch_5.pt"
    stored.touch()
    path = tmp_path / "my.yaml"
    path.write_text("training:\n  batch_size: 3\n  workers: 1\n")
    flags = ["--resume", str(stored), "--config", str(path)]
    assert run_training._read_settings(flags).batch_size == 3
    path.write_text("training:\n  batch_size: 5\n")
    with pytest.raises(UserError, match=r"cannot continue with .*my.yaml: batch_size: 3 → 5"):
        run_training._read_settings(flags)
