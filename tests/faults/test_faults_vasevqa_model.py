"""vasevqa/model: users' mistakes; the real ms-swift killed, stopped in pairs, out of memory.

Stopped and continued it is in tests/recipes/test_vasevqa_model.py.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shared.files import read_json_lines
from tests.harness import Running, run_here, status_of, wait_until
from tests.vasevqa_nano import Nano, build, logged
from vasevqa.model import runs, train

pytestmark = pytest.mark.serial
MISTAKES = {
    "a model that is not there": (["--model", "/nowhere"], "the model /nowhere is missing"),
    "data that are not there": (["--dataset", "/no.json"], "the data set /no.json is missing"),
    "a misspelt flag": (["--learnin_rate", "1"], "did you mean --learning_rate?"),
    "a value without a flag": (["fast"], "fast: expected --flag value"),
    "half a step": (["--max_steps", "1.5"], "--max_steps must be a whole number"),
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
    typed = [*extra, *typed] if extra == ["fast"] else [*typed, *extra]
    outcome = run_here(train.main, ["sft", "--lora_rank", 8, "---", *typed])
    assert outcome.code == 2, outcome.text
    assert any("error: " in line and message in line for line in outcome.text.splitlines())
    assert "Traceback" not in outcome.text and "swift sft --model" not in outcome.text


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Nano:
    return build(tmp_path_factory.mktemp("nano"))


def flags(nano, run_dir, **changes):
    learn = {"learning_rate": "5e-3", "save_steps": 100, "use_logits_to_keep": "true"}
    return nano.flags("sft", run_dir, **learn | changes)


@contextmanager
def met_at(step: int, nano: Nano, run_dir: str, *words, **env) -> Iterator[Running]:
    """A run that has come to this step."""
    with nano.running("sft", *words, **env) as running:
        reached = lambda: max(logged(nano.root / run_dir, "loss"), default=0) >= step  # noqa: E731
        wait_until(reached, f"step {step} of {run_dir}", 200, running)
        yield running


@pytest.mark.full
@pytest.mark.limit(500)
def test_fault_05_kill_9_leaves_no_process_and_a_checkpoint_to_go_on_from(nano):
    run_dir = nano.root / "killed"
    words = flags(nano, "killed", max_steps=40, save_strategy="steps", save_steps=2)
    with met_at(5, nano, "killed", *words) as running:
        running.signal(signal.SIGKILL)
        assert running.leaves_nothing(timeout=60)
    outcome = nano.run("sft", *words, "--dry-run")
    assert outcome.code == 0
    saved = runs.newest(run_dir)
    assert saved and saved.step >= 2
    config = json.loads((run_dir / runs.CONFIG).read_text())
    assert runs.continuation(run_dir, config["identity"], "auto") == saved


@pytest.mark.full
@pytest.mark.limit(500)
def test_fault_01_two_processes_stop_together_and_save(nano):
    words = flags(nano, "pair", max_steps=60, dataloader_num_workers=1)
    with met_at(3, nano, "pair", *words, NPROC_PER_NODE="2") as running:
        running.signal(signal.SIGTERM)
        outcome = running.finish(timeout=120)
        assert running.leaves_nothing()
    assert outcome.code == 143, outcome.text[-3000:]
    saved = runs.newest(nano.root / "pair")
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
    assert status_of(nano.root / "greedy")["state"] == "failed"
    assert outcome.last_line.endswith("(exit 1)")


@pytest.mark.full
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
