"""Log lines, word for word as users of mm toolboxes know them."""

import logging

import torch

from arcface.inshop_retrieval import epochs
from arcface.inshop_retrieval.epochs import TrainLines, in_percent, val_line
from shared.checkpoint import Position
from shared.distributed import World


def test_a_line_of_validation_is_in_percent():
    metrics = {"Recall@1": 0.931, "mAP@10": 0.693}
    assert val_line(2, 1, metrics, waited=0.01, seconds=0.5) == (
        "Epoch(val) [2][1/1]    retrieval/Recall@1: 93.1000  retrieval/mAP@10: 69.3000  "
        "data_time: 0.0100  time: 0.5000"
    )
    assert in_percent({"mAP@10_min": 0.5}) == {"retrieval/mAP@10_min": 50.0}


def test_a_line_has_the_means_since_the_one_before(monkeypatch, caplog):
    now = iter([0.0, 1.0, 3.0, 4.0, 8.0, 8.0, 10.0, 10.0, 13.0, 13.0, 13.0, 20.0])
    monkeypatch.setattr(epochs.time, "monotonic", lambda: next(now))
    caplog.set_level(logging.INFO)
    lines, position = TrainLines(2, 3, 2, World()), Position()
    for loss in (4.0, 2.0, 7.0):
        lines.batch_arrived()
        lines.step_done(position, torch.tensor(loss), 0.5)
        position.advance()
    # batches came after 1 and 1 seconds, steps ended at 3 and 8: 4 s each, 1 of them waiting
    assert caplog.messages == [
        "Epoch(train) [1][2/3]  lr: 5.0000e-01  eta: 0:00:16  time: 4.0000  data_time: 1.0000  "
        "loss: 3.0000",
        "Epoch(train) [1][3/3]  lr: 5.0000e-01  eta: 0:00:11  time: 3.0000  data_time: 0.0000  "
        "loss: 7.0000",
    ]
