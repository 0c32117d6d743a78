"""The report page: what it shows equals the files, whatever state those are in."""

import json
import os
import socket
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shared import processes, report, status
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
    log = b"fine\nx | WARNING: 3 pictures <b>skipped\n\r10%\r55%\rdone <b>\nlast\n"
    (run_dir / "train.log").write_bytes(log)
    page = page_of(run_dir)
    assert "skipped\ndone &lt;b&gt;\nlast" in page  # of a progress bar what was left standing
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
    policy = next(m["content"] for m in read.named("meta") if "http-equiv" in m)
    assert policy and policy.startswith("default-src 'none'")
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
    evaluation = run_dir / "evaluation"
    evaluation.mkdir()
    (evaluation / "sheet.html").write_text("<p>ten queries</p>")
    (evaluation / "far.svg").write_text("<svg/>")  # its page holds it
    outputs = [str(run_dir / "out.jpg"), "gone.png", str(run_dir / "last.pt"), "/elsewhere/x.pth"]
    (run_dir / "status.json").write_text(json.dumps(STATUS | {"outputs": outputs}))
    page = page_of(run_dir)
    read = Reader(page)
    assert [image["alt"] for image in read.named("img")] == ["1_sheet", "2_roc"]
    frames = [frame["srcdoc"] for frame in read.named("iframe")]
    assert frames == [sheet.render(), "<p>ten queries</p>"]
    assert "Not shown: out.jpg: no PNG, JPEG or SVG" in page
    assert "far.svg" not in page
    assert "<td>last.pt</td>" in page and "<td>/elsewhere/x.pth</td>" in page


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


def test_a_loss_over_more_than_two_decades_has_a_logarithmic_axis_and_a_rate_never(run_dir):
    rows = [{"step": s, "split": "train", "loss": 10.0**-s, "lr": 10.0**-s} for s in range(5)]
    write_rows(run_dir, rows)
    page = page_of(run_dir)
    assert charts(Reader(page)) == ["loss", "lr"]
    loss, rate = page.split("<svg")[1:]
    assert ">0.001<" in loss and ">0.5<" not in loss
    assert ">0.5<" in rate or ">0.4<" in rate


@pytest.mark.slow
def test_charts_mark_stages_and_name_what_never_changes_and_what_is_left_out(run_dir):
    rows = [
        {"step": s, "loss": 1.0 / s, "lr": 0.1, "clip": 0, "stage": 1 + s // 4}
        | {f"x{n}": s * n for n in range(1, 31)}
        for s in range(1, 9)
    ]
    write_rows(run_dir, rows)
    read = Reader(page_of(run_dir))
    drawn = charts(read)
    assert drawn[0] == "loss" and len(drawn) == 24
    assert {text for text in read.texts["text"] if "stage" in text} == {" stage 2", " stage 3"}
    assert "Never changed: clip 0, lr 0.1." in read.texts["p"]
    assert "Not shown: 7 more curves of metrics.jsonl." in read.texts["p"]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        *(("loss", "val/loss"), ("train_loss", "val_loss"), ("train/loss", "loss")),
        ("Loss/Total", "val/loss"),
    ],
)
def test_train_and_val_stand_together_whatever_a_recipe_calls_them(run_dir, train, val):
    rows = [{"step": s, "split": "train", train: 1.0, "lr": 0.1 / s} for s in (1, 2)]
    rows += [{"step": s, "split": "val", val: 2.0} for s in (1, 2)]
    rows += [{"step": s, "split": "best", "loss": 2.0} for s in (1, 2)]
    write_rows(run_dir, rows)
    read = Reader(page_of(run_dir))
    assert charts(read) == ["loss", "lr"]
    assert read.texts["text"].count("train") == 1 == read.texts["text"].count("val")
    assert "best" not in read.texts["text"]


NOW = object()  # when the test runs, not when it is collected
LIVE = {"state": "running", **processes.describe(os.getpid())}


@pytest.mark.parametrize(
    ("changes", "said", "kind"),
    [
        ({}, "Finished: 40 steps", "good"),
        (
            {**LIVE, "eta_s": 200.0, "started_at": NOW, "updated_at": NOW},
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


@pytest.mark.parametrize("name", ["status.json", "config.json", "metrics.jsonl"])
def test_a_missing_file_is_named(run_dir, name):
    (run_dir / name).unlink()
    assert f"Not shown: {name} is missing." in page_of(run_dir)
    if name == "metrics.jsonl":  # a run without losses has none to miss
        (run_dir / "status.json").write_text(json.dumps(STATUS | {"last": {}}))
        assert "metrics.jsonl" not in page_of(run_dir)


@pytest.mark.parametrize(
    "words", [["nowhere"], ["."], ["a run", "--out", "file/page.html"]], ids=" ".join
)
def test_a_mistake_is_one_line_and_exit_2(words, capsys, run_dir, monkeypatch):
    monkeypatch.chdir(run_dir.parent)
    Path("file").touch()
    assert tool.main(words) == 2
    written = capsys.readouterr()
    assert written.out == "" and written.err.startswith("error: ") and written.err.count("\n") == 1
