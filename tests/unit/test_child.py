import os
import signal
import sys
import time
from pathlib import Path

import pytest

from shared.child import Child
from tests.harness import start, wait_until

pytestmark = pytest.mark.serial

HEARS = """
import os, signal, sys, time
heard = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: heard.append(int(number)))
print("at work, in a group of its own:", os.getpgrp() == os.getpid(), flush=True)
while not heard:
    time.sleep(0.01)
time.sleep(0.3)
print("heard", heard, flush=True)
sys.exit(7)
"""
RUNS = """
import sys
sys.path.insert(0, sys.argv[1])
from shared.child import Child
with Child() as child:
    code = getattr(child, sys.argv[2])([sys.executable, "-c", sys.argv[3]])
print("code", code, "stopped by", child.stopped_by, flush=True)
"""
ROOT = Path(__file__).resolve().parents[2]


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(5)", 5), ("os.kill(os.getpid(), 9)", 137)])
def test_the_exit_code_is_what_a_shell_would_say(ends, code):
    with Child() as child:
        assert child.run(python(f"import os, sys; {ends}")) == code
        assert child.run_attached(python(f"import os, sys; {ends}")) == code


@pytest.mark.parametrize(
    ("way", "number", "group"),
    [
        ("run", signal.SIGINT, True),
        ("run_attached", signal.SIGINT, True),
        ("run_attached", signal.SIGTERM, False),
    ],
)
def test_a_signal_reaches_the_child_once(way, number, group):
    with start(["-c", RUNS, ROOT, way, HEARS]) as running:
        running.wait_for_text("at work")
        running.signal(number, group=group)
        outcome = running.finish()
    assert "at work, in a group of its own: True" in outcome.text  # so a terminal's comes once
    assert f"heard [{int(number)}]\ncode 7 stopped by {int(number)}" in outcome.text


def test_the_child_does_not_outlive_us_when_we_are_killed():
    with start(["-c", RUNS, ROOT, "run_attached", HEARS]) as running:
        running.wait_for_text("at work")
        running.signal(signal.SIGKILL)
        wait_until(lambda: "heard [15]" in running.text, "the child's own end")
        assert running.leaves_nothing()


def test_the_handlers_of_before_are_put_back_and_an_ignored_signal_stays_ignored():
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Child():
            assert signal.getsignal(signal.SIGTERM) != before[0]
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == before[0]
    finally:
        signal.signal(signal.SIGHUP, before[1])


def test_a_child_that_starts_after_the_stop_is_told_at_once():
    with Child() as child:
        os.kill(os.getpid(), signal.SIGTERM)
        assert child.stopped_by == signal.SIGTERM
        assert child.run(python("import time; time.sleep(60)")) == 143


def test_ticks_come_while_the_child_runs_and_it_shares_what_is_kept(tmp_path):
    ticks: list[float] = []
    handle = os.open(tmp_path / "kept", os.O_RDWR | os.O_CREAT)
    text = f"import os, time; time.sleep(1.2); os.write({handle}, b'shared')"
    with Child() as child:
        code = child.run_attached(
            python(text), tick=lambda: ticks.append(time.monotonic()), keep=[handle]
        )
    os.close(handle)
    assert code == 0 and ticks  # one a second, from the first second on
    assert (tmp_path / "kept").read_text() == "shared"
