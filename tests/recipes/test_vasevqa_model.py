"""SFT, merge, GRPO, merge with the real ms-swift, once; a run that was stopped and continued."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from shared.files import read_json, read_json_lines
from tests.harness import ROOT, Outcome, run_here, status_of, wait_until
from tests.vasevqa_nano import Nano, build, logged
from vasevqa.model import evaluate, runs, train

pytestmark = [pytest.mark.slow, pytest.mark.serial, pytest.mark.limit(600)]

STEPS = list(range(1, 13))  # 24 rows, 4 a step, twice


@dataclass(frozen=True)
class Chain:
    """The runs of the documented flow, in order, and the files they read and wrote."""

    nano: Nano
    sft: Outcome
    merged: Outcome
    grpo: Outcome
    merged_again: Outcome


def planted(nano: Nano) -> dict[int, tuple[dict[str, Any], str]]:
    """{its number: a row that swift would not train on, and what is said of it}."""
    good = json.loads(nano.train.read_text(encoding="utf-8"))[0]
    asked = {"role": "user", "content": [{"type": "image", "image": "gone.jpg"}]}
    parts = {"messages": [asked, {"role": "assistant", "content": "krater"}], "images": []}
    question = good["conversations"][:1]
    long = [*question, {"from": "gpt", "value": "krater " * 7000}]
    return {
        25: ({**good, "images": ["strip.png"]}, "is 2100 × 10"),
        26: ({**good, "conversations": long}, "tokens, more than --max_length 512"),
        27: (parts, "gone.jpg is missing"),
        28: ({**good, "conversations": question}, "has no answer"),
    }


def sft_flags(nano: Nano, run_dir: str = "7B") -> list[object]:
    """24 rows and the planted ones, the same losses whatever loader workers do."""
    learn = {"learning_rate": "5e-3", "num_train_epochs": 2, "use_logits_to_keep": "true"}
    learn |= {"lora_dropout": 0, "dataloader_num_workers": 1}
    return nano.flags("sft", run_dir, dataset=nano.root / "planted.json", **learn)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    nano = build(tmp_path_factory.mktemp("vase model"))
    rows = json.loads(nano.train.read_text(encoding="utf-8"))
    rows += [row for row, _ in planted(nano).values()]
    (nano.root / "planted.json").write_text(json.dumps(rows))
    Image.new("RGB", (2100, 10)).save(nano.root / "strip.png")
    target = ["--output_dir", nano.root / "checkpoint-merged"]
    rewards = ["--external_plugins", nano.plugin, "--reward_funcs", "letters"]
    rewards += ["--learning_rate", "1e-2", "--max_steps", 2, "--save_steps", 2]
    return Chain(
        nano,
        nano.run("sft", *sft_flags(nano), "--skip-bad-rows"),
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
    assert sorted(losses) == STEPS and losses[12] < losses[1] - 0.5
    status = status_of(chain.nano.root / "7B")
    assert (status["state"], status["step"], status["total_steps"]) == ("done", 12, 12)
    assert status["last"]["loss"] == pytest.approx(losses[12])


def test_rows_that_swift_would_not_train_on_are_named_or_left_out_and_counted(chain):
    """Given, left out and trained on add up: 24 + 4 rows."""
    nano = chain.nano
    refused = run_here(train.main, ["sft", "--gradient_checkpointing", "false", "---",
                                    *sft_flags(nano, "refused")])  # fmt: skip
    assert refused.code == 2 and "row 27" in refused.text and "row 28" in refused.text
    for number, (_, why) in planted(nano).items():
        said = rf"left out: .*planted.json, row {number}: .*{re.escape(why)}"
        assert re.search(said, chain.sft.text)
    run_dir, rows = nano.root / "7B", nano.root / "planted.json"
    counts = {"rows": 28, "rows left out": 4, "rows trained on": 24}
    assert status_of(run_dir)["data"] == counts
    receipt = list(read_json_lines(run_dir / "receipt.jsonl"))
    assert receipt == [{"file": str(rows), "row": number, "seen": 2} for number in range(1, 25)]
    assert "swift did not train on" not in chain.sft.text


def test_fault_01_sigterm_saves_and_the_same_command_goes_on_there(chain):
    """Exit 143, no process left, and the losses of a run that was never stopped."""
    nano, run_dir = chain.nano, chain.nano.root / "stopped"
    words = [*sft_flags(nano, "stopped"), "--skip-bad-rows"]
    with nano.running("sft", *words) as running:
        reached = lambda: max(logged(run_dir, "loss"), default=0) >= 3  # noqa: E731
        wait_until(reached, "step 3", 200, running)
        running.signal(signal.SIGTERM)
        outcome = running.finish(timeout=120)
        assert running.leaves_nothing()
    assert outcome.code == 143, outcome.text[-3000:]
    status = status_of(run_dir)
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    saved = runs.newest(run_dir)
    assert saved and 3 <= saved.step < 12
    outcome = nano.run("sft", *words)
    assert outcome.code == 0, outcome.text[-3000:]
    assert f"continuing the interrupted run from {saved.path}" in outcome.text
    assert re.search(rf"\b{saved.step + 1}/12\b", outcome.text)
    found = logged(run_dir, "loss")
    assert sorted(found) == STEPS
    assert found == pytest.approx(logged(nano.root / "7B", "loss"), rel=1e-2)
    assert not run_dir.with_name("stopped.1").exists()


def test_each_run_s_page_has_its_flags_and_its_surroundings(chain):
    root = chain.nano.root
    config = read_json(root / "7B" / "config.json")
    assert config["settings"]["learning_rate"] == "5e-3"
    assert config["defaults"]["learning_rate"] == "1e-4"
    assert config["defaults"]["lora_dropout"] == "swift's own"
    assert config["versions"]["ms-swift"] == importlib.metadata.version("ms-swift")
    for run in ("7B", "GRPO", "merge"):
        page = (root / run / "report.html").read_text(encoding="utf-8")
        assert "config.json is missing" not in page and "<td>ms-swift</td>" in page, run


def logits_of(model, processor, nano):
    row = json.loads(nano.train.read_text(encoding="utf-8"))[0]
    asked = [{"type": "image"}, {"type": "text", "text": "\nWhat is the shape of this vase?"}]
    text = processor.apply_chat_template([{"role": "user", "content": asked}], tokenize=False)
    picture = Image.open(nano.root / row["images"][0])
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits


def test_merged_logits_are_those_of_base_and_adapter(chain):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    nano = chain.nano
    load = lambda path: AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)  # noqa: E731
    processor = AutoProcessor.from_pretrained(nano.model)
    base = load(nano.model)
    before = logits_of(base, processor, nano)
    apart = PeftModel.from_pretrained(base, nano.root / "7B" / "checkpoint-12")
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
    first, second = (chain.nano.root / f"checkpoint-merged{n}" for n in (".1", ""))
    before, after = (load_file(path / "model.safetensors") for path in (first, second))
    assert before.keys() == after.keys()
    assert any((before[name] - after[name]).abs().max() > 1e-6 for name in before)
    note = read_json(second / "merged_from.json")
    assert note["adapter"] == str(chain.nano.root / "GRPO" / "checkpoint-2")
    assert note["base"] == str(first)
    assert read_json(first / "merged_from.json")["base"] == str(chain.nano.model)


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


def use_it(language: str, nano: Nano) -> str:
    """README, Use it: the first lines in this language, for the merged model of the chain."""
    page = (ROOT / "vasevqa" / "README.md").read_text(encoding="utf-8")
    text = page.partition("### 5. Use it")[2].partition(f"```{language}\n")[2].partition("```")[0]
    return re.sub(r"(\./)?output/checkpoint-merged", str(nano.root / "checkpoint-merged"), text)


def test_the_merged_model_answers_by_the_pages_lines_of_transformers(chain, capsys):
    row = json.loads(chain.nano.train.read_text(encoding="utf-8"))[0]
    picture = str(chain.nano.root / row["images"][0])
    exec(use_it("python", chain.nano).replace("vase.jpg", picture), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.full
def test_the_merged_model_answers_by_the_pages_line_of_swift(chain, tmp_path):
    nano = chain.nano
    line = use_it("bash", nano).replace("data/questions.json", f"'{nano.train}'")
    line += f" --max_new_tokens 4 --result_path '{tmp_path}/answers.jsonl'"
    line = line.replace(str(nano.root / "checkpoint-merged"), f"'{nano.root}/checkpoint-merged'")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"MODELSCOPE_CACHE": str(tmp_path / "cache"), "ROOT_IMAGE_DIR": str(nano.root)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line.replace("\n", " ")], env=env, cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers = list(read_json_lines(tmp_path / "answers.jsonl"))
    assert len(answers) == 24 and all("response" in answer for answer in answers)
