"""The crawler against a shop that is slow, cuts, lies and refuses."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lavic.src import crawl_images
from lavic.src.catalogue import Picture, read_pictures
from lavic.src.vision import fetch
from shared.errors import UserError
from tests.harness import ROOT, Outcome, free_port, run_here, start, wait_until
from tests.hub_server import (
    corrupted,
    cut,
    drop,
    forget_the_users_settings,
    hang,
    slow,
    stall,
    status,
    web_page,
)
from tests.picture_server import PictureServer, picture

SCRIPT = ROOT / "lavic" / "src" / "crawl_images.py"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_the_users_settings(monkeypatch)
    monkeypatch.setattr("lavic.src.crawl_images.FIRST_PAUSE", 0.01)


@pytest.fixture
def shop():
    with PictureServer({f"B{n:09d}_0.jpg": picture(n) for n in range(6)}) as server:
        yield server


def write_items(root: Path, shop: PictureServer, *, valid: int = 1) -> Path:
    """Both item files: all of the shop's pictures, the last `valid` for validation."""
    root.mkdir(parents=True, exist_ok=True)
    names = list(shop.files)
    train, val = names[: len(names) - valid], names[len(names) - valid :]
    items: dict[str, Any] = {}
    for name in train:
        asin, _, index = name.removesuffix(".jpg").rpartition("_")
        images = items.setdefault(asin, {"title": "T", "images": []})["images"]
        assert int(index) == len(images)
        images.append({"large": f"{shop.url}/images/I/{name}"})
    (root / "item2meta_train.json").write_text(json.dumps(items))
    lines = [{"title": "T", "image_name": n, "image": f"{shop.url}/images/I/{n}"} for n in val]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "item2meta_valid.jsonl").write_text(text)
    return root


def crawl(root: Path, *flags: object) -> Outcome:
    return run_here(crawl_images.main, ["--data-root", root, "--timeout", 20, *flags])


def failures(root: Path) -> dict[str, dict[str, Any]]:
    lines = (root / "crawl_failures.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["name"]: row for row in map(json.loads, lines)}


def there(root: Path, split: str = "train") -> dict[str, bytes]:
    found = {}
    for path in (root / f"{split}_images").glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):  # a temporary file has got its name meanwhile
            found[path.name] = path.read_bytes()
    return found


