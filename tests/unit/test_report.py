"""The report page: what it shows equals the files, whatever state those are in."""

import json
import os
import socket
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shared import processes, report, settings, status
from shared.errors import UserError
from shared.page import Page, Picture, line_chart
from shared.tools import report as tool
from tests.unit.test_page import PNG, Reader

STATUS = {
    "schema": 1,
    "recipe": "probe",
    "state": "done",
    "exit_code": 0,
    "reason": "40 steps",
    "pid": 1,
    "host": "elsewhere",
    "world_size": 2,
    "step": 40,
    "total_steps": 40,
    "epoch": 2,
    "eta_s": 0.0,
    "started_at": "2026-01-02T03:04:05Z",
    "updated_at": "2026-01-02T04:06:08Z",
    "last": {"loss": 0.25, "val/acc": None},
    "best": {"loss": 0.125},
    "result": {"name": "accuracy", "before": 0.1, "after": 0.7512345678, "higher_is_better": True},
    "outputs": [],
    "data": {"training images": 800, "skipped": {"truncated": 3}},
}
CONFIG = {
    "settings": {"lr": 5e-4, "seed": 0, "amp": "off", "paths": ["a", "b"], "model": {"depth": 18}},
    "defaults": {"lr": 1e-3, "model": {"depth": 50}},
    "command": "python train.py --lr 5e-4",
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
}


