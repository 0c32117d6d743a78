"""The report of a training: its JSON and its Markdown."""

from types import SimpleNamespace

import pytest

from multimodal.training import report
from multimodal.training.report import Report, add_section, newest
from shared.errors import UserError
from shared.files import read_json
from shared.stop import Stopped

FACTS = {
    "command": "run_training.py --epochs 2",
    "data": [{"data_set": "coco", "expected": 10, "found": 9, "skipped": {"missing": 1}}],
    "model": {"size": "nano", "parameters": 2_218_200},
}


def finished(tmp_path):
    """The JSON of a report that was closed, with one checkpoint there."""
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / "best_model.pt").write_bytes(b"abc")
    with Report(tmp_path, FACTS) as one:
        one.update(stages=[{"stage": "unimodal", "epochs": 2, "val_loss": 1.23456}])
        one.close("done", "3 steps")
    return newest(tmp_path)


def test_a_finished_report_has_its_files_by_their_sums_and_a_page_of_it(tmp_path):
    path = finished(tmp_path)
    content, text = read_json(path), path.with_suffix(".md").read_text()
    assert (content["status"], content["reason"]) == ("done", "3 steps")
    # SHA-256 of "abc", as FIPS 180-2 gives it
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert content["checkpoints"] == [{"file": "best_model.pt", "bytes": 3, "sha256": digest}]
    assert text == report.render(content)
    assert text.startswith("---\nlicense: mit\n")
    assert "| coco | 10 | 9 | missing: 1 |" in text
    assert "| parameters | 2,218,200 |" in text
    assert "| unimodal | 2 | 1.235 |" in text


def test_shares_are_percent_on_the_page_and_stay_shares_in_the_json(tmp_path):
    """And sections that nobody named come too."""
    path = finished(tmp_path)
    add_section(path, "left_out", ["voxceleb: no key"])
    row = {"pairs": "coco", "R@1 before": 0.025, "R@1 after": 0.5375, "chance": 0.025}
    add_section(path, "summary", [row])
    add_section(path, "evaluation", {"coco/mAP of categories": 0.4033, "lr": 0.4033})
    text = path.with_suffix(".md").read_text()
    assert "| coco | 2.5 % | 53.8 % | 2.5 % |" in text
    assert "| coco/mAP of categories | 40.3 % |" in text and "| lr | 0.4033 |" in text
    assert "## Left out\n\n- voxceleb: no key" in text
    assert read_json(path)["summary"] == [row]


def test_a_file_that_is_no_report_is_refused(tmp_path):
    (tmp_path / "report_1.json").write_text("{}")
    with pytest.raises(UserError, match=r"report_1.json is no report of a training"):
        add_section(tmp_path / "report_1.json", "retrieval", [])


def test_what_stops_the_run_early_stands_in_its_report(tmp_path):
    with pytest.raises(Stopped), Report(tmp_path, FACTS):
        raise Stopped("stopped at step 3 of 9")
    content = read_json(newest(tmp_path))
    assert (content["status"], content["reason"]) == ("interrupted", "stopped at step 3 of 9")


def test_two_starts_in_one_second_have_two_reports(tmp_path, monkeypatch):
    still = SimpleNamespace(strftime=lambda _: "report_20260101_000000")
    monkeypatch.setattr(report, "time", still)
    for _ in range(2):
        Report(tmp_path, FACTS).__enter__()
    names = sorted(path.name for path in (tmp_path / "reports").glob("*.json"))
    assert names == ["report_20260101_000000.json", "report_20260101_000000b.json"]
    assert newest(tmp_path).name == names[1]


def test_text_from_outside_cannot_break_the_table():
    text = report.render(
        {"name": "r", "status": "done", "data": [{"data_set": "a|b", "left_out": "two\nlines"}]}
    )
    assert "| a\\|b | two lines |" in text
