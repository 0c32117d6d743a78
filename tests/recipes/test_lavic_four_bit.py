"""--load_in_4bit: the language model's layers in NF4; by bitsandbytes' CPU back end where it is."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import shared.memory
from lavic.src import describe, evaluate, knowledge_distillation, prompt_tuning
from lavic.src.recommend import memory as of_tuning
from lavic.src.vision import memory as of_distillation
from lavic.src.vision.model import load_base
from shared.files import read_json, read_json_lines
from tests.harness import losses, run_here, status_of
from tests.lavic_nano import build_nano, flags_of
from tests.lavic_talks import nano

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


def commands(tmp_path):
    picture = next(path for path in nano().images.iterdir() if path.stat().st_size > 300)
    return (
        (knowledge_distillation.main, flags_of(build_nano(tmp_path / "nano"), tmp_path / "one")),
        (prompt_tuning.main, nano().flags(tmp_path / "two")),
        (evaluate.main, ["--checkpoint", nano().adapter, "--data-root", nano().root / "data"]),
        (describe.main, [picture, "--checkpoint", nano().adapter]),
    )


def test_without_the_package_every_script_says_how_to_have_it(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest),
    )
    for main, flags in commands(tmp_path):
        outcome = run_here(main, [*flags, "--load_in_4bit"])
        assert outcome.code == 3, outcome.text
        assert outcome.last_line.endswith("-m pip install bitsandbytes")
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()


@needs_bitsandbytes
@pytest.mark.parametrize("device", DEVICES)
def test_the_language_models_layers_alone_are_packed(device):
    base, _ = load_base(nano().model, torch.device(device), torch.float32, four_bit=True)
    packed = {name for name, part in base.named_modules() if type(part).__name__ == "Linear4bit"}
    assert len(packed) == 2 * 7 and all("language_model.layers" in name for name in packed)
    kinds = {part.weight.quant_state.quant_type for name, part in base.named_modules()
             if name in packed}  # fmt: skip
    assert kinds == {"nf4"}


@needs_bitsandbytes
@pytest.mark.parametrize("device", DEVICES)
def test_stage_1_trains_beside_a_packed_language_model(tmp_path, device):
    flags = flags_of(build_nano(tmp_path / "nano"), tmp_path / "whole")
    flags += ["--lora_dropout", 0, "--num_epochs", 4, "--lr", 5e-3, "--device", device]
    assert run_here(knowledge_distillation.main, flags).code == 0
    packed = [*flags, "--load_in_4bit", "--output_dir", tmp_path / "packed"]
    outcome = run_here(knowledge_distillation.main, packed)
    assert outcome.code == 0, outcome.text
    whole, found = (losses(tmp_path / name, "train_loss") for name in ("whole", "packed"))
    assert found != whole and found[1] == pytest.approx(whole[1], rel=0.1)
    assert found[20] < found[1]


@needs_bitsandbytes
@pytest.mark.parametrize("device", DEVICES)
def test_stage_2_trains_on_a_packed_language_model_and_is_evaluated_on_it(tmp_path, device):
    flags = [*nano().flags(tmp_path / "out"), "--load_in_4bit", "--device", device]
    outcome = run_here(prompt_tuning.main, [*flags, "--no-evaluate-before"])
    assert outcome.code == 0, outcome.text
    found = losses(tmp_path / "out", "train_loss")
    assert found[max(found)] < found[1]
    out = ["--out", tmp_path / "results", "--workers", 0, "--cache", tmp_path / "vectors"]
    where = ["--checkpoint", tmp_path / "out", "--data-root", nano().root / "data", *out]
    extra = ["--load_in_4bit", "--device", device, "--batch-size", 3]
    assert run_here(evaluate.main, [*where, *extra]).code == 0
    metrics = read_json(tmp_path / "results" / "evaluation.json")["metrics"]
    assert metrics["recall@1"] == status_of(tmp_path / "out")["result"]["after"]
    name = "test_results_candidates_st.jsonl"
    ours, theirs = (list(read_json_lines(tmp_path / d / name)) for d in ("results", "out"))
    assert ours == theirs


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_spread_over_what_there_is_gives_the_same_figures(tmp_path, device):
    flags = ["--checkpoint", nano().adapter, "--data-root", nano().root / "data", "--workers", 0]
    found = []
    for name, extra in (("plain", []), ("spread", ["--device_map", "auto"])):
        words = [*flags, "--out", tmp_path / name, "--device", device, *extra]
        outcome = run_here(evaluate.main, words)
        assert outcome.code == 0, outcome.text
        found.append(read_json(tmp_path / name / "evaluation.json")["metrics"]["val_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.slow
def test_the_estimates_say_what_it_saves():
    for module, script in ((of_distillation, knowledge_distillation), (of_tuning, prompt_tuning)):
        cfg = script.Config(gradient_checkpointing="on")
        values = script.memory_values(cfg)
        whole, packed = (module.plan(**(values | {"load_in_4bit": on})) for on in (False, True))
        saved = whole.rows[0][1] - packed.rows[0][1]
        # 6.98 G weights of the layers: from 2 bytes to half a byte and a scale a 64
        assert saved == pytest.approx(6.98e9 * (2 - 0.5156), rel=0.01)
        assert packed.total < 8e9 < whole.total
        assert "7,5" in whole.rows[0][2] or "7,2" in whole.rows[0][2]
        assert whole.rows[0][2] == packed.rows[0][2]
        assert "--load_in_4bit (saves" in module.text(values, 1)


def test_the_estimate_of_an_evaluation_spreads_the_weights(monkeypatch):
    flags = ["--checkpoint", nano().adapter, "--estimate", "--batch-size", 1]

    def weights(*extra):
        outcome = run_here(evaluate.main, [*flags, *extra])
        assert outcome.code == 0, outcome.text
        (line,) = (line for line in outcome.text.splitlines() if line.startswith("  weights"))
        return float(line.split()[1])

    whole = weights()
    monkeypatch.setattr(shared.memory, "devices", lambda: [("card", 8 * 10**9)] * 2)
    assert weights("--device_map", "auto") == pytest.approx(whole / 2, abs=0.11)
    assert weights() == whole
    assert weights("--load_in_4bit") < whole
