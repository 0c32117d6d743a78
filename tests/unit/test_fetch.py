"""Fetching a file from an address: resumed, checked, in its place."""

import hashlib
import json
import os
import random

import pytest

from shared.download import File, fetch, plan_of
from shared.errors import UserError
from shared.web import Client, DownloadError, Patience
from tests import hub_server
from tests.hub_server import HubServer

QUICK = Patience(contact=2.0, connect=1.0, silence=0.5, tries=3, pause=0.01, longest_wait=1.5)
CONTENT = random.Random(0).randbytes(200_000)
MD5 = "md5:" + hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


@pytest.fixture(autouse=True)
def _neutral(monkeypatch):
    hub_server.forget_the_users_settings(monkeypatch)


@pytest.fixture
def server():
    with HubServer({"a.zip": CONTENT, "list.csv": b"a,b\n"}, large=(".zip", ".csv")) as hub:
        yield hub


def get(server, directory, name="a.zip", size: int | None = len(CONTENT), checksum=MD5, header=""):
    file = File(name, size, checksum, (f"{server.url}/cdn/{name}",), header)
    fetch(Client("fetch it by hand", patience=QUICK), plan_of([file], directory))
    return directory / name


def test_read_again_finds_damage_that_left_size_and_time_alone(server, tmp_path):
    path = get(server, tmp_path)
    assert path.read_bytes() == CONTENT
    file, status = File("a.zip", len(CONTENT), MD5, ()), path.stat()
    path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert plan_of([file], tmp_path).present == [file]
    assert plan_of([file], tmp_path, read_again=True).missing == [file]


def test_a_file_of_unknown_size_is_continued_by_range(server, tmp_path):
    for place in (50_000, 60_000):
        server.misbehave("a.zip", hub_server.cut(place))
    assert get(server, tmp_path, size=None).read_bytes() == CONTENT
    assert server.asked("a.zip") == [None, "bytes=50000-", "bytes=110000-"]


def test_part_that_was_whole_when_the_process_died_is_taken(server, tmp_path):
    server.misbehave("a.zip", hub_server.cut(50_000))
    server.misbehave("a.zip", hub_server.status(404))
    with pytest.raises(UserError):
        get(server, tmp_path, size=None)
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    server.heal()
    assert get(server, tmp_path, size=None).read_bytes() == CONTENT
    assert server.sent("a.zip") == 0


def test_without_a_checksum_a_cut_file_begins_anew(server, tmp_path):
    server.misbehave("list.csv", hub_server.cut(2))
    assert get(server, tmp_path, "list.csv", None, "", "a,b").read_bytes() == b"a,b\n"
    assert server.asked("list.csv") == [None, None]


@pytest.mark.parametrize(
    ("code", "message"),
    [(404, "check its name, or fetch it by hand"), (403, "it is not public, or no longer")],
)
def test_advice_is_that_of_the_web_and_names_no_hub(server, tmp_path, code, message):
    server.misbehave("a.zip", hub_server.status(code))
    with pytest.raises(UserError, match=message) as caught:
        get(server, tmp_path)
    assert "hf" not in str(caught.value).lower()


def test_addresses_are_tried_in_order_and_the_part_of_the_first_is_continued(server, tmp_path):
    server.misbehave("a.zip", hub_server.cut(50_000))
    server.misbehave("a.zip", hub_server.status(404))
    urls = (f"{server.url}/cdn/a.zip", f"http://localhost:{server.port}/cdn/a.zip")
    file = File("a.zip", len(CONTENT), MD5, urls)
    fetch(Client("fetch it by hand", patience=QUICK), plan_of([file], tmp_path))
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert server.asked("a.zip") == [None, "bytes=50000-", "bytes=50000-"]


# --- files without a checksum ---------------------------------------------------------------------

PAGE = b"\n<!DOCTYPE html><html><title>Log in</title></html>"


HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
SAFETENSORS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(4)
KINDS = {  # file: what it may hold, and what shows that it is something else
    "x.json": (b'{"images": []}', [b"Log in", b'{"images": [', b"[" * 99_999, b""]),
    "x.csv": (b"a,b\n1,2\n", [b"Log in", b"b,c\n1,2\n", b""]),
    "x.safetensors": (SAFETENSORS, [b"Log in", SAFETENSORS[:20], b"\xff" * 40]),
    "x.pth": (b"PK\3\4", []),
}


@pytest.mark.parametrize("name", KINDS)
def test_without_a_checksum_the_content_shows_whether_it_is_the_file(server, tmp_path, name):
    right, wrong = KINDS[name]
    server.large = (*server.large, name)
    header = "a,b" if name.endswith(".csv") else ""
    for content in (PAGE, *wrong):
        server.files[name] = content
        with pytest.raises(DownloadError, match=f"{name} came from 127.0.0.1 with "):
            get(server, tmp_path, name, None, "", header)
        assert not list(tmp_path.glob(f"{name}*"))
    server.files[name] = right
    assert get(server, tmp_path, name, None, "", header).read_bytes() == right


def test_a_page_that_was_taken_for_the_file_is_replaced(server, tmp_path, caplog):
    (tmp_path / "list.csv").write_bytes(PAGE)
    assert get(server, tmp_path, "list.csv", None, "", "a,b").read_bytes() == b"a,b\n"
    assert "list.csv has a web page in place of its content" in caplog.text
