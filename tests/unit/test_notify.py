"""One message at the end of a run, and an address that nobody gets to see."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from shared import notify
from shared.errors import UserError
from shared.notify import NotifyError
from shared.tools import monitor
from tests.harness import free_port
from tests.unit.test_run_view import write

MONITOR = monitor.ROOT / "shared" / "tools" / "monitor.py"

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


def start_waiting(run_dir, *words, **environ):
    command = [sys.executable, MONITOR, "--run-dir", run_dir, "--every", "0.1", "--notify", *words]
    quiet = os.environ | {"NO_PROXY": "127.0.0.1"} | environ
    return subprocess.Popen(
        [str(word) for word in command],
        env=quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_monitor_waits_for_the_end_and_posts_once(tmp_path, how):
    run_dir = write(tmp_path / "run")
    with receiver() as (url, taken):
        words, environ = ([url], {}) if how == "flag" else ([], {"NOTIFY_URL": url})
        waiting = start_waiting(run_dir, *words, **environ)
        assert waiting.stdout and waiting.stdout.readline().startswith("waiting for the end")
        assert taken == []
        write(run_dir, state="failed", exit_code=1, reason="rank 1: RuntimeError: x")
        text = waiting.communicate(timeout=30)[0]
    assert waiting.returncode == 0 and "the message was taken" in text
    assert SECRET not in text
    assert not any(SECRET in path.read_text() for path in run_dir.iterdir())
    assert [json.loads(post["body"])["state"] for post in taken] == ["failed"]


def test_the_monitor_says_that_a_message_was_not_taken(tmp_path, capsys):
    run_dir = write(tmp_path / "run", state="done", exit_code=0)
    with receiver(403) as (url, _):
        assert monitor.main(["--notify", url, str(run_dir)]) == 1
    written = capsys.readouterr()
    assert "error: 127.0.0.1 has not taken the message: it answered 403" in written.err
    assert SECRET not in written.out + written.err


def test_a_monitor_without_an_address_says_so_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NOTIFY_URL", raising=False)
    assert monitor.main(["--notify", "--run-dir", str(write(tmp_path / "run"))]) == 2
    assert "NOTIFY_URL" in capsys.readouterr().err
