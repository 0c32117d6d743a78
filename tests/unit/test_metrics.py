import builtins
import json
import math
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.amp import Mean
from shared.checkpoint import Position
from shared.distributed import World
from shared.reporter import Metrics

CPU = torch.device("cpu")


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
    metrics.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": null' in text
    assert "NaN" not in text
    ((step, value),) = scalars(tmp_path / "board", "loss")
    assert step == 1
    assert math.isnan(value)


def test_each_row_reaches_the_file_at_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", None, 0)
    metrics.log(1, 0, "train", {"loss": 1.0})
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    metrics.close()


def test_tensorboard_reads_every_number(tmp_path: Path) -> None:
    record(tmp_path, 0, range(1, 5))
    assert scalars(tmp_path / "board", "loss") == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert scalars(tmp_path / "board", "lr") == [(step, 0.5) for step in range(1, 5)]


def test_a_resumed_run_cuts_both_back_to_the_checkpoints_step(tmp_path: Path) -> None:
    record(tmp_path, 0, range(1, 7))
    record(tmp_path, 4, range(5, 8), scale=10.0)
    expected = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60), (7, 70)]
    found = [(row["step"], row["loss"]) for row in rows(tmp_path / "metrics.jsonl")]
    assert found == expected
    assert scalars(tmp_path / "board", "loss") == expected


def test_a_row_torn_by_a_kill_is_cut_away(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    metrics = Metrics(path, None, Position(step=2))
    metrics.log(3, 0, "train", {"loss": 3.0})
    metrics.close()
    assert [row["step"] for row in rows(path)] == [1, 3]


def test_a_run_goes_on_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if "tensorboard" in name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    record(tmp_path, 0, range(1, 3))
    assert len(rows(tmp_path / "metrics.jsonl")) == 2
    assert "metrics.jsonl has every number" in caplog.text


def test_a_run_goes_on_when_the_board_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "board").write_text("a file where the directory should be")
    record(tmp_path, 0, range(1, 3))
    assert len(rows(tmp_path / "metrics.jsonl")) == 2
    assert "no TensorBoard" in caplog.text


def test_a_full_disk_costs_rows_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", None, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file may grow
    try:
        for step in (1, 2, 3):
            metrics.log(step, 0, "train", {"loss": 1.0})
        metrics.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("are not written") == 1
    assert "metrics from step 1 on are not written" in caplog.text


def test_a_board_that_cannot_be_written_any_more_costs_charts_and_no_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    metrics = Metrics(tmp_path / "metrics.jsonl", tmp_path / "board", Position())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file may grow
    try:
        metrics.log(1, 0, "train", {"loss": 1.0})
        deadline = time.monotonic() + 60
        while "no TensorBoard from step" not in caplog.text and time.monotonic() < deadline:
            metrics.log(2, 0, "train", {"loss": 1.0})
            time.sleep(0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics.log(3, 0, "train", {"loss": 1.0})
    metrics.close()
    assert caplog.text.count("no TensorBoard from step") == 1
    assert rows(tmp_path / "metrics.jsonl")[-1]["step"] == 3


def test_a_mean_weighs_its_values() -> None:
    mean = Mean(World())
    mean.add(torch.tensor(1.0), weight=3)
    mean.add(torch.tensor(5.0), weight=1)
    assert mean.value() == 2.0


def test_the_mean_of_nothing_is_nan_and_reset_forgets() -> None:
    mean = Mean(World())
    mean.add(torch.tensor(1.0))
    mean.reset()
    assert math.isnan(mean.value())


def test_a_mean_keeps_no_graph_and_continues_from_its_state() -> None:
    value = torch.tensor(2.0, requires_grad=True)
    mean, other = Mean(World()), Mean(World())
    mean.add(value * 2)
    assert not mean.state_dict()["sums"].requires_grad
    other.load_state_dict(mean.state_dict())
    mean.add(torch.tensor(100.0))  # the state is a copy
    other.add(torch.tensor(8.0))
    assert other.value() == 6.0


def test_a_long_mean_of_small_numbers_stays_exact() -> None:
    mean = Mean(World())
    mean.add(torch.tensor(1.0), weight=2**25)
    for _ in range(100):
        mean.add(torch.tensor(1.0))  # in float32 2**25 + 1 is 2**25
    assert float(mean.state_dict()["sums"][1]) == 2**25 + 100
