"""metrics.jsonl and TensorBoard: every number, once, whatever happens beside it."""

import contextlib
import json
import math
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.checkpoint import Position
from shared.reporter import Metrics


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(directory: Path, start: int, steps: range, scale: float = 1.0) -> None:
    """What a run that begins at `start` and ends after `steps` writes."""
    metrics = Metrics(directory / "metrics.jsonl", directory / "board", Position(step=start))
    for step in steps:
        metrics.log(step, step // 4, "train", {"loss": scale * step, "lr": 0.5})
    metrics.close()


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a tag, as TensorBoard shows them."""
    board = EventAccumulator(str(directory))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_every_row_has_step_epoch_split_time_and_its_numbers(tmp_path: Path) -> None:
    before = time.time()
    record(tmp_path, 0, range(1, 2))
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert abs(row.pop("time") - before) < 60
    assert row == {"step": 1, "epoch": 0, "split": "train", "loss": 1.0, "lr": 0.5}


def test_nan_is_null_in_the_file_and_nan_on_the_board(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", tmp_path / "board", Position())
    metrics.log(1, 0, "train", {"loss": None, "acc": 0.5})
    assert rows(tmp_path / "metrics.jsonl")[0]["loss"] is None  # at once
    metrics.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    ((step, value),) = scalars(tmp_path / "board", "loss")
    assert step == 1
    assert math.isnan(value)


def test_tensorboard_reads_every_number(tmp_path: Path) -> None:
    record(tmp_path, 0, range(1, 5))
    assert scalars(tmp_path / "board", "loss") == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_row_torn_by_a_kill_is_cut_away(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    metrics = Metrics(path, None, Position(step=2))
    metrics.log(3, 0, "train", {"loss": 3.0})
    metrics.close()
    assert [row["step"] for row in rows(path)] == [1, 3]


def test_a_run_goes_on_when_the_board_cannot_be_written(tmp_path, caplog):
    (tmp_path / "board").write_text("a file where the directory should be")
    record(tmp_path, 0, range(1, 3))
    assert len(rows(tmp_path / "metrics.jsonl")) == 2
    assert "no TensorBoard" in caplog.text


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_rows_and_charts_and_not_the_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    metrics = Metrics(tmp_path / "metrics.jsonl", tmp_path / "board", Position())
    with full_disk():
        metrics.log(1, 0, "train", {"loss": 1.0})
        deadline = time.monotonic() + 60
        while "no TensorBoard from step" not in caplog.text and time.monotonic() < deadline:
            metrics.log(2, 0, "train", {"loss": 1.0})
            time.sleep(0.1)
    metrics.log(3, 0, "train", {"loss": 1.0})
    metrics.close()
    assert caplog.text.count("no TensorBoard from step") == 1
    assert caplog.text.count("metrics from step 1 on are not written") == 1
    assert rows(tmp_path / "metrics.jsonl")[-1]["step"] == 3
