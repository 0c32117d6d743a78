"""Fetching the files of a Hub repository from a server that misbehaves."""

import errno
import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
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
INDEX = "model.safetensors.index.json"
WEIGHT_MAP = {
    "vision_model.a": SHARDS[0],
    "qformer.b": SHARDS[0],
    "language_model.c": SHARDS[1],
}


@pytest.fixture(autouse=True)
def _neutral(monkeypatch):
    hub_server.forget_the_users_settings(monkeypatch)
    monkeypatch.setattr(web, "PATIENCE", QUICK)


@pytest.fixture
def hub():
    files = {
        "config.json": CONFIG,
        INDEX: json.dumps({"weight_map": WEIGHT_MAP}).encode(),
        SHARDS[0]: WEIGHTS,
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


def names_in(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


# --- what is fetched ------------------------------------------------------------------------------


def test_the_server_of_these_tests_is_a_hub_to_huggingface_hub_itself(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    path = huggingface_hub.hf_hub_download(
        REPO_ID, SHARDS[0], revision="main", endpoint=hub.url, local_dir=tmp_path, token=False
    )
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS
    assert path == str(tmp_path / SHARDS[0])


def test_only_the_shards_that_the_index_names_for_the_prefix_are_asked_for(hub, tmp_path):
    tower(hub, tmp_path)
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS
    assert (tmp_path / "config.json").read_bytes() == CONFIG
    assert names_in(tmp_path) == {"config.json", INDEX, SHARDS[0], download.NOTES}
    assert hub.fetched() == {"config.json", INDEX, SHARDS[0]}


def test_the_shards_follow_the_index_and_not_their_numbers(hub, tmp_path):
    moved = {"vision_model.a": SHARDS[1], "vision_model.b": SHARDS[1], "qformer.c": SHARDS[0]}
    hub.files[INDEX] = json.dumps({"weight_map": moved}).encode()
    assert weight_files(opened(hub), "vision_model.") == [INDEX, SHARDS[1]]


def test_a_repository_with_one_safetensors_file_gives_that(hub):
    for name in (INDEX, *SHARDS):
        del hub.files[name]
    hub.files["model.safetensors"] = WEIGHTS
    assert weight_files(opened(hub), "vision_model.") == ["model.safetensors"]


def test_pickled_weights_are_never_taken(hub):
    for name in (INDEX, *SHARDS):
        del hub.files[name]
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, which is pickled"):
        weight_files(opened(hub), "vision_model.")


def test_every_request_names_the_revision_and_a_branch_is_pinned_to_its_commit(hub, tmp_path):
    repository = opened(hub, revision="main")
    repository.fetch(repository.plan(["config.json", SHARDS[0]], tmp_path))
    paths = [request.path for request in hub.requests if "/cdn/" not in request.path]
    assert paths == [
        f"/api/models/{REPO_ID}/revision/main",
        f"/{REPO_ID}/resolve/{COMMIT}/config.json",
        f"/{REPO_ID}/resolve/{COMMIT}/{SHARDS[0]}",
    ]
    assert hub.requests[0].query == "blobs=true"


def test_a_mirror_is_never_given_the_users_token(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    tower(hub, tmp_path)
    assert hub.requests
    assert not any("authorization" in request.headers for request in hub.requests)


def test_the_hub_is_given_the_token_and_its_storage_is_not(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("shared.hub.OFFICIAL_ENDPOINT", hub.url)
    tower(hub, tmp_path)
    with_token = {
        "/cdn/" not in r.path: r.headers.get("authorization") for r in hub.requests
    }  # fmt: skip
    assert with_token == {True: "Bearer hf_secret", False: None}


def test_no_token_is_sent_when_the_user_wants_none(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("shared.hub.OFFICIAL_ENDPOINT", hub.url)
    open_hub(REPO_ID, COMMIT, endpoint=hub.url, send_token=False)
    assert "authorization" not in hub.requests[0].headers


def test_a_file_without_content_and_one_in_a_folder_are_fetched_too(hub, tmp_path):
    hub.files |= {"empty.txt": b"", "sub/part.json": b"[]", "empty.bin": b""}
    fetch(hub, tmp_path, "empty.txt", "sub/part.json", "empty.bin")
    assert (tmp_path / "empty.txt").read_bytes() == b""
    assert (tmp_path / "empty.bin").read_bytes() == b""
    assert (tmp_path / "sub" / "part.json").read_bytes() == b"[]"


# --- what is there already ------------------------------------------------------------------------


def test_what_is_there_is_not_fetched_again_and_read_only_once(hub, tmp_path, caplog):
    (tmp_path / SHARDS[0]).write_bytes(WEIGHTS)
    with caplog.at_level("INFO"):
        fetch(hub, tmp_path, SHARDS[0])
        fetch(hub, tmp_path, SHARDS[0])
    assert caplog.messages.count(f"checking {tmp_path / SHARDS[0]} (300 kB)") == 1
    assert hub.asked(SHARDS[0]) == []


def test_a_file_changed_after_it_was_verified_is_checked_and_fetched_again(hub, tmp_path):
    fetch(hub, tmp_path, SHARDS[0])
    path = tmp_path / SHARDS[0]
    path.write_bytes(WEIGHTS[:-1] + b"?")
    os.utime(path, ns=(1, 1))
    fetch(hub, tmp_path, SHARDS[0])
    assert path.read_bytes() == WEIGHTS
    assert hub.asked(SHARDS[0]) == [None, None]


def test_a_pointer_file_in_its_place_is_replaced(hub, tmp_path):
    (tmp_path / SHARDS[0]).write_text("version https://git-lfs.github.com/spec/v1\n")
    fetch(hub, tmp_path, SHARDS[0])
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS


def test_a_plan_says_what_is_missing_and_writes_nothing(hub, tmp_path):
    (tmp_path / "config.json").write_bytes(CONFIG)
    plan = opened(hub).plan(["config.json", SHARDS[0], SHARDS[0]], tmp_path)
    assert [file.name for file in plan.present] == ["config.json"]
    assert [file.name for file in plan.missing] == [SHARDS[0]]
    assert plan.remaining == len(WEIGHTS)
    assert names_in(tmp_path) == {"config.json"}


@pytest.mark.parametrize("notes", ["", "[]", '{"files": 3, "parts": [1]}', '{"files": {"x'])
def test_damaged_notes_cost_a_check_and_no_more(hub, tmp_path, notes):
    fetch(hub, tmp_path, SHARDS[0])
    (tmp_path / download.NOTES).write_text(notes)
    fetch(hub, tmp_path, SHARDS[0])
    assert hub.asked(SHARDS[0]) == [None]


# --- interruptions --------------------------------------------------------------------------------


def test_a_cut_connection_continues_where_it_broke(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.cut(100_000))
    hub.misbehave(SHARDS[0], hub_server.cut(50_000))
    fetch(hub, tmp_path, SHARDS[0])
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS
    first, second, third = (range_ or "bytes=0-" for range_ in hub.asked(SHARDS[0]))
    starts = [int(range_.removeprefix("bytes=").rstrip("-")) for range_ in (first, second, third)]
    assert starts[0] == 0 < starts[1] <= 100_000
    assert starts[1] < starts[2] <= starts[1] + 50_000


def test_any_number_of_cuts_ends_well_as_long_as_bytes_arrive(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.cut(20_000), times=50)
    fetch(hub, tmp_path, SHARDS[0])
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS
    assert len(hub.asked(SHARDS[0])) > 10 > QUICK.tries


def test_a_server_without_range_sends_all_again_and_the_file_is_right(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.without_range, times=9, late=False)
    hub.misbehave(SHARDS[0], hub_server.cut(100_000))
    fetch(hub, tmp_path, SHARDS[0])
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS


def test_a_server_without_range_that_always_cuts_is_given_up(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.without_range, times=99, late=False)
    hub.misbehave(SHARDS[0], hub_server.cut(100_000), times=99)
    with pytest.raises(DownloadError, match="3 times in a row"):
        fetch(hub, tmp_path, SHARDS[0])
    assert not (tmp_path / SHARDS[0]).exists()


def test_the_next_call_continues_the_part_file_of_the_last(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.cut(120_000))
    hub.misbehave(SHARDS[0], hub_server.drop, times=99)
    with pytest.raises(DownloadError):
        fetch(hub, tmp_path, SHARDS[0])
    size = (tmp_path / (SHARDS[0] + download.PART)).stat().st_size
    hub.heal()
    plan = opened(hub).plan([SHARDS[0]], tmp_path)
    assert plan.remaining == len(WEIGHTS) - size
    fetch(hub, tmp_path, SHARDS[0])
    assert hub.asked(SHARDS[0]) == [f"bytes={size}-"]
    assert hub.sent(SHARDS[0]) == len(WEIGHTS) - size
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS


def test_a_part_file_of_another_version_is_not_continued(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.cut(120_000))
    hub.misbehave(SHARDS[0], hub_server.drop, times=99)
    with pytest.raises(DownloadError):
        fetch(hub, tmp_path, SHARDS[0])
    hub.heal()
    hub.files[SHARDS[0]] = OTHER + WEIGHTS
    fetch(hub, tmp_path, SHARDS[0])
    assert hub.asked(SHARDS[0]) == [None]
    assert (tmp_path / SHARDS[0]).read_bytes() == OTHER + WEIGHTS


def test_a_part_file_that_nobody_knows_is_not_continued(hub, tmp_path):
    (tmp_path / (SHARDS[0] + download.PART)).write_bytes(b"of some other program")
    fetch(hub, tmp_path, SHARDS[0])
    assert hub.asked(SHARDS[0]) == [None]
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS


KILLED = """
import sys
from pathlib import Path
from shared.hub import open_hub
url, directory, name = sys.argv[1:]
repository = open_hub({repo!r}, {commit!r}, endpoint=url)
repository.fetch(repository.plan([name], Path(directory)))
"""


def test_killed_half_way_only_the_missing_bytes_are_asked_for_again(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.stall(200_000, 60))
    script = KILLED.format(repo=REPO_ID, commit=COMMIT)
    command = [sys.executable, "-c", script, hub.url, str(tmp_path), SHARDS[0]]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    part = tmp_path / (SHARDS[0] + download.PART)
    with subprocess.Popen(command, env=environ) as process:
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


@pytest.mark.parametrize("name", ["api", SHARDS[0], f"redirect {SHARDS[0]}"])
@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(hub, tmp_path, name, code):
    hub.misbehave(name, hub_server.status(code), times=2)
    fetch(hub, tmp_path, SHARDS[0])
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS


def test_the_time_that_a_server_asks_for_is_waited(hub, tmp_path):
    hub.misbehave("api", hub_server.status(429, retry_after="1"))
    began = time.monotonic()
    opened(hub)
    assert time.monotonic() - began >= 1.0


def test_a_server_that_asks_for_too_long_is_named_with_its_time(hub):
    hub.misbehave("api", hub_server.status(429, retry_after="600"))
    with pytest.raises(
        DownloadError, match=r"127\.0\.0\.1: answered 429, and asks to wait 0:10:00"
    ):
        opened(hub)
    assert len(hub.requests) == 1


def test_retry_after_may_be_a_date():
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < (web.retry_after({"Retry-After": date}) or 0) <= 30
    assert web.retry_after({"Retry-After": "soon"}) is None


def test_a_server_that_stays_busy_is_given_up_in_one_line(hub):
    hub.misbehave("api", hub_server.status(503), times=99)
    with pytest.raises(DownloadError, match="answered 503, 3 times in a row") as caught:
        opened(hub)
    assert caught.value.exit_code == 1
    assert len(hub.requests) == 3


@pytest.mark.parametrize("code", [401, 403, 404])
@pytest.mark.parametrize("name", ["api", SHARDS[0]])
def test_a_refusal_is_final_and_the_users_to_mend(hub, tmp_path, name, code):
    hub.misbehave(name, hub_server.status(code), times=99)
    with pytest.raises(UserError, match=str(code)) as caught:
        fetch(hub, tmp_path, SHARDS[0])
    assert caught.value.exit_code == 2
    assert len(hub.of(SHARDS[0]) if name != "api" else hub.requests) == 1


def test_a_connection_that_falls_silent_is_left_and_continued(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.stall(100_000, 5))
    fetch(hub, tmp_path, SHARDS[0])
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS
    assert hub.asked(SHARDS[0])[1].startswith("bytes=")


def test_a_slow_server_is_waited_for(hub, tmp_path):
    hub.misbehave("config.json", hub_server.slow(100))
    fetch(hub, tmp_path, "config.json")
    assert hub.asked("config.json") == [None]


def test_a_server_that_never_answers_is_named_in_time(hub):
    hub.misbehave("api", hub_server.hang(30), times=99)
    began = time.monotonic()
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 cannot be reached \(no answer in time"):
        opened(hub)
    assert time.monotonic() - began < QUICK.contact + 10


def test_without_a_network_the_host_and_the_way_out_are_named():
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(DownloadError, match=r"^127\.0\.0\.1 cannot .*HF_ENDPOINT=https://hf-m"):
        open_hub(REPO_ID, COMMIT, endpoint=endpoint)


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


def test_a_blocked_storage_is_named_and_not_the_hub_that_redirects_there(hub, tmp_path):
    hub.misbehave(
        f"redirect {SHARDS[0]}",
        lambda answer: answer.headers.update(Location=f"http://localhost:{free_port()}/cdn/x"),
        times=99,
    )
    with pytest.raises(DownloadError, match=r"^localhost cannot be reached"):
        fetch(hub, tmp_path, SHARDS[0])


def test_a_name_lookup_that_hangs_does_not_outlast_the_patience(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(8))
    monkeypatch.setattr(web, "PATIENCE", Patience(contact=0.5, pause=0.01))
    began = time.monotonic()
    with pytest.raises(DownloadError, match=r"nowhere\.example cannot be reached"):
        open_hub(REPO_ID, COMMIT, endpoint="http://nowhere.example")
    assert time.monotonic() - began < 7


def test_the_default_patience_fits_into_fifteen_seconds():
    assert Patience().contact <= 13  # and two to start Python and import


def test_a_circle_of_redirects_ends(hub, tmp_path):
    hub.misbehave(
        f"redirect {SHARDS[0]}",
        lambda answer: answer.headers.update(
            Location=f"{hub.url}/{REPO_ID}/resolve/{COMMIT}/{SHARDS[0]}"
        ),
        times=99,
    )
    with pytest.raises(DownloadError, match="in a circle"):
        fetch(hub, tmp_path, SHARDS[0])


def test_offline_means_that_nothing_is_asked(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE") as caught:
        opened(hub)
    assert caught.value.exit_code == 2
    assert hub.requests == []


# --- wrong answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", SHARDS[0]])
def test_wrong_content_is_removed_and_refused(hub, tmp_path, name):
    hub.misbehave(name, hub_server.corrupted, late=False)
    with pytest.raises(DownloadError, match=f"{name} came from .* wrong checksum"):
        fetch(hub, tmp_path, name)
    assert names_in(tmp_path) <= {download.NOTES}
    fetch(hub, tmp_path, name)
    assert (tmp_path / name).read_bytes() == hub.files[name]


def test_a_file_of_another_length_is_refused_before_its_bytes(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.shortened, late=False)
    with pytest.raises(DownloadError, match=r"sends 299999 bytes .* which has 300,000"):
        fetch(hub, tmp_path, SHARDS[0])
    assert not (tmp_path / SHARDS[0]).exists()


def test_a_file_that_does_not_end_is_refused(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.lengthened, late=False)
    with pytest.raises(DownloadError, match="more than 300,000"):
        fetch(hub, tmp_path, SHARDS[0])
    assert not (tmp_path / SHARDS[0]).exists()


def test_a_range_from_elsewhere_is_refused(hub, tmp_path):
    hub.misbehave(SHARDS[0], hub_server.cut(100_000))
    elsewhere = {"Content-Range": "bytes 0-299999/300000"}
    hub.misbehave(SHARDS[0], lambda answer: answer.headers.update(elsewhere))
    with pytest.raises(DownloadError, match="sends bytes 0-299999/300000"):
        fetch(hub, tmp_path, SHARDS[0])


@pytest.mark.parametrize("name", ["config.json", SHARDS[0]])
def test_a_web_page_in_place_of_a_file_is_refused(hub, tmp_path, name):
    hub.misbehave(name, hub_server.web_page)
    with pytest.raises(DownloadError, match=f"a web page in place of {name}"):
        fetch(hub, tmp_path, name)
    assert not (tmp_path / name).exists()


def test_a_web_page_in_place_of_the_listing_is_refused(hub):
    hub.misbehave("api", hub_server.web_page)
    with pytest.raises(DownloadError, match="did not answer as a Hugging Face Hub does"):
        opened(hub)


@pytest.mark.parametrize(
    "body",
    [b"[]", b"{}", b'{"id": "a/b", "siblings": [{}]}',
     b'{"id": "a/b", "siblings": [{"rfilename": "config.json"}]}'],
)  # fmt: skip
def test_a_listing_without_what_is_needed_is_refused(hub, body):
    hub.misbehave("api", lambda answer: setattr(answer, "body", body))
    with pytest.raises(DownloadError):
        opened(hub)


def test_a_mirror_with_another_commit_is_refused(hub):
    wrong = json.dumps(hub.listing() | {"sha": 40 * "1"}).encode()
    hub.misbehave("api", lambda answer: setattr(answer, "body", wrong))
    with pytest.raises(DownloadError, match="out of step"):
        opened(hub)


@pytest.mark.parametrize(
    "shard", ["../../x.safetensors", "/tmp/x", "..", "a\\b", ".download.json", "x\n", "", None, 3]
)
def test_an_index_that_leads_out_of_the_directory_is_refused(hub, tmp_path, shard):
    hub.files[INDEX] = json.dumps({"weight_map": {"vision_model.a": shard}}).encode()
    hub.files[str(shard)] = WEIGHTS
    with pytest.raises(UserError, match="leads out of the directory"):
        weight_files(opened(hub), "vision_model.")


def test_a_listing_that_leads_out_of_the_directory_is_refused(hub, tmp_path):
    hub.files["../stolen"] = b"x"
    with pytest.raises(UserError, match="leads out of the directory"):
        fetch(hub, tmp_path / "weights", "../stolen")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [b"<html>", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}'])
def test_an_index_without_the_tower_is_refused(hub, index):
    hub.files[INDEX] = index
    with pytest.raises(UserError, match=r"no readable weight_map|holds no weights whose names"):
        weight_files(opened(hub), "vision_model.")


# --- the user's mistakes --------------------------------------------------------------------------


def test_a_missing_file_is_named_with_the_nearest(hub, tmp_path):
    with pytest.raises(UserError, match=r"holds no confg\.json; did you mean config\.json"):
        fetch(hub, tmp_path, "confg.json")


def test_a_wrong_repository_and_a_wrong_revision_are_refused_at_once(hub):
    for repo_id, revision in (("owner/tinny", "main"), (REPO_ID, "v9")):
        with pytest.raises(UserError, match=f"{repo_id} at revision {revision} is not at"):
            open_hub(repo_id, revision, endpoint=hub.url)
    assert len(hub.requests) == 2


@pytest.mark.parametrize("repo_id", ["https://huggingface.co/a/b", "a/b/c", "", "a b"])
def test_what_is_no_repository_name_is_refused(hub, repo_id):
    with pytest.raises(UserError):
        open_hub(repo_id, "main", endpoint=hub.url)


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "ftp://x", "https://", "http://h:port", ""])
def test_what_is_no_web_address_is_refused_as_an_endpoint(endpoint):
    with pytest.raises(UserError, match=r"expected https://host"):
        open_hub(REPO_ID, "main", endpoint=endpoint)


def test_a_disk_without_room_is_refused_before_the_first_byte(hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, len(WEIGHTS) - 1))
    with pytest.raises(UserError, match=r"300 kB are to be fetched, 1 bytes too many"):
        fetch(hub, tmp_path, SHARDS[0])
    assert hub.fetched() == set()


def test_room_for_the_missing_part_is_enough(hub, tmp_path, monkeypatch):
    hub.misbehave(SHARDS[0], hub_server.cut(120_000))
    hub.misbehave(SHARDS[0], hub_server.drop, times=99)
    with pytest.raises(DownloadError):
        fetch(hub, tmp_path, SHARDS[0])
    hub.heal()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 200_000))
    fetch(hub, tmp_path, SHARDS[0])
    assert (tmp_path / SHARDS[0]).read_bytes() == WEIGHTS


def test_a_full_disk_is_said_in_one_line(hub, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match=r"is full: free some space; the same command"):
        fetch(hub, tmp_path, SHARDS[0])


def test_a_write_that_fails_half_way_is_one_line_and_keeps_the_part(hub, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    script = limit + KILLED.format(repo=REPO_ID, commit=COMMIT)
    command = [sys.executable, "-c", script, hub.url, str(tmp_path), SHARDS[0]]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert ended.stderr.splitlines()[-1].startswith("shared.web.DownloadError:")
    assert (tmp_path / (SHARDS[0] + download.PART)).stat().st_size > 100_000


def test_a_directory_that_cannot_be_is_refused(hub, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        fetch(hub, tmp_path / "file" / "weights", "config.json")


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
        fetch(hub, tmp_path, SHARDS[0])
    lines = [line for line in caplog.messages if line.startswith(SHARDS[0])]
    assert " of 300 kB, " in lines[0]
    assert lines[0].endswith(" left")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (999_999, "1 MB"),
        (9_985_123_456, "9.99 GB"),
    ],
)
def test_amounts_are_short(size, text):
    assert progress.amount(size) == text
