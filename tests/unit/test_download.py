"""Fetching the files of a Hub repository from a server that misbehaves.

What ends in a whole file, and what in one line, shows tests/recipes/test_download_weight.py.
"""

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest

from face_distill.download_weight import weight_files
from shared import download, progress, web
from shared.errors import UserError
from shared.hub import Repository, open_hub
from shared.web import DownloadError, Patience
from tests import hub_server
from tests.harness import ROOT, free_port, wait_until
from tests.hub_server import COMMIT, REPO_ID, HubServer

QUICK = Patience(contact=2.0, connect=1.0, silence=0.5, tries=3, pause=0.01, longest_wait=1.5)
CONFIG = b'{"model_type": "blip-2"}\n'
WEIGHTS = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(50_000)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARD = SHARDS[0]
INDEX = "model.safetensors.index.json"
WEIGHT_MAP = {"vision_model.a": SHARD, "qformer.b": SHARD, "language_model.c": SHARDS[1]}
ALWAYS = 99


@pytest.fixture(autouse=True)
def _neutral(monkeypatch):
    hub_server.forget_the_users_settings(monkeypatch)
    monkeypatch.setattr(web, "PATIENCE", QUICK)


@pytest.fixture
def hub():
    files = {
        "config.json": CONFIG,
        INDEX: json.dumps({"weight_map": WEIGHT_MAP}).encode(),
        SHARD: WEIGHTS,
        SHARDS[1]: OTHER,
        "pytorch_model.bin": b"pickled",
    }
    with HubServer(files) as server:
        yield server


def opened(hub: HubServer, revision: str = COMMIT) -> Repository:
    return open_hub(REPO_ID, revision, endpoint=hub.url)


def fetch(hub: HubServer, directory, *names: str) -> None:
    repository = opened(hub)
    repository.fetch(repository.plan(names, directory))


def tower(hub: HubServer, directory) -> None:
    """Fetch config and shards of the tower, as a recipe does."""
    repository = opened(hub)
    names = ["config.json", *weight_files(repository, "vision_model.")]
    repository.fetch(repository.plan(names, directory))


def broken_off(hub: HubServer, directory) -> int:
    """Fetch the shard until its connection is cut for good; the bytes that are there."""
    hub.misbehave(SHARD, hub_server.cut(120_000))
    hub.misbehave(SHARD, hub_server.drop, times=ALWAYS)
    with pytest.raises(DownloadError):
        fetch(hub, directory, SHARD)
    hub.heal()
    return (directory / (SHARD + download.PART)).stat().st_size


