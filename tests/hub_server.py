"""A Hugging Face Hub of one repository on the loopback, which misbehaves when told to.

    with HubServer({"config.json": b"{}", "model.safetensors": weights}) as hub:
        hub.misbehave("model.safetensors", cut(1000))
        ...
        assert hub.asked("model.safetensors") == [None, "bytes=1000-"]

Large files are redirected to another host name, as the real Hub does to its storage.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub.utils import close_session

REPO_ID = "owner/tiny"
COMMIT = "c0ffee" + 34 * "0"
_CHUNK = 16 * 1024


@dataclass
class Answer:
    """What goes over the wire; a misbehaviour changes it. stop: bytes of the body until a cut."""

    status: int
    headers: dict[str, str]
    body: bytes
    stop: int | None = None
    wait_before: float = 0.0  # seconds before the headers
    wait_at: tuple[int, float] | None = None  # after so many bytes of the body, so many seconds
    rate: float | None = None  # bytes a second
    drop: bool = False  # close without an answer


Misbehaviour = Callable[[Answer], None]


@dataclass
class Request:
    """One request as it came, and the bytes of the body that were sent for it."""

    path: str
    headers: dict[str, str]
    query: str = ""
    sent: int = 0


@dataclass
class _Fault:
    change: Misbehaviour
    times: float
    late: bool  # on the finished answer, or on the whole file before Range is looked at


@dataclass
class HubServer:
    """The server; `files` are what the repository holds, `large` those kept as LFS files."""

    files: dict[str, bytes]
    large: tuple[str, ...] = (".safetensors", ".bin")
    requests: list[Request] = field(default_factory=list)
    _faults: dict[str, list[_Fault]] = field(default_factory=dict)

    def __enter__(self) -> HubServer:
        handler = type("Handler", (self.handler(),), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()  # waits for no thread that hangs on purpose: they are daemons
        self._thread.join()

    def handler(self) -> type[_Handler]:
        """What answers requests."""
        return _Handler

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def misbehave(
        self, name: str, change: Misbehaviour, times: float = 1, *, late: bool = True
    ) -> None:
        """Change the next `times` answers for the file `name`, after what was told before.

        name: `api` is the listing, `redirect NAME` the Hub's answer for a large file. late: whether
        the answer is changed, or the file that it is cut from.
        """
        self._faults.setdefault(name, []).append(_Fault(change, times, late))

    def heal(self) -> None:
        """Behave from now on, and forget the requests so far."""
        self._faults.clear()
        self.requests.clear()

    def fault(self, name: str, late: bool) -> Misbehaviour:
        """The change due for this answer, counted."""
        for fault in self._faults.get(name, []):
            if fault.times and fault.late is late:
                fault.times -= 1
                return fault.change
        return lambda answer: None

    def of(self, name: str) -> list[Request]:
        """The requests that were answered with the file's bytes, or should have been."""
        own = "/cdn/" if name.endswith(self.large) else "/resolve/"
        return [r for r in self.requests if own in r.path and r.path.endswith(f"/{name}")]

    def asked(self, name: str) -> list[str | None]:
        """The Range headers of these requests."""
        return [request.headers.get("range") for request in self.of(name)]

    def sent(self, name: str) -> int:
        """The bytes of the file that went out."""
        return sum(request.sent for request in self.of(name))

    def fetched(self) -> set[str]:
        """The names of the files that were asked for."""
        paths = [r.path for r in self.requests if "/resolve/" in r.path]
        return {path.partition(f"/resolve/{COMMIT}/")[2] for path in paths}

    def listing(self) -> dict[str, Any]:
        """What /api/models answers."""
        return {
            "id": REPO_ID,
            "modelId": REPO_ID,
            "sha": COMMIT,
            "private": False,
            "siblings": [self._sibling(name, content) for name, content in self.files.items()],
        }

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
        if name.endswith(self.large):
            entry["lfs"] = {"sha256": sha256_of(content), "size": len(content), "pointerSize": 130}
        return entry


