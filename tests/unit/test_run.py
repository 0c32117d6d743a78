"""One process; what needs signals, kills or several processes is in tests/faults."""

import json
import logging
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared import outcome, run_status, stop
from shared.config import RunOptions, option
from shared.distributed import World
from shared.errors import UserError
from shared.reporter import Plan
from shared.run import Run


@dataclass(frozen=True)
class Config:
    """Settings of the test."""

    lr: float = option(0.5, "")
    run: RunOptions = field(default_factory=lambda: RunOptions(log_every=1))


@pytest.fixture(autouse=True)
def no_announcement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's memory of the run directory is of this process: put it back."""
    outcome.forget()
    monkeypatch.delenv(outcome.NOTES, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)


def open_run(run_dir: Path, total_steps: int = 6, config: Config | None = None) -> Run:
    run = Run(config or Config(), World(), run_dir, "test")
    restore = run.restore
    run.restore = lambda states: restore(states, Plan(total_steps))  # type: ignore[method-assign]
    return run


def parts() -> dict[str, Any]:
    net = nn.Linear(2, 1)
    return {"model": net, "optimizer": torch.optim.AdamW(net.parameters())}


def rows(run_dir: Path) -> list[tuple[int, str]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["split"]) for row in map(json.loads, lines)]


def status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def train(run: Run, states: dict[str, Any], until: int) -> None:
    position = run.restore(states)
    while position.step < until:
        run.step({"loss": 1.0 / (position.step + 1), "seen": torch.tensor(2)})
    run.save()


def test_a_part_without_steps_keeps_the_status_fresh_and_says_how_far_it_is(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "shared")
    with open_run(tmp_path) as run:
        clock = time.monotonic()
        for number in range(4):
            monkeypatch.setattr(time, "monotonic", lambda number=number: clock + 6 + 6 * number)
            run.beat("test", number, 4)
            assert status(tmp_path)["doing"].startswith(f"test {number}/4")
        said = [r.message for r in caplog.records if r.message.startswith("test ")]
        assert said == ["test 2/4, eta 0:00:12"]
        assert run_status.view(tmp_path).note.startswith("test 3/4, eta 0:00:06")
        monkeypatch.undo()
        train(run, parts(), until=6)
        run.finish()
    assert status(tmp_path)["doing"] is None


def test_metrics_are_recorded_every_log_every_steps_at_the_last_and_for_other_splits(tmp_path):
    config = Config(run=RunOptions(log_every=4))
    with open_run(tmp_path, total_steps=6, config=config) as run:
        train(run, parts(), until=5)
        run.log({"loss": 0.1}, split="val")
    # killed between a validation and the checkpoint after it, the validation comes again
    with open_run(tmp_path, total_steps=6, config=config) as run:
        run.restore(parts())
        run.log({"loss": 0.1}, split="val")
        run.step({"loss": 0.1})
    assert rows(tmp_path) == [(4, "train"), (5, "val"), (6, "train")]


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    """The handlers before the test, and again after it."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    stop.release()
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_signals_go_back_to_whom_they_belonged(tmp_path: Path, handlers: list[Any]) -> None:
    with open_run(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != handlers[0]
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), open_run(tmp_path / "file" / "x"):
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_room_on_the_disk_is_asked_for_the_optimizers_memory_too(tmp_path, monkeypatch):
    """Adam keeps two tensors a parameter, which do not exist yet when a run begins."""
    net = nn.Linear(1000, 1000)
    weights = 4 * (1000 * 1000 + 1000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 4 * weights))
    states = {"model": net, "optimizer": torch.optim.AdamW(net.parameters())}
    with open_run(tmp_path) as run, pytest.raises(UserError, match="needed for 2 checkpoints"):
        run.restore(states)  # weights and two moments, three times over, are needed
