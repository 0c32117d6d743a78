"""The whole flow: its order, where it continues, and what it reports."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from shared.files import open_lock, read_json, write_json
from shared.lock import try_to_lock
from tests.harness import Outcome, run_here
from vasevqa import run_all

DOCUMENTED = ["classifier", "clipfilter1", "clipfilter2", "sft", "merge", "grpo", "merge2"]
SCORES = {
    "metrics": {"normalised": 0.9, "contained": 0.7},
    "between": {"normalised": 0.8, "contained": 0.6},
    "before": {"normalised": 0.0, "contained": 0.1},
    "chance": 0.223,
    "majority": 0.318,
    "counts": {"questions": 280},
}


def flow(*flags: object) -> Outcome:
    return run_here(run_all.main, flags)


def commands(*flags: str) -> dict[str, list[str]]:
    """{stage: words of its command}, as --dry-run prints them."""
    rows = [row.split(": ", 1) for row in flow(*flags, "--dry-run").text.splitlines()]
    return {name: shlex.split(line) for name, line in rows}


def script(path: Path, output: Path | None = None, text: str = "{}", code: int = 0) -> None:
    """A script that writes `text` into `output` and ends with `code`."""
    line = f"mkdir -p {output.parent}; echo {shlex.quote(text)} > {output}" if output else ":"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".py":
        path.write_text(f"import os\nos.system({line!r})\nraise SystemExit({code})\n")
    else:
        path.write_text(f"#!/usr/bin/env bash\n{line}\nexit {code}\n")
        path.chmod(0o755)


def furnish(root: Path, filtered: Path, output: Path) -> None:
    """Scripts that do nothing but leave what the flow expects."""
    script(root / "filter" / "model.py")
    script(root / "filter" / "classifier.py")
    script(root / "filter" / "clipfilter1.sh", filtered / "filtering_report.json")
    script(root / "filter" / "clipfilter2.py", filtered / "best_views_report.json")
    script(root / "model" / "sft.sh", output / "7B" / "report.html", "of the training")
    script(root / "model" / "merge.sh", output / "checkpoint-merged" / "config.json")
    script(root / "model" / "grpo.sh", output / "GRPO" / "args.json")
    scores = output / "evaluation" / "vqa.json"
    script(root / "model" / "evaluate.py", scores, json.dumps(SCORES))


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe with such scripts, for its demo."""
    places = {"RECIPE": tmp_path, "MODEL": tmp_path / "model", "FILTER": tmp_path / "filter"}
    for name, path in places.items():
        monkeypatch.setattr(run_all, name, path)
    runs = tmp_path / "demo" / "runs"
    furnish(tmp_path, runs / "filter" / "filtered_vases", runs)
    return tmp_path


def test_the_stages_are_the_documents_commands_in_their_order():
    assert list(commands())[:7] == DOCUMENTED
    assert list(commands("--demo")) == ["quality", *DOCUMENTED, "evaluate"]
    for name, words in commands("--demo").items():
        named = words[1] if words[0] == run_all.sys.executable else words[0]
        assert Path(named).is_file() and "--demo" in words, name
    assert commands("--keep", "0.5")["clipfilter1"][1:] == ["2", "--yes", "--keep", "0.5"]


def test_the_result_is_the_accuracy_of_each_model_and_the_page_shows_the_stages(recipe):
    outcome = flow("--demo")
    assert outcome.code == 0, outcome.text
    flow_dir = recipe / "demo" / "runs" / "flow"
    status = read_json(flow_dir / "status.json")
    assert (status["state"], status["step"], status["last"]) == ("done", 9, {"stage": "evaluate"})
    expected = {"name": "answers right in content", "unit": "share", "higher_is_better": True}
    expected |= {"before": 0.1, "after SFT": 0.6, "after": 0.7}
    expected |= {"chance": 0.223, "majority": 0.318, "n": 280}
    assert status["result"] == expected
    page = (flow_dir / "report.html").read_text()
    assert read_json(flow_dir / "sft.json")["finished_at"] in page
    assert str(recipe / "demo/runs/7B/report.html") in page and "of the training" not in page
    config = read_json(flow_dir / "config.json")
    assert config["settings"]["demo"] is True and "ms-swift" in config["versions"]


def test_a_failed_stage_is_named_and_the_chain_continues_there(recipe):
    script(recipe / "model" / "grpo.sh", code=7)
    outcome = flow("--demo")
    flow_dir = recipe / "demo" / "runs" / "flow"
    status = read_json(flow_dir / "status.json")
    assert outcome.code == status["exit_code"] == 7
    assert (status["state"], status["reason"], status["result"]) == ("failed", "stage grpo", None)
    assert "Failed (exit code 7): stage grpo" in (flow_dir / "report.html").read_text()
    script(recipe / "model" / "grpo.sh", recipe / "demo" / "runs" / "GRPO" / "args.json")
    outcome = flow("--demo", "--from", "grpo")
    assert outcome.code == 0, outcome.text
    assert "stage sft" not in outcome.text


def test_a_stage_that_is_none_and_a_running_chain_leave_what_is_there(tmp_path):
    os.close(open_lock(tmp_path))
    write_json(tmp_path / "status.json", {"state": "running", "pid": 1})
    outcome = flow("--only", "sfd", "--state-dir", tmp_path)
    assert outcome.code == 2 and "did you mean sft?" in outcome.text
    handle = open_lock(tmp_path)
    assert try_to_lock(handle)
    outcome = flow("--only", "sft", "--state-dir", tmp_path)
    assert outcome.code == 2 and "in use by a live run" in outcome.text
    os.close(handle)
    assert read_json(tmp_path / "status.json") == {"state": "running", "pid": 1}


def test_a_changed_data_file_runs_its_stage_and_all_after_it(recipe):
    model = recipe / "model"
    furnish(recipe, recipe / "filter" / "filtered_vases", model / "output")
    data = model / "data" / "grpo_video_dataset.json"
    data.parent.mkdir()
    data.write_text("[]")
    assert flow().code == 0
    data.write_text("[1]")
    text = flow().text
    assert "stage merge: already done" in text
    assert f"stage grpo: runs again: data: {data} of " in text and "stage merge2: starts" in text