def names_in(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


def without_shards(hub: HubServer) -> None:
    for name in (INDEX, *SHARDS):
        del hub.files[name]


# --- what is fetched ------------------------------------------------------------------------------


def test_the_shards_follow_the_index_and_not_their_numbers(hub):
    moved = {"vision_model.a": SHARDS[1], "vision_model.b": SHARDS[1], "qformer.c": SHARD}
    hub.files[INDEX] = json.dumps({"weight_map": moved}).encode()
    assert weight_files(opened(hub), "vision_model.") == [INDEX, SHARDS[1]]


def test_a_repository_with_one_safetensors_file_gives_that(hub):
    without_shards(hub)
    hub.files["model.safetensors"] = WEIGHTS
    assert weight_files(opened(hub), "vision_model.") == ["model.safetensors"]


def test_pickled_weights_are_never_taken(hub):
    without_shards(hub)
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, which is pickled"):
        weight_files(opened(hub), "vision_model.")


def test_every_request_names_the_revision_and_a_branch_is_pinned_to_its_commit(hub, tmp_path):
    repository = opened(hub, revision="main")
    repository.fetch(repository.plan(["config.json", SHARD], tmp_path))
    paths = [request.path for request in hub.requests if "/cdn/" not in request.path]
    assert paths == [
        f"/api/models/{REPO_ID}/revision/main",
        f"/{REPO_ID}/resolve/{COMMIT}/config.json",
        f"/{REPO_ID}/resolve/{COMMIT}/{SHARD}",
    ]
    assert hub.requests[0].query == "blobs=true"


def test_the_token_goes_to_the_hub_alone_and_only_where_it_is_wanted(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    tower(hub, tmp_path / "from a mirror")
    assert hub.requests
    assert not any("authorization" in request.headers for request in hub.requests)
    hub.heal()
    monkeypatch.setattr("shared.hub.OFFICIAL_ENDPOINT", hub.url)
    tower(hub, tmp_path / "from the Hub")
    sent = {
        "/cdn/" in request.path: request.headers.get("authorization") for request in hub.requests
    }
    assert sent == {False: "Bearer hf_secret", True: None}
    hub.heal()
    open_hub(REPO_ID, COMMIT, endpoint=hub.url, send_token=False)
    assert "authorization" not in hub.requests[0].headers


def test_a_file_without_content_and_one_in_a_folder_are_fetched_too(hub, tmp_path):
    more = {"empty.txt": b"", "sub/part.json": b"[]", "empty.bin": b""}
    hub.files |= more
    fetch(hub, tmp_path, *more)
    assert {name: (tmp_path / name).read_bytes() for name in more} == more


# --- what is there already ------------------------------------------------------------------------


def test_a_file_changed_after_it_was_verified_is_checked_and_fetched_again(hub, tmp_path):
    fetch(hub, tmp_path, SHARD)
    path = tmp_path / SHARD
    path.write_bytes(WEIGHTS[:-1] + b"?")
    os.utime(path, ns=(1, 1))
    fetch(hub, tmp_path, SHARD)
    assert path.read_bytes() == WEIGHTS
    assert hub.asked(SHARD) == [None, None]


# --- interruptions --------------------------------------------------------------------------------


def test_a_cut_connection_continues_where_it_broke(hub, tmp_path):
    hub.misbehave(SHARD, hub_server.cut(100_000))
    hub.misbehave(SHARD, hub_server.cut(50_000))
    fetch(hub, tmp_path, SHARD)
    assert (tmp_path / SHARD).read_bytes() == WEIGHTS
    ranges = [range_ or "bytes=0-" for range_ in hub.asked(SHARD)]
    starts = [int(range_.removeprefix("bytes=").rstrip("-")) for range_ in ranges]
    assert len(starts) == 3
    assert starts[0] == 0 < starts[1] <= 100_000
    assert starts[1] < starts[2] <= starts[1] + 50_000


def test_any_number_of_cuts_ends_well_as_long_as_bytes_arrive(hub, tmp_path):
    hub.misbehave(SHARD, hub_server.cut(40_000), times=50)
    fetch(hub, tmp_path, SHARD)
    assert (tmp_path / SHARD).read_bytes() == WEIGHTS
    assert len(hub.asked(SHARD)) > 2 * QUICK.tries


def test_a_server_without_range_that_always_cuts_is_given_up(hub, tmp_path):
    hub.misbehave(SHARD, hub_server.without_range, times=ALWAYS, late=False)
    hub.misbehave(SHARD, hub_server.cut(100_000), times=ALWAYS)
    with pytest.raises(DownloadError, match="3 times in a row"):
        fetch(hub, tmp_path, SHARD)
    assert not (tmp_path / SHARD).exists()


def test_the_next_call_continues_the_part_file_of_the_last(hub, tmp_path, monkeypatch):
    size = broken_off(hub, tmp_path)
    assert 0 < size < len(WEIGHTS)
    assert opened(hub).plan([SHARD], tmp_path).remaining == len(WEIGHTS) - size
    has_room_for(monkeypatch, len(WEIGHTS) - size)  # for the missing part alone
    fetch(hub, tmp_path, SHARD)
    assert hub.asked(SHARD) == [f"bytes={size}-"]
    assert hub.sent(SHARD) == len(WEIGHTS) - size
    assert (tmp_path / SHARD).read_bytes() == WEIGHTS


@pytest.mark.parametrize("whose", ["another version's", "another program's"])
def test_a_part_file_of_something_else_is_not_continued(hub, tmp_path, whose):
    if whose == "another version's":
        broken_off(hub, tmp_path)
        hub.files[SHARD] = OTHER + WEIGHTS
    else:
        (tmp_path / (SHARD + download.PART)).write_bytes(b"of some other program")
    fetch(hub, tmp_path, SHARD)
    assert hub.asked(SHARD) == [None]
    assert (tmp_path / SHARD).read_bytes() == hub.files[SHARD]


KILLED = f"""
import sys
from pathlib import Path
from shared.hub import open_hub
url, directory, name = sys.argv[1:]
repository = open_hub({REPO_ID!r}, {COMMIT!r}, endpoint=url)
repository.fetch(repository.plan([name], Path(directory)))
"""


def test_fault_33_a_killed_download_is_continued(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.stall(200_000, 60))
    command = [sys.executable, "-c", KILLED, hub.url, str(tmp_path), SHARDS[0]]
    part = tmp_path / (SHARDS[0] + download.PART)
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        wait_until(lambda: part.exists() and part.stat().st_size > 100_000, "half of the file")
        process.kill()
    size = part.stat().st_size
    assert not (tmp_path / SHARDS[0]).exists()
    hub.requests.clear()
    fetch(hub, tmp_path, SHARDS[0])
    assert hub.asked(SHARDS[0]) == [f"bytes={size}-"]
    assert hub.sent(SHARDS[0]) == len(WEIGHTS) - size
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS


# --- busy and silent servers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["api", SHARD, f"redirect {SHARD}"])
def test_a_busy_server_is_asked_again(hub, tmp_path, name):
    for code in (429, 500):
        hub.misbehave(name, hub_server.status(code))
    fetch(hub, tmp_path, SHARD)
    assert (tmp_path / SHARD).read_bytes() == WEIGHTS


def test_the_time_that_a_server_asks_for_is_waited(hub, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    hub.misbehave("api", hub_server.status(429, retry_after="1"))
    opened(hub)
    assert 1.0 in waited


def test_a_server_that_asks_for_too_long_is_named_with_its_time(hub):
    hub.misbehave("api", hub_server.status(429, retry_after="600"))
    said = r"127\.0\.0\.1: answered 429, and asks to wait 0:10:00"
    with pytest.raises(DownloadError, match=said):
        opened(hub)
    assert len(hub.requests) == 1


def test_retry_after_may_be_a_date():
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < (web.retry_after({"Retry-After": date}) or 0) <= 30
    assert web.retry_after({"Retry-After": "soon"}) is None


@pytest.mark.parametrize(("name", "code"), [("api", 401), ("api", 404), (SHARD, 403), (SHARD, 404)])
def test_a_refusal_is_final_and_the_users_to_mend(hub, tmp_path, name, code):
    hub.misbehave(name, hub_server.status(code), times=ALWAYS)
    with pytest.raises(UserError, match=str(code)) as caught:
        fetch(hub, tmp_path, SHARD)
    assert caught.value.exit_code == 2
    assert len(hub.of(SHARD) if name != "api" else hub.requests) == 1


def test_a_server_that_never_answers_is_named_in_time(hub, monkeypatch):
    monkeypatch.setattr(web, "PATIENCE", Patience(contact=0.5, pause=0.01))
    hub.misbehave("api", hub_server.hang(30), times=ALWAYS)
    began = time.monotonic()
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 cannot be reached \(no answer in time"):
        opened(hub)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("failed", "other"),
    [
        ("https://huggingface.co", "HF_ENDPOINT=https://hf-mirror.com"),
        ("https://hf-mirror.com/", "HF_ENDPOINT=https://huggingface.co"),
    ],
)
def test_the_source_that_failed_is_never_the_advice(monkeypatch, failed, other):
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    hub_server.close_session()
    with pytest.raises(DownloadError) as caught:
        open_hub(REPO_ID, COMMIT, endpoint=failed)
    hub_server.close_session()
    assert other in str(caught.value)
    assert f"HF_ENDPOINT={failed.rstrip('/')}" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://localhost:{nobody}/cdn/x", r"^localhost cannot be reached"),  # not the Hub
        (f"{{url}}/{REPO_ID}/resolve/{COMMIT}/{SHARD}", "in a circle"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_named(hub, tmp_path, address, said):
    address = address.format(url=hub.url, nobody=free_port())
    redirect = lambda answer: answer.headers.update(Location=address)  # noqa: E731
    hub.misbehave(f"redirect {SHARD}", redirect, times=ALWAYS)
    with pytest.raises(DownloadError, match=said):
        fetch(hub, tmp_path, SHARD)


def test_a_name_lookup_that_hangs_does_not_outlast_the_patience(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(8))
    monkeypatch.setattr(web, "PATIENCE", Patience(contact=0.5, pause=0.01))
    began = time.monotonic()
    with pytest.raises(DownloadError, match=r"nowhere\.example cannot be reached"):
        open_hub(REPO_ID, COMMIT, endpoint="http://nowhere.example")
    assert time.monotonic() - began < 7


def test_the_default_patience_fits_into_fifteen_seconds():
    assert Patience().contact <= 13  # and two to start Python and import


# --- wrong answers --------------------------------------------------------------------------------

ELSEWHERE = {"Content-Range": "bytes 0-299999/300000"}
WRONG = {  # what is said: what the server does, whether to the finished answer, and before it
    "came from .* wrong checksum": (hub_server.corrupted, False, None),
    r"sends 299999 bytes .* which has 300,000": (hub_server.shortened, False, None),
    "more than 300,000": (hub_server.lengthened, False, None),
    "a web page in place of": (hub_server.web_page, True, None),
    "sends bytes 0-299999/300000": (
        lambda answer: answer.headers.update(ELSEWHERE),
        True,
        hub_server.cut(100_000),
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_not_the_file_is_refused_and_not_left_there(hub, tmp_path, said):
    change, late, before = WRONG[said]
    if before:
        hub.misbehave(SHARD, before)
    hub.misbehave(SHARD, change, late=late)
    with pytest.raises(DownloadError, match=said):
        fetch(hub, tmp_path, SHARD)
    assert not (tmp_path / SHARD).exists()
    fetch(hub, tmp_path, SHARD)
    assert (tmp_path / SHARD).read_bytes() == WEIGHTS


def test_a_small_file_that_git_keeps_itself_is_checked_too(hub, tmp_path):
    hub.misbehave("config.json", hub_server.corrupted, late=False)
    with pytest.raises(DownloadError, match=r"config\.json came from .* wrong checksum"):
        fetch(hub, tmp_path, "config.json")
    assert names_in(tmp_path) <= {download.NOTES}


@pytest.mark.parametrize(
    "body",
    [b"<html>login</html>", b"[]", b"{}", b'{"id": "a/b", "siblings": [{}]}',
     b'{"id": "a/b", "siblings": [{"rfilename": "config.json"}]}'],
)  # fmt: skip
def test_another_answer_than_a_hubs_listing_is_refused(hub, body):
    hub.misbehave("api", lambda answer: setattr(answer, "body", body))
    with pytest.raises(DownloadError, match="did not answer as a Hugging Face Hub does"):
        opened(hub)


def test_a_mirror_with_another_commit_is_refused(hub):
    wrong = json.dumps(hub.listing() | {"sha": 40 * "1"}).encode()
    hub.misbehave("api", lambda answer: setattr(answer, "body", wrong))
    with pytest.raises(DownloadError, match="out of step"):
        opened(hub)


@pytest.mark.parametrize(
    "shard", ["../../x.safetensors", "/tmp/x", "..", "a\\b", ".download.json", "x\n", "", None, 3]
)
def test_an_index_that_leads_out_of_the_directory_is_refused(hub, shard):
    hub.files[INDEX] = json.dumps({"weight_map": {"vision_model.a": shard}}).encode()
    hub.files[str(shard)] = WEIGHTS
    with pytest.raises(UserError, match="leads out of the directory"):
        weight_files(opened(hub), "vision_model.")


def test_a_listing_that_leads_out_of_the_directory_is_refused(hub, tmp_path):
    hub.files["../stolen"] = b"x"
    with pytest.raises(UserError, match="leads out of the directory"):
        fetch(hub, tmp_path / "weights", "../stolen")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [b"<html>", b'{"weight_map": {}}'])
def test_an_index_without_the_tower_is_refused(hub, index):
    hub.files[INDEX] = index
    with pytest.raises(UserError, match=r"no readable weight_map|holds no weights whose names"):
        weight_files(opened(hub), "vision_model.")


# --- the user's mistakes, and the disk ------------------------------------------------------------


def test_a_missing_file_is_named_with_the_nearest(hub, tmp_path):
    with pytest.raises(UserError, match=r"holds no confg\.json; did you mean config\.json"):
        fetch(hub, tmp_path, "confg.json")


@pytest.mark.parametrize("repo_id", ["https://huggingface.co/a/b", "a/b/c", "", "a b"])
def test_what_is_no_repository_name_is_refused(hub, repo_id):
    with pytest.raises(UserError):
        open_hub(repo_id, "main", endpoint=hub.url)


@pytest.mark.parametrize("endpoint", ["ftp://x", "https://", "http://h:port", ""])
def test_what_is_no_web_address_is_refused_as_an_endpoint(endpoint):
    with pytest.raises(UserError, match=r"expected https://host"):
        open_hub(REPO_ID, "main", endpoint=endpoint)


def has_room_for(monkeypatch, size: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, size))


def test_a_disk_without_room_is_refused_before_the_first_byte(hub, tmp_path, monkeypatch):
    has_room_for(monkeypatch, len(WEIGHTS) - 1)
    with pytest.raises(UserError, match=r"300 kB are to be fetched, 1 bytes too many"):
        fetch(hub, tmp_path, SHARD)
    assert hub.fetched() == set()


def test_a_full_disk_is_said_in_one_line(hub, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match=r"is full: free some space; the same command"):
        fetch(hub, tmp_path, SHARD)


def test_a_write_that_fails_half_way_is_one_line_and_keeps_the_part(hub, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(DownloadError, match=r"cannot be used: .*File too large"):
            fetch(hub, tmp_path, SHARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / (SHARD + download.PART)).stat().st_size > 100_000


def test_a_second_download_waits_for_the_first_and_takes_what_it_brought(hub, tmp_path, caplog):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with caplog.at_level("INFO"), ThreadPoolExecutor(1) as threads:
        second = threads.submit(fetch, hub, tmp_path, "config.json")
        wait_until(lambda: f"at work in {tmp_path}: waiting" in caplog.text, "the second waits")
        (tmp_path / "config.json").write_bytes(CONFIG)
        os.close(handle)
        second.result(10)
    assert hub.asked("config.json") == []


# --- progress -------------------------------------------------------------------------------------


def test_a_log_gets_a_line_of_progress_with_speed_and_time_left(hub, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.0)
    with caplog.at_level("INFO"):
        fetch(hub, tmp_path, SHARD)
    lines = [line for line in caplog.messages if line.startswith(SHARD)]
    assert " of 300 kB, " in lines[0]
    assert lines[0].endswith(" left")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (999_999, "1 MB"),
     (9_985_123_456, "9.99 GB")],
)  # fmt: skip
def test_amounts_are_short(size, text):
    assert progress.amount(size) == text
