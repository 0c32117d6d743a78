"""Fetching a file from an address: resumed, checked, in its place."""

import hashlib
import random

import pytest

from shared import fetched
from shared.errors import UserError
from shared.fetch import WEB_ADVICE, WebFile, fetch_all
from shared.fetched import Notes, is_there
from shared.transport import DownloadError, Line, Patience
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


def get(server, directory, name="a.zip", size: int | None = len(CONTENT), checksum=MD5):
    file = WebFile(name, size, checksum, f"{server.url}/cdn/{name}")
    fetch_all(Line(QUICK, {}, WEB_ADVICE), directory, [file], url_of=lambda file: file.url)
    return directory / name


def test_md5_is_checked_and_the_file_known_from_then_on(server, tmp_path, monkeypatch):
    assert get(server, tmp_path).read_bytes() == CONTENT
    monkeypatch.setattr(fetched, "checksum_of", lambda *_: pytest.fail("read again"))
    file = WebFile("a.zip", len(CONTENT), MD5, "")
    assert is_there(file, tmp_path, Notes(tmp_path))


def test_read_again_finds_damage_that_left_size_and_time_alone(server, tmp_path):
    path = get(server, tmp_path)
    file, status = WebFile("a.zip", len(CONTENT), MD5, ""), path.stat()
    path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    __import__("os").utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert is_there(file, tmp_path, Notes(tmp_path))
    assert not is_there(file, tmp_path, Notes(tmp_path), read_again=True)


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_cut_connections_are_continued_by_range(server, tmp_path, size):
    for place in (50_000, 60_000):
        server.misbehave("a.zip", hub_server.cut(place))
    assert get(server, tmp_path, size=size).read_bytes() == CONTENT
    assert server.asked("a.zip") == [None, "bytes=50000-", "bytes=110000-"]


def test_server_without_ranges_sends_all_again_and_the_bytes_are_right(server, tmp_path):
    server.misbehave("a.zip", hub_server.without_range, times=9, late=False)
    server.misbehave("a.zip", hub_server.cut(50_000))
    assert get(server, tmp_path, size=None).read_bytes() == CONTENT


def test_part_that_was_whole_when_the_process_died_is_taken(server, tmp_path):
    server.misbehave("a.zip", hub_server.cut(50_000))
    server.misbehave("a.zip", hub_server.status(404))
    with pytest.raises(UserError):
        get(server, tmp_path, size=None)
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    server.heal()
    assert get(server, tmp_path, size=None).read_bytes() == CONTENT
    assert server.sent("a.zip") == 0


def test_wrong_checksum_is_removed_and_said(server, tmp_path):
    server.misbehave("a.zip", hub_server.corrupted, late=False)
    with pytest.raises(DownloadError, match="wrong checksum and was removed"):
        get(server, tmp_path)
    assert not list(tmp_path.glob("a.zip*"))


@pytest.mark.parametrize("change", [hub_server.shortened, hub_server.lengthened])
def test_wrong_length_is_refused(server, tmp_path, change):
    server.misbehave("a.zip", change, times=9, late=False)
    with pytest.raises(DownloadError, match=r"bytes for a\.zip, which has 200,000"):
        get(server, tmp_path)


def test_without_a_checksum_a_cut_file_begins_anew(server, tmp_path):
    server.misbehave("list.csv", hub_server.cut(2))
    assert get(server, tmp_path, "list.csv", None, "").read_bytes() == b"a,b\n"
    assert server.asked("list.csv") == [None, None]


def test_a_web_page_in_place_of_the_file_is_refused(server, tmp_path):
    server.misbehave("a.zip", hub_server.web_page)
    with pytest.raises(DownloadError, match=r"sent a web page in place of a\.zip"):
        get(server, tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [(404, "the address may have changed"), (403, "it is not public, or no longer")],
)
def test_advice_is_that_of_the_web_and_names_no_hub(server, tmp_path, code, message):
    server.misbehave("a.zip", hub_server.status(code))
    with pytest.raises(UserError, match=message) as caught:
        get(server, tmp_path)
    assert "hf" not in str(caught.value).lower()


@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_server_is_asked_again(server, tmp_path, code):
    server.misbehave("a.zip", hub_server.status(code, retry_after="0"), times=2)
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_stalled_line_is_continued(server, tmp_path):
    server.misbehave("a.zip", hub_server.stall(70_000, 2.0))
    assert get(server, tmp_path).read_bytes() == CONTENT