def test_both_splits_are_fetched_into_their_folders_as_they_came(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    outcome = crawl(root)
    assert outcome.code == 0, outcome.text
    assert there(root) | there(root, "valid") == shop.files
    assert list(there(root, "valid")) == ["B000000005_0.jpg"]
    assert "fetched 6, there before 0, failed 0 of 6" in outcome.text
    assert failures(root) == {}


def test_a_second_crawl_asks_for_nothing(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    crawl(root)
    shop.heal()
    outcome = crawl(root)
    assert outcome.code == 0 and shop.requests == []
    assert "fetched 0, there before 6" in outcome.text


def test_files_of_another_crawler_are_kept_when_they_are_whole(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    folder = root / "train_images"
    folder.mkdir()
    (folder / "B000000000_0.jpg").write_bytes(shop.files["B000000000_0.jpg"])
    (folder / "B000000001_0.jpg").write_bytes(shop.files["B000000001_0.jpg"][:400])
    (folder / "B000000002_0.jpg").write_bytes(b"")
    assert crawl(root).code == 0
    assert there(root) | there(root, "valid") == shop.files
    assert shop.times_asked("B000000000_0.jpg") == 0
    assert shop.times_asked("B000000001_0.jpg") == shop.times_asked("B000000002_0.jpg") == 1


def test_a_file_that_was_truncated_after_it_was_noted_is_fetched_again(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    crawl(root)
    path = root / "train_images" / "B000000003_0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    assert crawl(root).code == 0
    assert there(root)["B000000003_0.jpg"] == shop.files["B000000003_0.jpg"]


@pytest.mark.parametrize(
    ("fault", "timeout"),
    [
        *((fault, 20) for fault in (cut(200), drop, status(503), status(500))),
        (status(429, retry_after="0"), 20),
        (hang(8), 2),
    ],
    ids=["cut", "no answer", "503", "500", "429", "silent"],
)
def test_what_goes_away_is_tried_again(shop, tmp_path, fault, timeout):
    root = write_items(tmp_path / "data", shop)
    shop.misbehave("B000000001_0.jpg", fault)
    outcome = crawl(root, "--timeout", timeout)
    assert outcome.code == 0, outcome.text
    assert shop.times_asked("B000000001_0.jpg") == 2
    assert there(root)["B000000001_0.jpg"] == shop.files["B000000001_0.jpg"]


def test_a_length_that_lies_is_found_out(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    whole = shop.files["B000000001_0.jpg"]
    too_long = lambda answer: answer.headers.update({"Content-Length": str(len(whole) + 9)})  # noqa: E731
    too_short = lambda answer: answer.headers.update({"Content-Length": "500"})  # noqa: E731
    shop.misbehave("B000000001_0.jpg", lambda a: (too_long(a), cut(len(whole))(a))[0])
    shop.misbehave("B000000002_0.jpg", too_short)
    assert crawl(root).code == 0
    assert there(root) | there(root, "valid") == shop.files
    # what is left of a body in a connection that is kept may cost the next request there a try
    asked = [shop.times_asked(f"B00000000{number}_0.jpg") for number in (1, 2)]
    assert all(2 <= times <= 3 for times in asked), asked


def test_what_stays_broken_is_listed_with_its_reason_and_leaves_no_file(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    shop.misbehave("B000000000_0.jpg", cut(200), times=99)
    shop.misbehave("B000000001_0.jpg", web_page, times=99)
    shop.misbehave("B000000002_0.jpg", status(404), times=99)
    shop.misbehave("B000000003_0.jpg", status(503), times=99)
    shop.files["B000000004_0.jpg"] = b"<html>robot check</html>"
    outcome = crawl(root, "--retries", 2)
    assert outcome.code == 1
    assert there(root) == {} and len(there(root, "valid")) == 1
    found = failures(root)
    assert "connection lost" in found["B000000000_0.jpg"]["reason"]
    assert found["B000000001_0.jpg"]["reason"] == "answered with text/html, not a picture"
    assert found["B000000002_0.jpg"]["reason"] == "answered 404"
    assert found["B000000003_0.jpg"]["reason"] == "answered 503"
    assert "no whole picture: no picture" in found["B000000004_0.jpg"]["reason"]
    assert [found[n]["tries"] for n in sorted(found)] == [3, 1, 1, 3, 3]
    assert [found[n]["final"] for n in sorted(found)] == [False, True, True, False, False]
    assert "3 of them may come yet" in outcome.text


def test_pictures_gone_for_good_are_no_failure_of_the_crawl(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    shop.misbehave("B000000002_0.jpg", status(404), times=99)
    outcome = crawl(root)
    assert outcome.code == 0
    assert "fetched 5, there before 0, failed 1 of 6" in outcome.text


def test_a_placeholder_of_one_pixel_is_no_picture(shop, tmp_path):
    shop.files["B000000001_0.jpg"] = picture(1, "GIF", (1, 1))
    root = write_items(tmp_path / "data", shop)
    crawl(root)
    assert failures(root)["B000000001_0.jpg"]["reason"] == "1 x 1 pixels: a placeholder"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_other_formats_under_a_jpg_name_are_kept_as_they_came(shop, tmp_path, kind):
    shop.files["B000000001_0.jpg"] = picture(1, kind)
    shop.kind = "application/octet-stream"
    root = write_items(tmp_path / "data", shop)
    assert crawl(root).code == 0
    assert there(root)["B000000001_0.jpg"] == shop.files["B000000001_0.jpg"]


def test_a_damaged_picture_is_never_put_away(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    whole = shop.files["B000000001_0.jpg"]
    shop.files["B000000001_0.jpg"] = whole[:-100]
    crawl(root, "--retries", 0)
    assert "B000000001_0.jpg" not in there(root)
    shop.files["B000000001_0.jpg"] = whole
    assert crawl(root).code == 0
    assert there(root)["B000000001_0.jpg"] == whole


def test_retry_after_is_honoured_for_the_whole_host(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    shop.misbehave("B000000000_0.jpg", status(429, retry_after="1"))
    assert crawl(root, "--workers", 1).code == 0
    asked = [when for when, _ in shop.arrivals]
    assert shop.arrivals[0][1] == "B000000000_0.jpg"
    assert 1.0 <= asked[1] - asked[0] < 10.0


def test_a_host_that_asks_for_an_hour_is_left_alone(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    shop.misbehave("B000000000_0.jpg", status(503, retry_after="3600"))
    outcome = crawl(root, "--workers", 1)
    assert outcome.code == 1 and len(shop.requests) == 1
    assert "answered 503, and asks to wait 1:00:00" in failures(root)["B000000003_0.jpg"]["reason"]


def test_no_host_gets_more_than_its_limit_at_once(shop, tmp_path):
    shop.files |= {f"B{n:09d}_0.jpg": picture(n) for n in range(6, 30)}
    shop.delay = 0.05
    root = write_items(tmp_path / "data", shop)
    assert crawl(root, "--workers", 12, "--per-host", 3).code == 0
    assert shop.most_at_once == 3


def test_workers_fetch_at_the_same_time(shop, tmp_path):
    shop.files |= {f"B{n:09d}_0.jpg": picture(n) for n in range(6, 16)}
    shop.delay = 1.0  # long beside what a busy machine needs to send eight requests
    root = write_items(tmp_path / "data", shop)
    assert crawl(root, "--workers", 8).code == 0
    assert shop.most_at_once == 8


def test_a_host_that_stops_answering_has_a_rest_and_is_asked_again(shop, tmp_path, monkeypatch):
    root = write_items(tmp_path / "data", shop)
    monkeypatch.setattr(crawl_images, "OUTAGE", 1.5)
    original, asked = fetch.Fetcher.fetch, []

    def unreachable_for_a_while(self: fetch.Fetcher, url: str) -> bytes:
        asked.append(time.monotonic())
        if len(asked) == 3:
            raise fetch.UnreachableError("the shop", "no connection (refused)")
        return original(self, url)

    monkeypatch.setattr(fetch.Fetcher, "fetch", unreachable_for_a_while)
    outcome = crawl(root, "--workers", 1, "--per-host", 1)
    assert outcome.code == 0, outcome.text
    assert "does not answer: asked again in" in outcome.text
    assert there(root) | there(root, "valid") == shop.files
    assert max(b - a for a, b in itertools.pairwise(asked)) >= 1.4


def test_a_host_that_nobody_answers_for_is_given_up_at_once(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    items = {
        f"A{n:09d}": {"images": [{"large": f"http://127.0.0.1:{free_port()}/x.jpg"}]}
        for n in range(1)
    }
    port = free_port()
    items |= {f"C{n:09d}": {"images": [{"large": f"http://127.0.0.1:{port}/{n}.jpg"}]}
              for n in range(60)}  # fmt: skip
    (root / "item2meta_train.json").write_text(json.dumps(items))
    began = time.monotonic()
    outcome = crawl(root, "--per-host", 4)
    assert time.monotonic() - began < 30
    assert outcome.code == 1 and len(failures(root)) == 61
    assert f"127.0.0.1:{port} cannot be reached" in outcome.text
    assert len(there(root, "valid")) == 1


def test_a_picture_that_drips_does_not_hold_the_crawl_up(shop, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.hub_server._CHUNK", 16)
    root = write_items(tmp_path / "data", shop)
    shop.misbehave("B000000001_0.jpg", slow(60), times=99)
    outcome = crawl(root, "--timeout", 0.5, "--retries", 0)
    assert outcome.code == 1
    assert failures(root)["B000000001_0.jpg"]["reason"] == "too slow"


def test_one_split_alone_leaves_the_others_failures_in_the_list(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    shop.misbehave("B000000005_0.jpg", status(404), times=99)
    assert crawl(root, "--valid-only").code == 1  # nothing of it could be had
    assert not (root / "train_images").exists() and list(failures(root)) == ["B000000005_0.jpg"]
    assert crawl(root, "--train-only").code == 0
    assert list(failures(root)) == ["B000000005_0.jpg"]
    assert len(there(root)) == 5


def test_names_and_addresses_that_cannot_be_used_are_failures_not_files(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    bad = ["../evil.jpg", "", ".hidden.jpg", "a/b.jpg", "ok.jpg", "ok2.jpg"]
    urls = [f"{shop.url}/x/B000000000_0.jpg"] * 4 + ["file:///etc/passwd", "http://[::bad/x.jpg"]
    lines = [{"image_name": n, "image": u} for n, u in zip(bad, urls, strict=True)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "item2meta_valid.jsonl").write_text(text)
    outcome = crawl(root, "--valid-only")
    assert outcome.code == 1 and shop.requests == []
    assert failures(root)["../evil.jpg"]["reason"] == "its name is no plain file name"
    assert not (root / "evil.jpg").exists() and there(root, "valid") == {}


def test_the_pictures_of_an_item_are_numbered_as_they_stand(tmp_path):
    path = tmp_path / "items.json"
    images = [{"large": "http://a/1.jpg"}, {"large": None}, {"large": "http://a/3.jpg"}]
    items = {"0312345678": {"images": images}, "B1": {}, "B2": {"images": None}, "书": None}
    path.write_text("\ufeff" + json.dumps(items), encoding="utf-8")
    found = read_pictures("train", path)
    assert [picture.name for picture in found] == [
        "0312345678_0.jpg", "0312345678_1.jpg", "0312345678_2.jpg"
    ]  # fmt: skip
    assert found[0].problem is None
    assert found[1].problem == "it has no http address"


def test_blank_lines_byte_order_marks_and_crlf_are_taken_as_they_come(tmp_path):
    path = tmp_path / "items.jsonl"
    line = json.dumps({"image_name": "图_0.jpg", "image": "http://a/b.jpg"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n  \n" + line.encode())
    assert read_pictures("valid", path) == [Picture("valid", "图_0.jpg", "http://a/b.jpg")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"image_name": "x"}\n{"image_', "a.jsonl line 2 is no JSON"),
        ("a.jsonl", b'["x"]\n', "a.jsonl line 1 holds a list"),
        ("a.jsonl", b'\xff\xfe{"a": 1}\n', "a.jsonl line 1 is no UTF-8 text"),
        ("a.json", b'{"B1":\n {"images": [}', "a.json line 2 is no JSON"),
        ("a.json", b"[]", "holds a list, expected one dictionary"),
        ("a.json", b"{}", "names no picture"),
        ("a.csv", b"x", "end in .json"),
    ],
)
def test_a_bad_item_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_pictures("train", tmp_path / name)


def test_a_packed_item_file_is_named(tmp_path):
    (tmp_path / "item2meta_train.json.zip").write_bytes(b"PK")
    outcome = crawl(tmp_path)
    assert outcome.code == 2 and "still packed: unzip" in outcome.last_line


def test_two_crawls_of_one_directory_do_not_meet(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    from lavic.src.vision.picture_store import take_lock

    release = take_lock(root)
    outcome = crawl(root)
    release()
    assert outcome.code == 2 and "another crawl is at work" in outcome.last_line


def test_a_dry_run_counts_and_fetches_nothing(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    outcome = crawl(root, "--dry-run")
    assert outcome.code == 0 and shop.requests == []
    assert "train: 5 pictures, 0 files there" in outcome.text
    assert not (root / "train_images").exists()


def test_the_default_folders_are_the_recipes_whatever_the_cwd():
    assert crawl_images.Config().data_root == ROOT / "lavic" / "data"
    assert crawl_images.Config().item_files() == {
        "train": ROOT / "lavic" / "data" / "item2meta_train.json",
        "valid": ROOT / "lavic" / "data" / "item2meta_valid.jsonl",
    }


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_crawl_leaves_whole_files_and_goes_on(shop, tmp_path, number, code):
    shop.files |= {f"B{n:09d}_0.jpg": picture(n) for n in range(6, 60)}
    shop.delay = 0.1
    root = write_items(tmp_path / "data", shop)
    shop.misbehave("B000000001_0.jpg", stall(100, 30))
    with start([SCRIPT, "--data-root", root, "--workers", 2], NO_PROXY="127.0.0.1") as running:
        running.wait_for_text("to fetch")
        wait_until(lambda: len(there(root)) >= 5, "pictures", 60, running)
        running.signal(number)
        outcome = running.finish(15)
        assert running.leaves_nothing()
    assert outcome.code == code, outcome.text
    assert "the same command continues" in outcome.text
    fetched = there(root)
    assert 5 <= len(fetched) < 59
    assert all(content == shop.files[name] for name, content in fetched.items())
    shop.delay = 0.0
    shop.heal()
    assert crawl(root).code == 0
    assert there(root) | there(root, "valid") == shop.files
    assert sum(map(shop.times_asked, fetched)) == 0


@pytest.mark.slow
@pytest.mark.serial
def test_a_killed_crawl_leaves_no_half_file_under_a_pictures_name(shop, tmp_path):
    shop.files |= {f"B{n:09d}_0.jpg": picture(n, size=(400, 300)) for n in range(6, 40)}
    shop.delay = 0.02
    root = write_items(tmp_path / "data", shop)
    for count in (2, 9, 17):
        with start([SCRIPT, "--data-root", root, "--workers", 4], NO_PROXY="127.0.0.1") as running:
            wait_until(lambda count=count: len(there(root)) >= count, "pictures", 60, running)
            os.kill(running.pid, signal.SIGKILL)
            running.finish()
        whole = {n: c for n, c in there(root).items() if ".tmp." not in n}
        assert all(content == shop.files[name] for name, content in whole.items())
    assert crawl(root).code == 0
    assert there(root) | there(root, "valid") == shop.files  # and no temporary file


@pytest.mark.slow
@pytest.mark.serial
def test_a_full_disk_ends_the_crawl_with_one_line(shop, tmp_path):
    shop.files["B000000003_0.jpg"] = picture(3, "PNG", (400, 400))
    root = write_items(tmp_path / "data", shop)
    limit = "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limit += (
        " resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); sys.argv = sys.argv[1:];"
    )
    limit += " sys.path.insert(0, str(__import__('pathlib').Path(sys.argv[0]).parent));"
    limit += " runpy.run_path(sys.argv[0], run_name='__main__')"
    assert resource.RLIMIT_FSIZE
    command = ["-c", limit, SCRIPT, "--data-root", root, "--workers", 1]
    with start(command, program=[sys.executable], NO_PROXY="127.0.0.1") as running:
        outcome = running.finish(60)
    assert outcome.code == 1, outcome.text
    assert "File too large" in outcome.last_line
    assert "B000000003_0.jpg" not in there(root)
    assert all(content == shop.files[name] for name, content in there(root).items())


def test_corruption_within_a_png_is_noticed(shop, tmp_path):
    shop.files["B000000001_0.jpg"] = picture(1, "PNG")
    root = write_items(tmp_path / "data", shop)
    shop.misbehave("B000000001_0.jpg", corrupted, late=False)
    assert crawl(root).code == 0
    assert shop.times_asked("B000000001_0.jpg") == 2
    assert there(root)["B000000001_0.jpg"] == shop.files["B000000001_0.jpg"]
