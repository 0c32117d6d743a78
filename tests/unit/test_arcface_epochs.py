"""What epochs leave: log lines as users of mm toolboxes know them, files, and the best figure."""

import logging

import pytest
import torch

from arcface.inshop_retrieval import epochs
from arcface.inshop_retrieval.epochs import EpochFiles, Record, TrainLines, in_percent, val_line
from shared.checkpoint import Position
from shared.distributed import World

BEST = "best_retrieval_Recall@1_epoch_{}.pth".format


def weights():
    return {"encoder.x": torch.ones(2)}


def names(run_dir):
    return sorted(path.name for path in run_dir.glob("*.pth*"))


@pytest.fixture
def files(tmp_path):
    return EpochFiles(tmp_path, 2, "Recall@1")


def finish(files, record, epoch, recall):
    """What training does at the end of an epoch."""
    record.update({"Recall@1": recall, "mAP@10": 0.5}, epoch, "Recall@1")
    if epoch % 2 == 0 or epoch == 7:
        files.write_epoch(Position(epoch=epoch), {"epoch": epoch})
    if record.best_epoch == epoch:
        files.write_best(record, weights)


def test_every_second_epoch_and_the_last_stay_two_at_a_time(files, tmp_path):
    record = Record()
    for epoch in range(1, 8):
        finish(files, record, epoch, 0.1)
    assert names(tmp_path) == [BEST(1), "epoch_6.pth", "epoch_7.pth"]
    assert torch.load(tmp_path / "epoch_6.pth") == {"epoch": 6}


def test_only_a_higher_figure_is_a_new_best_and_the_old_file_goes(files, tmp_path):
    record = Record()
    for epoch, recall in enumerate([0.5, 0.7, 0.7, 0.6], 1):
        finish(files, record, epoch, recall)
    (best,) = tmp_path.glob("best_*")
    assert best.name == BEST(2)
    assert torch.load(best)["meta"] == {"epoch": 2, "metrics": {"Recall@1": 0.7, "mAP@10": 0.5}}
    other = EpochFiles(tmp_path / "other", -1, "mAP@10")  # another metric names the file
    (tmp_path / "other").mkdir()
    other.write_best(record, weights)
    assert names(tmp_path / "other") == ["best_retrieval_mAP@10_epoch_2.pth"]


def test_what_an_abandoned_continuation_left_is_set_aside(files, tmp_path):
    record, back = Record(), Record()
    for epoch, recall in enumerate([0.5, 0.4, 0.3, 0.9], 1):
        finish(files, record, epoch, recall)
    back.update({"Recall@1": 0.5}, 1, "Recall@1")  # as the checkpoint of epoch 2 knew it
    assert files.settle(Position(step=20, epoch=2), back, weights) is True
    assert names(tmp_path) == [f"{BEST(4)}.old", "epoch_2.pth", "epoch_4.pth.old"]


def test_a_kill_before_the_best_file_was_written_is_made_good(files, tmp_path):
    record = Record()
    finish(files, record, 1, 0.5)
    record.update({"Recall@1": 0.6}, 2, "Recall@1")  # saved with epoch 2, then killed
    assert files.settle(Position(step=20, epoch=2), record, weights) is False
    assert names(tmp_path) == [BEST(2)]


def test_a_disk_that_refuses_the_files_stops_no_training(files, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared.checkpoint.write_atomic", refuse)
    finish(files, Record(), 1, 0.5)
    assert f"{BEST(1)} was not written" in caplog.text


def test_a_line_of_validation_is_in_percent():
    metrics = {"Recall@1": 0.931, "mAP@10": 0.693}
    assert val_line(2, 1, metrics, waited=0.01, seconds=0.5) == (
        "Epoch(val) [2][1/1]    retrieval/Recall@1: 93.1000  retrieval/mAP@10: 69.3000  "
        "data_time: 0.0100  time: 0.5000"
    )
    assert in_percent({"mAP@10_min": 0.5}) == {"retrieval/mAP@10_min": 50.0}


def test_a_line_of_training_has_the_means_since_the_one_before(monkeypatch, caplog):
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