class Tables(HTMLParser):
    """The tables of a page as lists of rows of texts, under the heading before them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[list[list[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.found.append([])
        elif tag == "tr":
            self.found[-1].append([])
        elif tag in ("td", "th"):
            self.found[-1][-1].append("")
        self._inside = tag in ("td", "th")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if getattr(self, "_inside", False):
            self.found[-1][-1][-1] += data

    def named(self, *headers: str) -> dict[str, list[str]]:
        """The rows, by their first cell, of the table with these headers."""
        rows = next(rows for rows in self.found if rows[0] == list(headers))
        return {row[0]: row[1:] for row in rows[1:]}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "a run"
    return make_run(directory)


def make_run(directory: Path, **changes: object) -> Path:
    directory.mkdir(parents=True)
    (directory / "status.json").write_text(json.dumps(STATUS | changes))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    rows = [{"step": s, "epoch": 0, "split": "train", "loss": 10.0 / s} for s in range(1, 41)]
    rows += [{"step": s, "epoch": 0, "split": "val", "loss": 20.0 / s} for s in (20, 40)]
    lines = [json.dumps(row) for row in rows]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def page_of(run_dir: Path) -> str:
    return report.write(run_dir).read_text(encoding="utf-8")


def test_tables_equal_the_files(run_dir):
    tables = Tables(page_of(run_dir))
    assert tables.named("result", "before", "after") == {
        "accuracy (higher is better)": ["0.1", "0.751235"]
    }
    facts = tables.named("run", "")
    for name in ("state", "exit_code", "step", "total_steps", "epoch", "started_at"):
        assert facts[name] == [str(STATUS[name])]
    assert facts["duration"] == ["1:02:03"]
    assert facts["command"] == [CONFIG["command"]]
    assert tables.named("", "last", "best") == {"loss": ["0.25", "0.125"], "val/acc": ["–", "–"]}
    assert tables.named("data", "count") == {"training images": ["800"], "skipped.truncated": ["3"]}
    assert tables.named("differs from the default", "value", "default") == {
        "lr": ["0.0005", "0.001"],
        "model.depth": ["18", "50"],
    }
    assert tables.named("setting", "value") == {
        "lr": ["0.0005"],
        "seed": ["0"],
        "amp": ["off"],
        "paths": ['["a", "b"]'],
        "model.depth": ["18"],
    }
    assert tables.named("environment", "") == {
        "host": ["elsewhere"],
        "processes": ["2"],
        "python": ["3.11.7"],
        "torch": ["2.15.0"],
    }


def test_a_result_says_unit_number_and_chance_as_far_as_they_are_known(run_dir):
    result = STATUS["result"] | {"unit": "share", "n": 256, "chance": 0.00390625, "control": None}
    (run_dir / "status.json").write_text(json.dumps(STATUS | {"result": result}))
    tables = Tables(page_of(run_dir))
    found = tables.named("result", "before", "after", "N", "chance", "control")
    row = ["10.0 %", "75.1 %", "256", "0.4 %", "–"]
    assert found == {"accuracy (higher is better)": row}


def test_warnings_come_before_everything_but_how_the_run_ended(run_dir):
    (run_dir / "config.json").unlink()
    (run_dir / "train.log").write_text("fine\nx | WARNING: 3 pictures <b>skipped\nfine\n")
    page = page_of(run_dir)
    said = ["Not shown: config.json is missing.", "x | WARNING: 3 pictures <b>skipped"]
    assert [text for text in Reader(page).texts["li"] if text.strip()] == said
    ends = [page.index(words) for words in ("Finished: 40", "config.json is missing", "accuracy (")]
    assert ends == sorted(ends)


def test_a_page_fetches_nothing_and_runs_nothing(run_dir):
    (run_dir / "pages").mkdir()
    (run_dir / "pages" / "sheet.png").write_bytes(PNG)
    hostile = "<h1>Sheet</h1><script>fetch('//evil')</script><img src='http://evil/x.png'>"
    (run_dir / "pages" / "table.html").write_text(hostile)
    read = Reader(page_of(run_dir))
    assert not {"script", "object", "form", "base", "a"} & {tag for tag, _ in read.tags}
    # a frame without rights, which takes over the policy of its page: tests/full tries it
    assert read.named("iframe") == [{"sandbox": None, "title": "table.html", "srcdoc": hostile}]
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("data:", "#"))
            elif not name.startswith("xmlns") and tag != "iframe":
                assert "//" not in (value or "")


def test_pictures_of_a_recipe_are_inside(run_dir):
    pages = run_dir / "pages"
    pages.mkdir()
    (pages / "1_sheet.png").write_bytes(PNG)
    (pages / "2_roc.svg").write_text(line_chart({"a": ([0, 1], [0, 1])}))
    sheet = Page("Contact sheet")
    sheet.table(["query"], [[Picture(PNG, "a shirt")]])
    sheet.write(pages / "3_sheet.html")
    (run_dir / "out.jpg").write_bytes(b"no picture at all")
    status = STATUS | {"outputs": [str(run_dir / "out.jpg"), "gone.png", str(run_dir / "last.pt")]}
    (run_dir / "status.json").write_text(json.dumps(status))
    page = page_of(run_dir)
    read = Reader(page)
    assert [image["alt"] for image in read.named("img")] == ["1_sheet", "2_roc"]
    assert [frame["srcdoc"] for frame in read.named("iframe")] == [sheet.render()]
    assert "Not shown: out.jpg: no PNG, JPEG or SVG" in page


def test_pages_of_an_evaluation_are_inside(run_dir):
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "sheet.html").write_text("<p>ten queries</p>")
    (run_dir / "evaluation" / "roc.svg").write_text("<svg/>")  # the pages hold it
    page = page_of(run_dir)
    (frame,) = Reader(page).named("iframe")
    assert frame["srcdoc"] == "<p>ten queries</p>" and "roc.svg" not in page


def test_a_refresh_never_raises_and_warns_once(run_dir, tmp_path, caplog):
    report.refresh(tmp_path / "no run")
    assert not caplog.records and not (tmp_path / "no run").exists()
    (run_dir / "report.html").mkdir()
    report.refresh(run_dir)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def charts(read: Reader) -> list[str | None]:
    return [figure["aria-label"] for figure in read.named("figure") if "aria-label" in figure]


def write_rows(run_dir: Path, rows: list[dict[str, object]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_quantity_is_one_chart_with_train_and_val(run_dir):
    read = Reader(page_of(run_dir))
    assert charts(read) == ["loss"]
    texts = read.texts["text"]
    assert texts.count("train") == texts.count("val") == 1


def test_a_loss_over_more_than_two_decades_has_a_logarithmic_axis_and_a_rate_never(run_dir):
    rows = [{"step": s, "split": "train", "loss": 10.0**-s, "lr": 10.0**-s} for s in range(5)]
    write_rows(run_dir, rows)
    page = page_of(run_dir)
    assert charts(Reader(page)) == ["loss", "lr"]
    loss, rate = page.split("<svg")[1:]
    assert ">0.001<" in loss and ">0.5<" not in loss
    assert ">0.5<" in rate or ">0.4<" in rate


def test_the_steps_at_which_a_stage_begins_are_marked(run_dir):
    rows = [
        {"step": s, "split": "train", "loss": 1.0 / s, "stage": 1 + s // 4} for s in range(1, 9)
    ]
    write_rows(run_dir, rows)
    read = Reader(page_of(run_dir))
    assert charts(read) == ["loss"]
    assert [text for text in read.texts["text"] if "stage" in text] == [" stage 2", " stage 3"]


def test_no_line_crosses_the_steps_without_a_value(run_dir):
    values = [1.0 / s if s not in (30, 31) else None for s in range(1, 61)]
    write_rows(run_dir, [{"step": s, "split": "train", "x": v} for s, v in enumerate(values)])
    styles = [(p.get("style") or "", p["d"]) for p in Reader(page_of(run_dir)).named("path")]
    (path,) = [d for style, d in styles if "fill: none" in style and "stroke: #2878c8" in style]
    assert path and path.count("M") == 2


def test_of_very_many_curves_the_first_are_drawn_and_the_rest_counted(run_dir):
    write_rows(run_dir, [{"step": s} | {f"x{n}": s * n for n in range(1, 31)} for s in (1, 2)])
    page = page_of(run_dir)
    assert len(charts(Reader(page))) == 24 and "Not shown: 6 more curves" in page


@pytest.mark.parametrize(
    ("train", "val"),
    [
        *(("loss", "val/loss"), ("train_loss", "val_loss"), ("train/loss", "loss")),
        ("Loss/Total", "val/loss"),
    ],
)
def test_they_stand_together_whatever_a_recipe_calls_them(run_dir, train, val):
    rows = [{"step": s, "split": "train", train: 1.0, "lr": 0.1 / s} for s in (1, 2)]
    rows += [{"step": s, "split": "val", val: 2.0} for s in (1, 2)]
    rows += [{"step": s, "split": "best", "loss": 2.0} for s in (1, 2)]
    write_rows(run_dir, rows)
    read = Reader(page_of(run_dir))
    assert charts(read) == ["loss", "lr"]
    assert read.texts["text"].count("train") == 1 == read.texts["text"].count("val")
    assert "best" not in read.texts["text"]


def test_what_never_changes_is_named_and_not_drawn(run_dir):
    rows = [{"step": s, "split": "train", "loss": 1.0 / s, "lr": 0.1, "clip": 0} for s in (1, 2)]
    write_rows(run_dir, rows)
    read = Reader(page_of(run_dir))
    assert charts(read) == ["loss"]
    assert "Never changed: clip 0, lr 0.1." in read.texts["p"]


def test_an_output_in_the_run_directory_is_named_from_there(run_dir):
    outputs = [str(run_dir / "best.pth"), "/elsewhere/x.pth"]
    (run_dir / "status.json").write_text(json.dumps(STATUS | {"outputs": outputs}))
    page = page_of(run_dir)
    assert "<td>best.pth</td>" in page and "<td>/elsewhere/x.pth</td>" in page


NOW = object()  # when the test runs, not when it is collected


@pytest.mark.parametrize(
    ("changes", "said", "kind"),
    [
        ({}, "Finished: 40 steps", "good"),
        (
            {"state": "failed", "exit_code": 1, "reason": "rank 1: RuntimeError: x"},
            "Failed (exit code 1): rank 1: RuntimeError: x",
            "bad",
        ),
        (
            {"state": "stopped", "exit_code": 143, "reason": "SIGTERM: saved at step 7"},
            "Stopped (exit code 143): SIGTERM: saved at step 7",
            "open",
        ),
        (
            {
                "state": "running",
                **processes.describe(os.getpid()),
                "eta_s": 200.0,
                "started_at": NOW,
                "updated_at": NOW,
            },
            "Still running when this page was written: at step 40 of 40, 0:03:20 left.",
            "open",
        ),
        (
            {"state": "running", "pid": 2**30, "host": socket.gethostname()},
            f"Stale: process {2**30} not found",
            "bad",
        ),
        (
            {"state": "running", "updated_at": NOW},  # on another host
            "Still running when this page was written",
            "open",
        ),
        ({"state": "running"}, "d ago, on elsewhere, whose processes cannot be seen", "bad"),
        ({"state": ["?"]}, "Stale: status.json is missing or not readable", "bad"),
    ],
)
def test_the_first_line_says_how_the_run_ended(tmp_path, changes, said, kind):
    changes = {name: status.now() if value is NOW else value for name, value in changes.items()}
    page = page_of(make_run(tmp_path / "run", **changes))
    read = Reader(page)
    assert said in "".join(read.texts["p"])
    assert {"class": f"banner {kind}"} in read.named("p")


def test_the_log_of_a_progress_bar_shows_what_was_left_standing(run_dir):
    (run_dir / "train.log").write_bytes(b"begun\n\r10%\r55%\rdone <b>\nlast\n")
    page = page_of(run_dir)
    assert "begun\ndone &lt;b&gt;\nlast" in page


@pytest.mark.parametrize("name", ["status.json", "config.json", "metrics.jsonl"])
def test_a_missing_file_is_named(run_dir, name):
    (run_dir / name).unlink()
    assert f"Not shown: {name} is missing." in page_of(run_dir)


def test_a_run_without_losses_has_no_metrics_to_miss(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "status.json").write_text(json.dumps(STATUS | {"last": {}}))
    assert "metrics.jsonl" not in page_of(run_dir)


@pytest.mark.parametrize("words", [["nowhere"], ["."]])
def test_no_run_is_one_line_and_exit_2(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tool.main(words) == 2
    written = capsys.readouterr()
    assert written.out == "" and written.err.startswith("error: ") and written.err.count("\n") == 1


def test_an_unwritable_page_is_one_line(run_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        report.write(run_dir, tmp_path / "file" / "page.html")


def test_a_day_of_steps_is_written_in_two_seconds(run_dir):
    row = {"step": 1, "epoch": 0, "split": "train", "time": 1.0, "loss": 0.5, "lr": 1e-3}
    with (run_dir / "metrics.jsonl").open("w") as lines:
        for step in range(20_000):
            lines.write(json.dumps(row | {"step": step, "loss": 1 / (step + 1)}) + "\n")
    began = time.process_time()
    page = page_of(run_dir)
    assert time.process_time() - began < 5.0  # measured: 1.5 s with matplotlib's import
    assert len(page) < 200_000


def test_flat_settings_have_dotted_names():
    assert settings.flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
