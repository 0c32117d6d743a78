"""vasevqa/filter: stops, kills and users' mistakes; rows 26 to 29 and 34 of the fault matrix."""

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared import lock
from shared.files import read_json_lines
from tests.harness import ROOT, run_here, start, status_of, wait_until
from tests.vase_filter_nano import pixels, write_clip, write_net, write_picture, write_views
from vasevqa.filter import classifier, clipfilter1
from vasevqa.filter.place import Item

FILTER = ROOT / "vasevqa" / "filter"
MANY = 600


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough pictures that a run can be met in the middle."""
    root = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(0)
    for number in range(MANY):
        Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(
            root / f"{number:05d}.png"
        )
    return root


def clip_flags(root, clip, tmp_path, out="out"):
    return [
        *("--input_dir", root, "--output_dir", tmp_path / out),
        *("--model_cache_dir", clip, "--cache_dir", tmp_path / "cache"),
        *("--workers", 0, "--batch_size", 1, "--threshold", 0),
    ]


def rows_in(out: Path) -> int:
    found = (path.read_bytes() for path in out.glob(".clipfilter1/scores*.jsonl"))
    return sum(content.count(b'\n{"filename"') for content in found)


def results(out: Path):
    return json.loads((out / "filtering_report.json").read_text())["results"]


def scored(root, clip, tmp_path, out="out"):
    """The results of a filter run to its end."""
    outcome = run_here(clipfilter1.main, clip_flags(root, clip, tmp_path, out))
    assert outcome.code == 0, outcome.text
    return results(tmp_path / out)


@pytest.fixture(scope="module")
def whole(many, clip, tmp_path_factory):
    """The results of a run that nothing happened to."""
    return scored(many, clip, tmp_path_factory.mktemp("whole"))


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.limit(240)
@pytest.mark.parametrize(
    ("number", "processes", "code"),
    [(signal.SIGTERM, 2, 143), (signal.SIGKILL, 1, -9)],
)
def test_a_filter_run_that_is_ended_goes_on_where_it_was(
    many, clip, whole, tmp_path, number, processes, code
):
    out, flags = tmp_path / "out", clip_flags(many, clip, tmp_path)
    with start([FILTER / "clipfilter1.py", *flags, "--nproc", processes]) as running:
        wait_until(lambda: rows_in(out) >= 50, "50 rows", running=running)
        running.signal(number)
        outcome = running.finish()
        assert running.leaves_nothing()
    assert outcome.code == code, outcome.text
    assert 50 <= rows_in(out) < MANY
    if code > 0:
        status = status_of(out / ".clipfilter1")
        assert (status["state"], status["exit_code"]) == ("stopped", code)
        assert "the same command continues it" in status["reason"]
        assert not (out / "filtering_report.json").exists()
    assert scored(many, clip, tmp_path) == whole
    assert MANY <= rows_in(out) <= MANY + 1  # no row twice, but for a torn one


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.limit(240)
def test_a_kill_while_files_are_placed_leaves_no_half_file(many, clip, whole, tmp_path):
    out, flags = tmp_path / "out", clip_flags(many, clip, tmp_path)
    count = lambda: sum(len(list(out.glob(f"{f}/*"))) for f in ("accepted", "rejected"))  # noqa: E731
    with start([FILTER / "clipfilter1.py", *flags]) as running:
        wait_until(lambda: count() >= 20, "20 placed files", running=running)
        running.signal(signal.SIGKILL)
        running.finish()
    assert scored(many, clip, tmp_path) == whole
    for row in whole:
        folder = "accepted" if row["accepted"] else "rejected"
        copy = out / folder / row["filename"]
        assert copy.read_bytes() == (many / row["filename"]).read_bytes()
    assert count() == MANY  # and nothing beside them, no temporary file


# --- what users do wrong --------------------------------------------------------------------------


def test_two_runs_in_one_output_directory_are_refused(clip, tmp_path):
    root = write_views(tmp_path / "in", 1, 1)
    state = tmp_path / "out" / ".clipfilter1"
    state.mkdir(parents=True)
    (state / "status.json").write_text(json.dumps({"pid": os.getpid()}))
    held = lock.take(state)
    try:
        outcome = run_here(clipfilter1.main, clip_flags(root, clip, tmp_path))
    finally:
        os.close(held)
    assert outcome.code == 2 and "in use by a live run" in outcome.last_line


# --- pictures of every kind -----------------------------------------------------------------------


def write_corrupt(root: Path) -> set[str]:
    """One file of each kind that gives no picture."""
    whole = io.BytesIO()
    Image.fromarray(pixels(1, 200)).save(whole, "JPEG")
    (root / "cut.jpg").write_bytes(whole.getvalue()[:120])
    (root / "empty.jpg").write_bytes(b"")
    (root / "page.jpg").write_bytes(b"<html>404</html>")
    (root / "zeros.png").write_bytes(bytes(500))
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    Image.new("1", (14000, 14000)).save(root / "bomb.png")  # 196 million pixels in 24 kB
    return {"cut.jpg", "empty.jpg", "page.jpg", "zeros.png", "dangling.png", "bomb.png"}


def test_fault_26_and_27_what_is_no_picture_is_set_aside_with_its_reason(clip, tmp_path):
    root = write_views(tmp_path / "in", 4, 3)
    bad = write_corrupt(root)
    scored(root, clip, tmp_path)
    report = json.loads((tmp_path / "out" / "filtering_report.json").read_text())
    reasons = {row["filename"]: row["reason"] for row in report["unreadable"]}
    assert set(reasons) == bad and len(report["results"]) == 12 and report["total_images"] == 18
    assert "pixels" in reasons["bomb.png"] and "empty" in reasons["empty.jpg"]
    assert "<html>" in reasons["page.jpg"] and all(reasons.values())
    net = write_net(tmp_path / "model.pth")
    flags = ["--source_dir", root, "--target_dir", tmp_path / "images3", "--model_path", net]
    outcome = run_here(classifier.main, [*flags, "--workers", 0])
    assert outcome.code == 0, outcome.text
    report = json.loads((tmp_path / "images3" / "classification_report.json").read_text())
    assert {row["filename"] for row in report["results"] if row["reason"]} == bad


def test_fault_27_too_many_of_them_stop_the_run(clip, tmp_path):
    root = write_views(tmp_path / "in", 1, 2)
    write_corrupt(root)
    outcome = run_here(clipfilter1.main, clip_flags(root, clip, tmp_path))
    assert outcome.code == 2
    assert "6 of 8 files cannot be read, more than --max_unreadable 0.5" in outcome.last_line
    assert not (tmp_path / "out" / "accepted").exists()


def test_fault_28_pictures_of_every_mode_are_scored(clip, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    image = Image.fromarray(pixels(2))
    for mode, name in (("CMYK", "c.jpg"), ("LA", "la.png"), ("P", "p.png"), ("L", "l.tiff"),
                       ("RGBA", "a.webp"), ("1", "b.bmp")):  # fmt: skip
        image.convert(mode).save(root / name)
    Image.fromarray(pixels(2)[..., 0].astype(np.uint16) * 257).save(root / "deep.png")
    Image.fromarray(pixels(2)[:1, :1]).save(root / "one.png")
    image.save(root / "CASE.JPG".replace("CASE", "case"), "JPEG")
    exif = image.getexif()
    exif[0x0112] = 6  # lies on its side
    image.save(root / "turned.Jpeg", "JPEG", exif=exif)
    assert len(scored(root, clip, tmp_path)) == 10


def test_fault_34_any_path_works_and_none_is_executed(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "花瓶 it's $(touch pwned)" / "-rf"
    for name in ("-n.png", "a b.png", "数据/$(touch pwned).png", 'q"uote.png', "new\nline.png"):
        write_picture(root / name, len(name))
    out = tmp_path / "出 $(touch pwned)"
    assert len(scored(root, clip, tmp_path, out.name)) == 5
    placed = [p for folder in ("accepted", "rejected") for p in (out / folder).rglob("*.png")]
    assert {p.name for p in placed} == {p.name for p in root.rglob("*.png")}
    assert not (tmp_path / "pwned").exists() and not (FILTER / "pwned").exists()


def test_a_name_that_is_no_utf8_is_left_out_and_named(clip, tmp_path):
    root = write_views(tmp_path / "in", 1, 2)
    (root / os.fsdecode(b"\xff\xfe.png")).write_bytes((next(root.rglob("*.jpg"))).read_bytes())
    outcome = run_here(clipfilter1.main, clip_flags(root, clip, tmp_path))
    assert outcome.code == 0, outcome.text
    assert r"left out: \xff\xfe.png (its name is not UTF-8" in outcome.text
    assert len(results(tmp_path / "out")) == 2


def write_rows(path: Path, count: int) -> Iterator[int]:
    """Rows of that many files; yields their keys."""
    with path.open("w") as lines:
        for n in range(count):
            item = Item(f"tray {n % 97}/{n:08d}.jpg", 9, n)
            score = {"content": f"{n:032x}", "score": n % 1009 / 1009, "high": 0.5, "low": 0.1}
            print(json.dumps(item.row | score | {"prompts": [0.123456] * 16}), file=lines)
            yield item.key


@pytest.mark.full
@pytest.mark.limit(600)
def test_a_million_rows_are_decided_and_reported_within_a_minute_and_500_megabytes(tmp_path):
    keys = np.fromiter(write_rows(tmp_path / "scores.jsonl", 1_000_000), np.uint64)
    np.save(tmp_path / "keys.npy", keys)
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "import numpy as np; from vasevqa.filter import clip, clipfilter1, place\n"
        "out = Path(sys.argv[2]); keys = np.load(out / 'keys.npy')\n"
        "table = place.Table(out / 'scores.jsonl', keys, ('score', 'high', 'low'))\n"
        "table.decide(.5, 'accepted', 'rejected'); table.find_duplicates('accepted')\n"
        "cfg = clipfilter1.Config(input_dir=out / 'in', output_dir=out)\n"
        "prompts = clip.Prompts(('a',), ('b',))\n"
        "clipfilter1.write_reports(cfg, table, prompts, (.5, 'typed'), 1.0)\n"
        "peak = Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]\n"
        "print(time.process_time(), int(peak) / 1024)\n"
    )
    with start(["-c", code, ROOT, tmp_path]) as running:
        outcome = running.finish(timeout=500)
    assert outcome.code == 0, outcome.text
    seconds, megabytes = map(float, outcome.last_line.split())  # of the processor
    assert seconds < 60 and megabytes < 500, outcome.last_line
    lines = tmp_path / "filtering_report.jsonl"
    assert sum(1 for _ in lines.open()) == 1_000_000
    assert next(read_json_lines(lines))["filename"] == "tray 0/00000000.jpg"