def forget_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have neither a proxy nor a mirror, token or offline switch of the user in between."""
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    _close_session_once()


def move_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does before the client is imported."""
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@cache
def _close_session_once() -> None:
    """End the connections of a session that has read the user's proxies; a new one is slow."""
    close_session()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over clients that have gone."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a small body waits 40 ms behind its headers

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        request = Request(
            unquote(parts.path), {k.lower(): v for k, v in self.headers.items()}, parts.query
        )
        self.hub.requests.append(request)
        name, answer = self._route(request)
        self.hub.fault(name, late=True)(answer)
        self._send(request, answer)

    def _route(self, request: Request) -> tuple[str, Answer]:
        hub = self.hub
        if re.fullmatch(f"/api/(models|datasets)/{REPO_ID}/revision/(main|{COMMIT})", request.path):
            body = json.dumps(hub.listing()).encode()
            return "api", Answer(200, {"Content-Type": "application/json"}, body)
        if request.path.startswith("/api/"):
            wrong = "RevisionNotFound" if REPO_ID in request.path else "RepoNotFound"
            return "", Answer(404, {"X-Error-Code": wrong}, b"")
        path = request.path.removeprefix("/datasets")
        for start in (f"/{REPO_ID}/resolve/{COMMIT}/", f"/{REPO_ID}/resolve/main/", "/cdn/"):
            name = path.removeprefix(start)
            if path.startswith(start) and name in hub.files:
                return self._file(request, name, start)
        return "", Answer(404, {"X-Error-Code": "EntryNotFound"}, b"")

    def _file(self, request: Request, name: str, start: str) -> tuple[str, Answer]:
        content, is_large = self.hub.files[name], name.endswith(self.hub.large)
        headers = {
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "ETag": f'"{git_id(content)}"',
        }
        if is_large and start != "/cdn/":
            headers |= {
                "Location": f"http://localhost:{self.hub.port}/cdn/{name}",
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{sha256_of(content)}"',
            }
            return f"redirect {name}", Answer(302, headers, b"")
        whole = Answer(200, headers | {"Content-Type": "application/octet-stream"}, content)
        self.hub.fault(name, late=False)(whole)
        return name, _ranged(whole, request.headers.get("range"))

    def _send(self, request: Request, answer: Answer) -> None:
        time.sleep(answer.wait_before)
        if answer.drop:
            self._hang_up()
            return
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self._send_body(request, answer)
        except OSError:  # the client has gone
            self.close_connection = True

    def _send_body(self, request: Request, answer: Answer) -> None:
        body = answer.body[: answer.stop]
        position = 0
        while position < len(body):
            end = min(position + _CHUNK, len(body))
            if answer.wait_at and position <= answer.wait_at[0] < end:
                end = max(answer.wait_at[0], position + 1)
            self.wfile.write(body[position:end])
            request.sent += end - position
            if answer.rate:
                time.sleep((end - position) / answer.rate)
            if answer.wait_at and end >= answer.wait_at[0]:
                time.sleep(answer.wait_at[1])
                answer.wait_at = None
            position = end
        if answer.stop is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _ranged(whole: Answer, header: str | None) -> Answer:
    """The part of a whole answer that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d+)-", header or "")
    if not match or "Accept-Ranges" not in whole.headers:
        return whole
    start, total = int(match[1]), len(whole.body)
    if start >= total:
        return Answer(416, {"Content-Range": f"bytes */{total}"}, b"")
    place = {"Content-Range": f"bytes {start}-{total - 1}/{total}"}
    return Answer(206, whole.headers | place, whole.body[start:])


@cache
def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@cache
def git_id(content: bytes) -> str:
    """The name git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# --- misbehaviours --------------------------------------------------------------------------------


def cut(after: int) -> Misbehaviour:
    """Close the connection after so many bytes of the body."""
    return lambda answer: setattr(answer, "stop", after)


def drop(answer: Answer) -> None:
    """Close the connection in place of an answer."""
    answer.drop = True


def hang(seconds: float) -> Misbehaviour:
    """Say nothing for so long."""
    return lambda answer: setattr(answer, "wait_before", seconds)


def stall(after: int, seconds: float) -> Misbehaviour:
    """Stop for so long after so many bytes of the body."""
    return lambda answer: setattr(answer, "wait_at", (after, seconds))


def slow(rate: float) -> Misbehaviour:
    """So many bytes a second."""
    return lambda answer: setattr(answer, "rate", rate)


def status(code: int, **headers: str) -> Misbehaviour:
    """Another status without the file; `retry_after="1"` becomes the header Retry-After."""

    def change(answer: Answer) -> None:
        named = {name.replace("_", "-").title(): value for name, value in headers.items()}
        answer.status, answer.headers, answer.body = code, named, b"busy"

    return change


def web_page(answer: Answer) -> None:
    """A login page, with status 200."""
    answer.status, answer.body = 200, b"<!doctype html><title>Log in</title>"
    answer.headers = {"Content-Type": "text/html; charset=utf-8"}


def without_range(answer: Answer) -> None:
    """Meant for a whole answer (late=False): the server knows no Range."""
    answer.headers.pop("Accept-Ranges")


def corrupted(answer: Answer) -> None:
    """One byte in the middle is another (late=False)."""
    middle = len(answer.body) // 2
    flipped = bytes([answer.body[middle] ^ 1])
    answer.body = answer.body[:middle] + flipped + answer.body[middle + 1 :]


def shortened(answer: Answer) -> None:
    """The file lacks its last byte, and the length says so (late=False)."""
    answer.body = answer.body[:-1]


def lengthened(answer: Answer) -> None:
    """More bytes than the file has, with no length told (late=False)."""
    answer.body += b"more"
    answer.headers |= {"Content-Length": "", "Connection": "close"}
