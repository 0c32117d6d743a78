"""The whole flow: its order, where it goes on, and what it reports."""

from __future__ import annotations

import os

from shared.files import open_lock, read_json, write_json
from shared.lock import try_to_lock
from shared.stages import Stage
from shared.status import Status
from tests.harness import run_here
from vasevqa import run_all

DOCUMENTED = ["classifier", "clipfilter1", "clipfilter2", "sft", "merge", "grpo", "merge2"]


def commands(*argv):
    return list(run_all._commands(run_all.parse(run_all.Config, list(argv))))


def test_the_stages_are_those_of_the_documents_in_their_order():
    assert [name for name, *_ in commands()][:7] == DOCUMENTED
    demo = [name for name, *_ in commands("--demo")]
    assert demo == ["quality", *DOCUMENTED, "evaluate"]


def test_every_stage_runs_a_script_that_is_there():
    for name, words, outputs in commands("--demo"):
        script = words[1] if words[0] == run_all.sys.executable else words[0]
        assert script.is_file() and "--demo" in words, name
        assert all(path.is_relative_to(run_all.RECIPE / "demo" / "runs") for path in outputs)


def test_the_filter_is_told_how_much_to_keep_and_asks_nothing():
    first = {name: words for name, words, _ in commands("--keep", "0.5")}["clipfilter1"]
    assert first[1:] == ["2", "--yes", "--keep", "0.5"]


def test_the_result_is_the_accuracy_before_and_after(tmp_path):
    (tmp_path / "evaluation").mkdir()
    write_json(
        tmp_path / "evaluation" / "vqa.json",
        {
            "metrics": {"normalised": 0.9, "contained": 0.7},
            "before": {"normalised": 0.0, "contained": 0.1},
            "majority": 0.318,
            "counts": {"questions": 280},
        },
    )
    (tmp_path / "flow").mkdir()
    status = Status(tmp_path / "flow", recipe="vasevqa")
    run_all._counted(Stage("sft", lambda: 0), status, lambda: None).run()
    run_all._close(status, 0, tmp_path)
    found = read_json(tmp_path / "flow" / "status.json")
    assert (found["state"], found["step"], found["last"]) == ("done", 1, {"stage": "sft"})
    name = "answers right in content (majority answer 0.318, N 280)"
    expected = {"name": name, "before": 0.1, "after": 0.7, "higher_is_better": True}
    assert found["result"] == expected
    run_all._close(status, 143, tmp_path)
    found = read_json(tmp_path / "flow" / "status.json")
    assert (found["state"], found["result"], found["reason"]) == ("stopped", None, "stage sft")


def test_the_chain_has_a_page_with_its_stages_and_its_result(tmp_path):
    flow = tmp_path / "flow"
    flow.mkdir()
    write_json(flow / "sft.json", {"seconds": 12.5, "finished_at": "2026-01-01T00:00:00Z"})
    (tmp_path / "7B").mkdir()
    (tmp_path / "7B" / "report.html").write_text("of the training")
    status = Status(flow, recipe="vasevqa")
    run_all._counted(Stage("merge", lambda: 1), status, lambda: None).run()
    run_all._close(status, 1, tmp_path)
    run_all._show(flow, ["sft", "merge"])
    text = (flow / "report.html").read_text()
    assert "Failed (exit code 1): stage merge" in text
    assert "2026-01-01T00:00:00Z" in text and "12.5" in text
    assert str(tmp_path / "7B" / "report.html") in text and "of the training" not in text


def test_a_stage_that_is_none_and_a_chain_at_work_leave_what_is_there(tmp_path):
    os.close(open_lock(tmp_path))
    write_json(tmp_path / "status.json", {"state": "running", "pid": 1})
    outcome = run_here(run_all.main, ["--only", "sfd", "--state-dir", tmp_path])
    assert outcome.code == 2 and "did you mean sft?" in outcome.text
    handle = open_lock(tmp_path)
    assert try_to_lock(handle)
    outcome = run_here(run_all.main, ["--only", "sft", "--state-dir", tmp_path])
    assert outcome.code == 2 and "at work in another process" in outcome.text
    os.close(handle)
    assert read_json(tmp_path / "status.json") == {"state": "running", "pid": 1}


def test_the_first_stage_describes_the_chain(tmp_path):
    cfg = run_all.parse(run_all.Config, ["--keep", "0.5"])
    status = Status(tmp_path, recipe="vasevqa")
    run_all._counted(
        Stage("sft", lambda: 0), status, lambda: run_all._describe(cfg, tmp_path)
    ).run()
    config = read_json(tmp_path / "config.json")
    assert config["settings"]["keep"] == 0.5 and "ms-swift" in config["versions"]
