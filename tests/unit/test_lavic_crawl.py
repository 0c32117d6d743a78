"""The crawler against a shop that is slow, cuts, lies and refuses."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lavic.src import crawl_images
from lavic.src.vision import fetch
from lavic.src.vision.picture_store import take_lock
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


def name(number: int) -> str:
    return f"B{number:09d}_0.jpg"


@pytest.fixture
def shop():
    with PictureServer({name(n): picture(n) for n in range(6)}) as server:
        yield server


def write_items(root: Path, shop: PictureServer) -> Path:
    """Both item files: all of the shop's pictures, the last one for validation."""
    root.mkdir(parents=True, exist_ok=True)
    *train, valid = shop.files
    items = {
        each.partition("_")[0]: {"images": [{"large": f"{shop.url}/{each}"}]} for each in train
    }
    (root / "item2meta_train.json").write_text(json.dumps(items))
    line = {"title": "T", "image_name": valid, "image": f"{shop.url}/images/I/{valid}"}
    (root / "item2meta_valid.jsonl").write_text(json.dumps(line) + "\n")
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


def everything(root: Path) -> dict[str, bytes]:
    return there(root) | there(root, "valid")


def test_pictures_are_kept_as_they_came_and_a_second_crawl_asks_for_nothing(shop, tmp_path):
    shop.files |= {name(n): picture(n, k) for n, k in enumerate(("PNG", "WEBP", "GIF"))}
    shop.kind = "application/octet-stream"
    root = write_items(tmp_path / "data", shop)
    planned = crawl(root, "--dry-run")
    assert planned.code == 0 and "train: 5 pictures, 0 files there" in planned.text
    assert shop.requests == [] and not (root / "train_images").exists()
    outcome = crawl(root)
    assert outcome.code == 0, outcome.text
    assert everything(root) == shop.files and list(there(root, "valid")) == [name(5)]
    assert "fetched 6, there before 0, failed 0 of 6" in outcome.text and failures(root) == {}
    shop.heal()
    outcome = crawl(root)
    assert outcome.code == 0 and shop.requests == []
    assert "fetched 0, there before 6" in outcome.text


