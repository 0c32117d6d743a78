"""Log lines, word for word as users of mm toolboxes know them."""

import logging

import torch

from arcface import log_lines
from arcface.log_lines import TrainLines, in_percent, train_line, val_line
from shared.checkpoint import Position
from shared.distributed import World


def test_a_line_of_training():
    line = train_line(2, 6, 6, lr=0.0077103, eta=0.4, seconds=1.9216, waited=0.0089, loss=41.48731)
    assert line == (
        "Epoch(train) [2][6/6]  lr: 7.7103e-03  eta: 0:00:00  time: 1.9216  data_time: 0.0089  "
        "loss: 41.4873"
    )


def test_steps_stand_in_columns_and_long_times_have_days():
    line = train_line(1, 20, 809, lr=0.01, eta=100_000, seconds=1, waited=0.5, loss=3, memory=5123)
    assert line.startswith("Epoch(train) [1][ 20/809]  lr: 1.0000e-02  eta: 1 day, 3:46:40  ")
    assert line.endswith("data_time: 0.5000  memory: 5123  loss: 3.0000")


def test_a_line_of_validation_is_in_percent():
    metrics = {"Recall@1": 0.931, "mAP@10": 0.693}
    assert val_line(2, 1, metrics, waited=0.01, seconds=0.5) == (
        "Epoch(val) [2][1/1]    retrieval/Recall@1: 93.1000  retrieval/mAP@10: 69.3000  "
        "data_time: 0.0100  time: 0.5000"
    )
    assert in_percent({"mAP@10_min": 0.5}) == {"retrieval/mAP@10_min": 50.0}


def test_a_line_has_the_means_since_the_one_before(monkeypatch, caplog):
    now = iter([0.0, 1.0, 3.0, 4.0, 8.0, 8.0, 10.0, 10.0, 13.0, 13.0, 13.0, 20.0])
    monkeypatch.setattr(log_lines.time, "monotonic", lambda: next(now))
    caplog.set_level(logging.INFO)
    lines, position = TrainLines(2, 3, 2, World()), Position()
    for loss in (4.0, 2.0, 7.0):
        lines.batch_arrived()
        position.advance()
        lines.step_done(position, torch.tensor(loss), 0.5)
    # batches came after 1 and 1 seconds, steps ended at 3 and 8: 4 s each, 1 of them waiting
    assert caplog.messages == [
        "Epoch(train) [1][2/3]  lr: 5.0000e-01  eta: 0:00:16  time: 4.0000  data_time: 1.0000  "
        "loss: 3.0000",
        "Epoch(train) [1][3/3]  lr: 5.0000e-01  eta: 0:00:11  time: 3.0000  data_time: 0.0000  "
        "loss: 7.0000",
    ]
