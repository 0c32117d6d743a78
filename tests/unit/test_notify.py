"""One message at the end of a run, and an address that nobody gets to see."""

import contextlib
import http.server
import json
import threading
from types import SimpleNamespace

import pytest

from shared import notify
from shared.errors import UserError
from shared.notify import NotifyError
from tests.harness import free_port

SECRET = "s3cret-token"


@contextlib.contextmanager
def receiver(*answers: int):
    """A server that takes messages; `answers` are the status codes, the last one for ever."""
    taken: list[dict] = []
    left = list(answers or (200,))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append({"path": self.path, "type": self.headers["Content-Type"], "body": body})
            self.send_response(left.pop(0) if len(left) > 1 else left[0])
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook/{SECRET}", taken
        server.shutdown()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(notify, "_PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def run(**changes):
    fields = {
        "recipe": "arcface", "run_dir": "/runs/数据", "host": "node1", "state": "failed",
        "exit_code": 1, "reason": "rank 1: RuntimeError: x", "note": "", "step": 3,
        "total_steps": 9, "result": None,
    }  # fmt: skip
    return SimpleNamespace(**fields | changes)


def test_one_plain_json_object_arrives():
    with receiver() as (url, taken):
        notify.post(url, notify.message(run()))
    assert len(taken) == 1
    assert taken[0]["type"] == "application/json" and taken[0]["path"] == f"/hook/{SECRET}"
    assert json.loads(taken[0]["body"]) == {
        "text": "arcface failed: rank 1: RuntimeError: x (/runs/数据)",
        "recipe": "arcface",
        "run_dir": "/runs/数据",
        "host": "node1",
        "state": "failed",
        "exit_code": 1,
        "reason": "rank 1: RuntimeError: x",
        "step": 3,
        "total_steps": 9,
        "result": None,
    }


def test_the_text_tells_the_result():
    result = {"name": "Recall@1", "before": 30.8, "after": 72.5, "higher_is_better": True}
    text = notify.message(run(state="done", reason="9 steps", result=result))["text"]
    assert text == "arcface done: 9 steps | Recall@1 30.8 → 72.5 (/runs/数据)"


def test_a_busy_server_is_asked_again():
    with receiver(503, 429, 204) as (url, taken):
        notify.post(url, {"text": "x"})
    assert len(taken) == 3


@pytest.mark.parametrize(("answer", "asked"), [(404, 1), (302, 1), (500, 4)])
def test_a_refusal_names_the_host_and_not_the_address(answer, asked):
    with receiver(answer) as (url, taken), pytest.raises(NotifyError) as caught:
        notify.post(url, {"text": "x"})
    assert len(taken) == asked
    assert str(caught.value) == f"127.0.0.1 has not taken the message: it answered {answer}"
    assert caught.value.exit_code == 1


def test_a_host_that_is_not_there_is_named_without_the_address():
    with pytest.raises(NotifyError) as caught:
        notify.post(f"http://127.0.0.1:{free_port()}/{SECRET}", {"text": "x"})
    assert "127.0.0.1" in str(caught.value) and SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", SECRET, f"ftp://host/{SECRET}", f"https:///{SECRET}", f"http://h:x/{SECRET}",
            f"http://host/{SECRET}\n", f"http://host/a {SECRET}"],
)  # fmt: skip
def test_what_is_no_web_address_is_refused_without_being_shown(url):
    with pytest.raises(UserError) as caught:
        notify.check(url)
    assert SECRET not in str(caught.value)
