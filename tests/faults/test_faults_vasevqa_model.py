"""The real ms-swift under vasevqa's scripts: stopped, continued, killed; what users do wrong."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from shared.files import read_json_lines
from tests.harness import start, status_of, wait_until
from tests.vasevqa_nano import Nano, build, logged
from vasevqa.model import runs

pytestmark = pytest.mark.serial
SFT = Path(runs.__file__).parent / "sft.sh"


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Nano:
    return build(tmp_path_factory.mktemp("nano"))


def flags(nano, run_dir, steps=12, **changes):
    learn = {"learning_rate": "5e-3", "max_steps": steps, "save_steps": 100}
    learn |= {"lora_dropout": "0"}  # loader workers draw from the generator of the dropout
    return nano.flags("sft", run_dir, **learn, use_logits_to_keep="true", **changes)


def wait_for_swift(run_dir, step, running):
    reached = lambda: max(logged(run_dir, "loss"), default=0) >= step  # noqa: E731
    wait_until(reached, f"step {step} in {run_dir}", 200, running)


@pytest.mark.slow
@pytest.mark.limit(500)
@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.full)], ids=["no workers", "two workers"]
)
def test_fault_01_sigterm_saves_and_the_same_command_goes_on_there(nano, workers):
    """Exit 143, no process left, and the losses of a run that was never stopped."""
    reference, run_dir = nano.root / f"whole{workers}", nano.root / f"stopped{workers}"
    words = {"dataloader_num_workers": workers}
    outcome = nano.run("sft", *flags(nano, reference.name, **words))
    assert outcome.code == 0, outcome.text[-3000:]
    with nano.running("sft", *flags(nano, run_dir.name, **words)) as running:
        wait_for_swift(run_dir, 3, running)
        running.signal(signal.SIGTERM)
        outcome = running.finish(timeout=120)
        assert running.leaves_nothing()
    assert outcome.code == 143, outcome.text[-3000:]
    status = status_of(run_dir)
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    saved = runs.newest(run_dir)
    assert saved and 3 <= saved.step < 12
    outcome = nano.run("sft", *flags(nano, run_dir.name, **words))
    assert outcome.code == 0, outcome.text[-3000:]
    assert f"continuing the interrupted run from {saved.path}" in outcome.text
    assert re.search(rf"\b{saved.step + 1}/12\b", outcome.text)
    expected, found = logged(reference, "loss"), logged(run_dir, "loss")
    assert sorted(found) == sorted(expected) == list(range(1, 13))
    assert found == pytest.approx(expected, rel=1e-2)
    assert not run_dir.with_name(f"{run_dir.name}.1").exists()


@pytest.mark.full
@pytest.mark.limit(500)
def test_fault_05_kill_9_leaves_no_process_and_a_checkpoint_to_go_on_from(nano):
    run_dir = nano.root / "killed"
    words = flags(nano, "killed", steps=40, save_strategy="steps")
    with nano.running("sft", *words, "--save_steps", 2) as running:
        wait_for_swift(run_dir, 5, running)
        running.signal(signal.SIGKILL)
        assert running.leaves_nothing(timeout=60)
    outcome = nano.run("sft", *words, "--save_steps", 2, "--dry-run")
    assert outcome.code == 0
    saved = runs.newest(run_dir)
    assert saved and saved.step >= 2
    config = json.loads((run_dir / runs.CONFIG).read_text())
    assert runs.continuation(run_dir, config["identity"], "auto") == saved


@pytest.mark.full
@pytest.mark.limit(500)
def test_fault_01_two_processes_stop_together_and_save(nano):
    run_dir = nano.root / "pair"
    words = flags(nano, "pair", steps=60, dataloader_num_workers=1)
    with nano.running("sft", *words, NPROC_PER_NODE="2") as running:
        wait_for_swift(run_dir, 3, running)
        running.signal(signal.SIGTERM)
        outcome = running.finish(timeout=120)
        assert running.leaves_nothing()
    assert outcome.code == 143, outcome.text[-3000:]
    saved = runs.newest(run_dir)
    assert saved and saved.step >= 3


@pytest.mark.full
@pytest.mark.limit(300)
def test_fault_41_memory_that_runs_out_in_swifts_own_step_ends_with_what_helps(nano, tmp_path):
    plugin = tmp_path / "greedy.py"
    plugin.write_text(
        "import torch\n"
        "from transformers import Trainer\n"
        "Trainer.training_step = lambda *_, **__: torch.empty(10**15)\n"
    )
    outcome = nano.run("sft", *flags(nano, "greedy", external_plugins=plugin))
    assert outcome.code == 1, outcome.text[-3000:]
    assert "DefaultCPUAllocator: can't allocate memory" in outcome.text
    assert "./sft.sh, " in outcome.text and "what helps most: " in outcome.text
    assert (status_of(nano.root / "greedy")["state"], outcome.last_line[-8:]) == (
        "failed",
        "(exit 1)",
    )


MISTAKES = {
    "a model that is not there": (["--model", "/nowhere"], "the model /nowhere is missing"),
    "data that are not there": (["--dataset", "/no.json"], "the data set /no.json is missing"),
    "a misspelt flag": (["--learnin_rate", "1"], "did you mean --learning_rate?"),
    "a value without a flag": (["fast"], "fast: expected --flag value"),
    "half a step": (["--max_steps", "1.5"], "--max_steps must be a whole number"),
    "a checkpoint that is not there": (
        ["--resume_from_checkpoint", "/no/checkpoint-3"],
        "/no/checkpoint-3: no such checkpoint",
    ),
}


@pytest.mark.parametrize(("extra", "message"), MISTAKES.values(), ids=MISTAKES)
def test_fault_35_a_mistake_is_one_line_before_swift_is_imported(extra, message, tmp_path):
    data = tmp_path / "rows.json"
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "krater"}]
    data.write_text(json.dumps([{"conversations": turns}]))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "pytorch_model.bin").touch()
    typed = ["--model", tmp_path / "m", "--dataset", data, "--output_dir", tmp_path / "out"]
    environ = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    first = extra if extra == ["fast"] else []
    with start([*first, *typed, *extra], program=[SFT], **environ) as running:
        outcome = running.finish(timeout=60)
    assert outcome.code == 2, outcome.text
    assert any("error: " in line and message in line for line in outcome.text.splitlines())
    assert "Traceback" not in outcome.text and "swift sft --model" not in outcome.text


@pytest.mark.slow
@pytest.mark.limit(400)
def test_rows_that_swift_would_not_train_on_are_named_or_left_out_and_counted(nano):
    """Given, left out and trained on add up: 24 + 4 rows, 6 steps of 4."""
    good = json.loads(nano.train.read_text(encoding="utf-8"))
    Image.new("RGB", (2100, 10)).save(nano.root / "strip.png")
    asked = {"role": "user", "content": [{"type": "image", "image": "gone.jpg"}]}
    said = {"role": "assistant", "content": "krater"}
    long = {**good[0], "conversations": [good[0]["conversations"][0],
                                         {"from": "gpt", "value": "krater " * 7000}]}  # fmt: skip
    planted = {
        25: ({**good[0], "images": ["strip.png"]}, "is 2100 × 10"),
        26: (long, "tokens, more than --max_length 512"),
        27: ({"messages": [asked, said], "images": []}, "gone.jpg is missing"),
        28: ({**good[0], "conversations": good[0]["conversations"][:1]}, "has no answer"),
    }
    rows = nano.root / "planted.json"
    rows.write_text(json.dumps([*good[:24], *(row for row, _ in planted.values())]))
    words = nano.flags("sft", "planted", dataset=rows, num_train_epochs=1)
    refused = nano.run("sft", *words)
    assert refused.code == 2 and "row 27" in refused.text and "row 28" in refused.text
    outcome = nano.run("sft", *words, "--skip-bad-rows")
    assert outcome.code == 0, outcome.text[-3000:]
    for number, (_, why) in planted.items():
        assert re.search(
            rf"left out: .*planted.json, row {number}: .*{re.escape(why)}", outcome.text
        )
    status = status_of(nano.root / "planted")
    assert status["data"] == {"rows": 28, "rows left out": 4, "rows trained on": 24}
    assert (status["step"], status["total_steps"]) == (6, 6)
    receipt = list(read_json_lines(nano.root / "planted" / "receipt.jsonl"))
    seen = [{"file": str(rows), "row": number, "seen": 1} for number in range(1, 25)]
    assert receipt == seen and "swift did not train on" not in outcome.text


@pytest.mark.slow
@pytest.mark.limit(400)
def test_rows_that_swift_loses_on_its_way_are_a_warning_with_their_numbers(nano, tmp_path):
    plugin = tmp_path / "loses.py"
    plugin.write_text(
        "from swift.dataset import LazyLLMDataset as Lazy\n"
        "begin = Lazy.__init__\n"
        "def shorter(self, rows, *words, **options):\n"
        "    begin(self, rows.select(range(min(19, len(rows)))), *words, **options)\n"
        "Lazy.__init__ = shorter\n"
    )
    split = {"split_dataset_ratio": 0.125, "num_train_epochs": 1}
    words = nano.flags("sft", "loses", external_plugins=plugin, **split)
    outcome = nano.run("sft", *words)
    assert outcome.code == 0, outcome.text[-3000:]
    counts = {"rows": 24, "rows for validation": 3, "rows trained on": 19}
    assert status_of(nano.root / "loses")["data"] == counts
    receipt = read_json_lines(nano.root / "loses" / "receipt.jsonl")
    unseen = {f"{nano.train}, row {row['row']}" for row in receipt if not row["seen"]}
    lost = re.findall(r"swift did not train on (.*)", outcome.text)
    assert len(unseen) == 5 and len(lost) == 1 and len(set(lost[0].split("; ")) & unseen) == 2
