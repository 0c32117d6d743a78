"""The files of finished epochs, and what becomes of them when a run begins again."""

import pytest
import torch

from arcface.inshop_retrieval.epochs import EpochFiles, Record
from shared.checkpoint import Position


def weights():
    return {"encoder.x": torch.ones(2)}


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path


def names(run_dir):
    return sorted(path.name for path in run_dir.glob("*.pth*"))


def finish(files, record, epoch, recall):
    """What training does at the end of an epoch."""
    record.update({"Recall@1": recall, "mAP@10": 0.5}, epoch, "Recall@1")
    if epoch % 2 == 0 or epoch == 7:
        files.write_epoch(Position(epoch=epoch), {"epoch": epoch})
    if record.best_epoch == epoch:
        files.write_best(record, weights)


def test_every_second_epoch_and_the_last_stay_two_at_a_time(run_dir):
    files, record = EpochFiles(run_dir, 2, "Recall@1"), Record()
    for epoch in range(1, 8):
        finish(files, record, epoch, 0.1)
    assert names(run_dir) == [
        "best_retrieval_Recall@1_epoch_1.pth", "epoch_6.pth", "epoch_7.pth",
    ]  # fmt: skip
    assert torch.load(run_dir / "epoch_6.pth") == {"epoch": 6}


def test_only_a_higher_figure_is_a_new_best_and_the_old_file_goes(run_dir):
    files, record = EpochFiles(run_dir, 2, "Recall@1"), Record()
    for epoch, recall in enumerate([0.5, 0.7, 0.7, 0.6, 0.8], 1):
        finish(files, record, epoch, recall)
    (best,) = run_dir.glob("best_*")
    assert best.name == "best_retrieval_Recall@1_epoch_5.pth"
    assert torch.load(best)["meta"] == {"epoch": 5, "metrics": {"Recall@1": 0.8, "mAP@10": 0.5}}


def test_another_metric_names_the_file(run_dir):
    files = EpochFiles(run_dir, -1, "mAP@10")
    record = Record()
    record.update({"Recall@1": 0.1, "mAP@10": 0.2}, 1, "mAP@10")
    files.write_best(record, weights)
    assert names(run_dir) == ["best_retrieval_mAP@10_epoch_1.pth"]


def test_a_record_goes_through_a_checkpoint(tmp_path):
    record = Record()
    record.before = {"Recall@1": 0.1}
    assert record.update({"Recall@1": 0.0}, 3, "Recall@1")
    torch.save(record.state_dict(), tmp_path / "x.pt")
    other = Record()
    other.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    assert vars(other) == vars(record)


def test_what_an_abandoned_continuation_left_is_set_aside(run_dir):
    files, record = EpochFiles(run_dir, 2, "Recall@1"), Record()
    for epoch, recall in enumerate([0.5, 0.4, 0.3, 0.9], 1):
        finish(files, record, epoch, recall)
    back = Record()
    back.update({"Recall@1": 0.5}, 1, "Recall@1")  # as the checkpoint of epoch 2 knew it
    assert files.settle(Position(step=20, epoch=2), back, weights) is True
    assert names(run_dir) == [
        "best_retrieval_Recall@1_epoch_4.pth.old", "epoch_2.pth", "epoch_4.pth.old",
    ]  # fmt: skip


def test_a_kill_before_the_best_file_was_written_is_made_good(run_dir):
    files, record = EpochFiles(run_dir, 2, "Recall@1"), Record()
    finish(files, record, 1, 0.5)
    record.update({"Recall@1": 0.6}, 2, "Recall@1")  # saved with epoch 2, then killed
    assert files.settle(Position(step=20, epoch=2), record, weights) is False
    assert names(run_dir) == ["best_retrieval_Recall@1_epoch_2.pth"]


def test_a_disk_that_refuses_the_files_stops_no_training(run_dir, monkeypatch, caplog):
    files, record = EpochFiles(run_dir, 2, "Recall@1"), Record()

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared.checkpoint.write_atomic", refuse)
    finish(files, record, 1, 0.5)
    assert "best_retrieval_Recall@1_epoch_1.pth was not written" in caplog.text