def test_files_that_are_there_are_kept_when_they_are_whole(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    folder = root / "train_images"
    folder.mkdir()
    whole = shop.files[name(0)]
    (folder / name(0)).write_bytes(whole)  # of another crawler
    (folder / name(1)).write_bytes(shop.files[name(1)][:400])
    (folder / name(2)).write_bytes(b"")
    assert crawl(root).code == 0 and everything(root) == shop.files
    assert [shop.times_asked(name(n)) for n in range(3)] == [0, 1, 1]
    (folder / name(0)).write_bytes(whole[:300])  # after it was noted as whole
    assert crawl(root).code == 0 and everything(root) == shop.files


@pytest.mark.slow
def test_what_goes_away_is_tried_again(shop, tmp_path):
    shop.files |= {name(n): picture(n) for n in range(6, 10)} | {name(8): picture(8, "PNG")}
    root = write_items(tmp_path / "data", shop)
    faults = [cut(200), drop, hang(9), *map(status, (503, 500)), status(429, retry_after="0")]
    for number, fault in enumerate(faults):
        shop.misbehave(name(number), fault)
    size = len(shop.files[name(6)])  # a length that lies: too long, too short
    shop.misbehave(
        name(6), lambda a: (a.headers.update({"Content-Length": str(size + 9)}), cut(size)(a))
    )
    shop.misbehave(name(7), lambda a: a.headers.update({"Content-Length": "500"}))
    shop.misbehave(name(8), corrupted, late=False)
    outcome = crawl(root, "--timeout", 3)
    assert outcome.code == 0, outcome.text
    assert everything(root) == shop.files
    # what is left of a body in a connection that is kept may cost the next request there a try
    asked = [shop.times_asked(name(number)) for number in range(9)]
    assert all(2 <= times <= 3 for times in asked), asked


def test_what_stays_broken_is_listed_with_its_reason_and_leaves_no_file(shop, tmp_path):
    whole = dict(shop.files)
    shop.files |= {name(6): picture(6), name(7): picture(7)}
    root = write_items(tmp_path / "data", shop)
    for number, fault in enumerate((cut(200), web_page, status(404), status(503))):
        shop.misbehave(name(number), fault, times=99)
    bad = {4: b"<html>robot check</html>", 5: picture(5, "GIF", (1, 1)), 6: picture(6)[:-100]}
    shop.files |= {name(number): content for number, content in bad.items()}
    outcome = crawl(root, "--retries", 2)
    assert outcome.code == 1
    assert there(root) == {} and len(there(root, "valid")) == 1
    found = failures(root)
    assert [found[name(n)]["reason"] for n in range(1, 4)] == [
        "answered with text/html, not a picture", "answered 404", "answered 503"
    ]  # fmt: skip
    assert "connection lost" in found[name(0)]["reason"]
    assert "no whole picture: no picture" in found[name(4)]["reason"]
    assert found[name(5)]["reason"] == "1 x 1 pixels: a placeholder"
    assert "no whole picture" in found[name(6)]["reason"]
    assert [found[n]["tries"] for n in sorted(found)] == [3, 1, 1, 3, 3, 1, 3]
    kinds = [False, True, True, False, False, True, False]
    assert [found[n]["final"] for n in sorted(found)] == kinds
    assert "4 of them may come yet" in outcome.text
    shop.heal()
    shop.files |= whole | {name(6): picture(6)}
    assert crawl(root).code == 0
    assert everything(root) == shop.files and failures(root) == {}


def test_one_split_alone_leaves_the_others_failures_in_the_list(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    shop.misbehave(name(5), status(404), times=99)
    assert crawl(root, "--valid-only").code == 1  # nothing of it could be had
    assert not (root / "train_images").exists() and list(failures(root)) == [name(5)]
    assert crawl(root, "--train-only").code == 0
    assert list(failures(root)) == [name(5)] and len(there(root)) == 5
    outcome = crawl(root)  # what is gone for good is no failure of the crawl
    assert outcome.code == 0
    assert "fetched 0, there before 5, failed 1 of 6" in outcome.text


@pytest.mark.slow
def test_retry_after_is_honoured_for_the_whole_host(shop, tmp_path):
    """The second worker, which has pictures enough for the time, does not ask either."""
    shop.files |= {name(n): picture(n) for n in range(6, 12)}
    shop.delay = 0.2
    root = write_items(tmp_path / "data", shop)
    crawl(root, "--valid-only")  # what decodes pictures is loaded once
    shop.arrivals.clear()
    shop.misbehave(name(0), status(503, retry_after="1"))
    assert crawl(root, "--train-only", "--workers", 2).code == 0
    asked = [when for when, _ in shop.arrivals]
    assert 0.7 <= max(b - a for a, b in itertools.pairwise(asked)) < 10.0


def test_a_host_that_asks_for_an_hour_is_left_alone(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    shop.misbehave(name(0), status(503, retry_after="3600"))
    outcome = crawl(root, "--workers", 1)
    assert outcome.code == 1 and len(shop.requests) == 1
    assert "answered 503, and asks to wait 1:00:00" in failures(root)[name(3)]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pictures", "delay", "flags", "most"),
    [
        (30, 0.05, ["--workers", 12, "--per-host", 3], 3),
        (9, 2.0, ["--workers", 8], 8),  # long beside what a busy machine needs to send eight
    ],
)
def test_workers_fetch_at_the_same_time_within_their_limits(
    shop, tmp_path, pictures, delay, flags, most
):
    shop.files |= {name(n): picture(n) for n in range(pictures)}
    shop.delay = delay
    root = write_items(tmp_path / "data", shop)
    assert crawl(root, "--train-only", *flags).code == 0
    assert shop.most_at_once == most


def test_a_host_that_stops_answering_has_a_rest_and_is_asked_again(shop, tmp_path, monkeypatch):
    root = write_items(tmp_path / "data", shop)
    monkeypatch.setattr(crawl_images, "OUTAGE", 0.5)
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
    assert everything(root) == shop.files
    assert max(b - a for a, b in itertools.pairwise(asked)) >= 0.4


def test_a_host_that_nobody_answers_for_is_given_up_at_once(shop, tmp_path):
    root, port = write_items(tmp_path / "data", shop), free_port()
    urls = [f"http://127.0.0.1:{port}/{n}.jpg" for n in range(60)]
    items = {f"C{n:09d}": {"images": [{"large": url}]} for n, url in enumerate(urls)}
    (root / "item2meta_train.json").write_text(json.dumps(items))
    began = time.monotonic()
    outcome = crawl(root, "--per-host", 4)
    assert time.monotonic() - began < 30
    assert outcome.code == 1 and len(failures(root)) == 60
    assert f"127.0.0.1:{port} cannot be reached" in outcome.text
    assert len(there(root, "valid")) == 1


@pytest.mark.slow
def test_a_picture_that_drips_does_not_hold_the_crawl_up(shop, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.hub_server._CHUNK", 16)
    monkeypatch.setattr(fetch, "_PATIENCE", 2)
    root = write_items(tmp_path / "data", shop)
    shop.misbehave(name(1), slow(60), times=99)
    outcome = crawl(root, "--timeout", 0.5, "--retries", 0)
    assert outcome.code == 1
    assert failures(root)[name(1)]["reason"] == "too slow"


def test_names_and_addresses_that_cannot_be_used_are_failures_not_files(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    bad = ["../evil.jpg", "", ".hidden.jpg", "a/b.jpg", "ok.jpg", "ok2.jpg"]
    urls = [f"{shop.url}/x/{name(0)}"] * 4 + ["file:///etc/passwd", "http://[::bad/x.jpg"]
    lines = [{"image_name": n, "image": u} for n, u in zip(bad, urls, strict=True)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / "item2meta_valid.jsonl").write_text(text)
    outcome = crawl(root, "--valid-only")
    assert outcome.code == 1 and shop.requests == []
    assert failures(root)["../evil.jpg"]["reason"] == "its name is no plain file name"
    assert not (root / "evil.jpg").exists() and there(root, "valid") == {}


def test_a_packed_item_file_is_named(tmp_path):
    (tmp_path / "item2meta_train.json.zip").write_bytes(b"PK")
    outcome = crawl(tmp_path)
    assert outcome.code == 2 and "still packed: unzip" in outcome.last_line


def test_two_crawls_of_one_directory_do_not_meet(shop, tmp_path):
    root = write_items(tmp_path / "data", shop)
    release = take_lock(root)
    outcome = crawl(root)
    release()
    assert outcome.code == 2 and "another crawl is at work" in outcome.last_line


def test_the_default_folders_are_the_recipes_whatever_the_cwd():
    data = ROOT / "lavic" / "data"
    files = {"train": data / "item2meta_train.json", "valid": data / "item2meta_valid.jsonl"}
    assert crawl_images.Config().data_root == data
    assert crawl_images.Config().item_files() == files


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize(
    ("number", "code", "held"),
    [
        (signal.SIGTERM, 143, 30),
        (signal.SIGKILL, -9, 0),
        pytest.param(signal.SIGINT, 130, 0, marks=pytest.mark.full),
    ],
)
def test_a_crawl_that_was_ended_leaves_whole_files_and_goes_on(shop, tmp_path, number, code, held):
    """held: seconds for which the shop does not finish a picture that is on its way."""
    shop.files |= {name(n): picture(n, size=(400, 300)) for n in range(6, 60)}
    shop.delay = 0.1
    root = write_items(tmp_path / "data", shop)
    shop.misbehave(name(1), stall(100, held))
    with start([SCRIPT, "--data-root", root, "--workers", 4], NO_PROXY="127.0.0.1") as running:
        wait_until(lambda: len(there(root)) >= 5, "pictures", 60, running)
        running.signal(number)
        outcome = running.finish(15)
        assert running.leaves_nothing()
    assert outcome.code == code, outcome.text
    assert ("the same command continues" in outcome.text) is (code > 0)
    fetched = {n: content for n, content in there(root).items() if ".tmp." not in n}
    assert 5 <= len(fetched) < 59
    assert all(content == shop.files[each] for each, content in fetched.items())
    shop.delay = 0.0
    shop.heal()
    assert crawl(root).code == 0
    assert everything(root) == shop.files  # and no temporary file
    again = sum(map(shop.times_asked, fetched))
    assert again == 0 or code == -9


@pytest.mark.slow
@pytest.mark.serial
def test_a_full_disk_ends_the_crawl_with_one_line(shop, tmp_path):
    """No file may have more than 100 KB."""
    shop.files[name(3)] = picture(3, "PNG", (400, 400))
    root = write_items(tmp_path / "data", shop)
    program = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", sys.executable]
    command = [SCRIPT, "--data-root", root, "--workers", 1]
    with start(command, program=program, NO_PROXY="127.0.0.1") as running:
        outcome = running.finish(60)
    assert outcome.code == 1, outcome.text
    assert "File too large" in outcome.last_line
    assert name(3) not in there(root)
    assert all(content == shop.files[each] for each, content in there(root).items())
