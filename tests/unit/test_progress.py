import io
import logging
import sys
import time

import pytest

from shared.progress import Progress, clock, span


class Clocks:
    """A monotonic and a wall clock that move when they are told to."""

    def __init__(self) -> None:
        self.monotonic, self.wall = 1000.0, 5000.0


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    both = Clocks()
    monkeypatch.setattr(time, "monotonic", lambda: both.monotonic)
    monkeypatch.setattr(time, "time", lambda: both.wall)
    return both


@pytest.fixture(autouse=True)
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="shared.progress")
    return caplog


def test_the_time_left_is_of_this_starts_own_steps_by_the_monotonic_clock(clocks: Clocks) -> None:
    shown = Progress(100, 60)
    assert shown.eta_s(60) is None
    clocks.monotonic += 5.0
    clocks.wall -= 3600.0  # someone set the clock back
    assert shown.speed(70) == 2.0
    assert [shown.eta_s(step) for step in (70, 100, 102)] == [15.0, 0.0, 0.0]


def test_a_line_names_everything_as_key_and_value(clocks, lines):
    shown = Progress(200, 0, samples_per_step=32)
    clocks.monotonic += 10.0
    shown.show(20, 1, {"loss": 0.123456789, "lr": 1e-3})
    assert lines.messages == [
        "step=20/200 epoch=2 loss=0.123457 lr=0.001 steps/s=2 samples/s=64 eta=0:01:30"
    ]


def test_lines_come_at_the_first_step_every_ten_seconds_and_at_the_last(clocks, lines):
    shown = Progress(50, 0)
    for step in range(1, 51):
        clocks.monotonic += 1.0
        shown.show(step, 0, {})
    steps = [message.split("/")[0] for message in lines.messages]
    assert steps == [f"step={step}" for step in (1, 11, 21, 31, 41, 50)]


class Terminal(io.StringIO):
    """A terminal that can go away."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


def test_terminals_get_a_bar_and_no_lines(monkeypatch, lines):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    shown = Progress(10, 4)
    shown.show(7, 0, {"loss": 0.5})
    shown.close()
    assert "7/10" in err.getvalue()
    assert out.getvalue() == ""
    assert lines.messages == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (90061, "25:01:01")]
)
def test_seconds_as_a_clock_shows_them(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (119, "1 min"), (7200, "2 h"), (200_000, "2 d")]
)
def test_a_time_is_told_in_its_largest_unit(seconds, text):
    assert span(seconds) == text
