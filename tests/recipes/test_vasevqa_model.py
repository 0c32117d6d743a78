"""SFT, merge, GRPO, merge with the real ms-swift, once; what each of them left."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.files import read_json, read_json_lines
from tests.harness import ROOT, Outcome, run_here, status_of
from tests.vasevqa_nano import Nano, build, logged
from vasevqa.model import evaluate

pytestmark = [pytest.mark.slow, pytest.mark.limit(600)]

LEARN = {"learning_rate": "5e-3", "max_steps": 6, "save_steps": 3, "use_logits_to_keep": "true"}
REWARDS = ("external_vase_acc", "letters")


@dataclass(frozen=True)
class Chain:
    """The runs of the documented flow, in order, and the files they read and wrote."""

    nano: Nano
    sft: Outcome
    merged: Outcome
    grpo: Outcome
    merged_again: Outcome


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    nano = build(tmp_path_factory.mktemp("vase model"))
    target = ["--output_dir", nano.root / "checkpoint-merged"]
    plugins = ["--external_plugins", nano.plugin, "--reward_funcs", *REWARDS[1:]]
    rewards = ["--learning_rate", "1e-2", "--max_steps", 2, "--save_steps", 2, *plugins]
    return Chain(
        nano,
        nano.run("sft", *nano.flags("sft", **LEARN)),
        nano.run("merge", *target),
        nano.run("grpo", *nano.flags("grpo"), *rewards),
        nano.run("merge", *target),
    )


def test_every_step_of_the_flow_ends_well_without_a_path_edited(chain):
    for outcome in (chain.sft, chain.merged, chain.grpo, chain.merged_again):
        assert outcome.code == 0, outcome.text[-4000:]


def test_pictures_are_expanded_to_their_tokens(chain):
    found = re.search(r"\[151655 \* (\d+)\]", chain.sft.text)
    assert found and int(found[1]) == 16  # 112 × 112 pixels, 28 × 28 a token


def test_the_loss_of_fine_tuning_falls_and_the_status_follows(chain):
    losses = logged(chain.nano.root / "7B", "loss")
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and losses[6] < losses[1] - 0.5
    status = status_of(chain.nano.root / "7B")
    assert (status["state"], status["step"], status["total_steps"]) == ("done", 6, 6)
    assert status["last"]["loss"] == pytest.approx(losses[6])


def test_each_run_s_page_has_its_flags_its_surroundings_and_its_rows(chain):
    root = chain.nano.root
    config = read_json(root / "7B" / "config.json")
    assert config["settings"]["learning_rate"] == "5e-3"
    assert config["defaults"]["learning_rate"] == "1e-4"
    assert config["defaults"]["max_steps"] == "swift's own"
    assert config["versions"]["ms-swift"] == importlib.metadata.version("ms-swift")
    rows = len(json.loads(chain.nano.train.read_text(encoding="utf-8")))
    assert status_of(root / "7B")["data"] == {"rows": rows, "rows trained on": rows}
    for run in ("7B", "GRPO", "merge"):
        page = (root / run / "report.html").read_text(encoding="utf-8")
        assert "config.json is missing" not in page and "<td>ms-swift</td>" in page, run


def logits_of(model, processor, nano):
    import torch
    from PIL import Image

    row = json.loads(nano.train.read_text(encoding="utf-8"))[0]
    asked = [{"type": "image"}, {"type": "text", "text": "\nWhat is the shape of this vase?"}]
    text = processor.apply_chat_template([{"role": "user", "content": asked}], tokenize=False)
    picture = Image.open(nano.root / row["images"][0])
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits


def test_merged_logits_are_those_of_base_and_adapter(chain):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    nano = chain.nano
    load = lambda path: AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)  # noqa: E731
    processor = AutoProcessor.from_pretrained(nano.model)
    base = load(nano.model)
    before = logits_of(base, processor, nano)
    apart = PeftModel.from_pretrained(base, nano.root / "7B" / "checkpoint-6")
    expected = logits_of(apart, processor, nano)
    found = logits_of(load(nano.root / "checkpoint-merged.1"), processor, nano)
    assert (expected - before).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_grpo_rewards_differ_and_plain_functions_are_called(chain):
    run_dir = chain.nano.root / "GRPO"
    assert max(logged(run_dir, "reward_std").values()) > 0
    names = {name for line in read_json_lines(run_dir / "logging.jsonl") for name in line}
    assert "rewards/letters/mean" in names
    completions = next(iter(read_json_lines(run_dir / "completions.jsonl")))
    answers = [row["conversations"][1]["value"] for row in json.loads(chain.nano.grpo.read_text())]
    assert set(completions["solution"]) <= set(answers)


def test_the_second_merge_has_other_weights_and_keeps_the_first(chain):
    from safetensors.torch import load_file

    root = chain.nano.root
    first = load_file(root / "checkpoint-merged.1" / "model.safetensors")
    second = load_file(root / "checkpoint-merged" / "model.safetensors")
    assert first.keys() == second.keys()
    assert any((first[name] - second[name]).abs().max() > 1e-6 for name in first)
    note = read_json(root / "checkpoint-merged" / "merged_from.json")
    assert note["adapter"] == str(root / "GRPO" / "checkpoint-2")
    assert note["base"] == str(root / "checkpoint-merged.1")
    assert read_json(root / "checkpoint-merged.1" / "merged_from.json")["base"] == str(
        chain.nano.model
    )


def test_a_merge_typed_once_more_changes_nothing(chain):
    target = chain.nano.root / "checkpoint-merged"
    before = (target / "model.safetensors").stat().st_mtime_ns
    outcome = chain.nano.run("merge", "--output_dir", target)
    assert outcome.code == 0 and "done before" in outcome.text
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    assert not target.with_name("checkpoint-merged.2").exists()


def test_evaluation_compares_the_merged_model_with_its_base(chain, tmp_path):
    nano = chain.nano
    flags = ["--checkpoint", nano.root / "checkpoint-merged", "--data-root", nano.train]
    size = ["--limit", 10, "--max-new-tokens", 8, "--device", "cpu", "--out", tmp_path]
    outcome = run_here(evaluate.main, [*flags, *size])
    assert outcome.code == 0, outcome.text
    result = read_json(tmp_path / "vqa.json")
    assert result["schema"] == 1 and result["counts"]["questions"] == 10
    assert result["compared_with"] == str(nano.model) and result["between"]
    lines = list(read_json_lines(tmp_path / "answers.jsonl"))
    assert len(lines) == 10
    share = sum(line["after"].strip() == line["reference"] for line in lines) / 10
    assert result["metrics"]["exact"] == pytest.approx(share)
    assert "before exact" in outcome.text and {"before", "between", "after"} <= lines[0].keys()


def test_the_merged_model_answers_by_the_pages_lines(chain, tmp_path):
    """README, Use it: swift infer, and transformers alone, on the demo's kind of model."""
    nano = chain.nano
    page = (
        (ROOT / "vasevqa" / "README.md").read_text(encoding="utf-8").partition("### 5. Use it")[2]
    )
    merged = str(nano.root / "checkpoint-merged")
    row = json.loads(nano.train.read_text(encoding="utf-8"))[0]
    snippet = page.partition("```python\n")[2].partition("```")[0]
    snippet = snippet.replace("output/checkpoint-merged", merged)
    snippet = snippet.replace("vase.jpg", str(nano.root / row["images"][0]))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", snippet], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    line = page.partition("```bash\n")[2].partition("\n")[0].split()
    words = [merged if word.endswith("checkpoint-merged") else word for word in line[1:]]
    words = [str(nano.train) if word.endswith("questions.json") else word for word in words]
    words += ["--max_new_tokens", "4", "--result_path", str(tmp_path / "answers.jsonl")]
    swift = Path(sys.executable).with_name("swift")
    env |= {"MODELSCOPE_CACHE": str(tmp_path / "cache"), "ROOT_IMAGE_DIR": str(nano.root)}
    done = subprocess.run(
        [swift, *words], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = list(read_json_lines(tmp_path / "answers.jsonl"))
    assert len(answers) == 24 and all("response" in answer for answer in answers)
