"""Rows 16 to 18, 30 and 40 of the fault matrix: numbers, early stopping, shares (see README.md)."""

import math

import pytest
import torch

from shared.distributed import World
from shared.errors import UserError
from shared.loader import make_loader, steps_per_epoch
from tests.faults import probe_recipe
from tests.harness import PROBE, losses, run_here, run_to_end, status_of

pytestmark = pytest.mark.limit(240)


def probe(run_dir, *args):
    return run_here(probe_recipe.main, ["--run-dir", run_dir, *args])


def model_in(path):
    return torch.load(path, weights_only=True)["parts"]["model"]


def test_fault_16_training_goes_on_after_one_bad_step(tmp_path):
    outcome = probe(tmp_path / "run", "--fault", "nan@5", "--epochs", 1)
    assert outcome.code == 0
    assert outcome.text.count("WARNING: gradients are not finite") == 1
    found = losses(tmp_path / "run")
    assert found[5] is None  # JSON has no NaN
    assert all(math.isfinite(loss) for step, loss in found.items() if step != 5)
    before_and_after = [tmp_path / "run" / name for name in ("last.1.pt", "last.pt")]
    for path in before_and_after:
        assert all(value.isfinite().all() for value in model_in(path).values())


def test_fault_16_many_bad_steps_in_a_row_end_the_run(tmp_path):
    run_dir = tmp_path / "run"
    outcome = probe(run_dir, "--fault", "nan-from@12", "--max-bad-steps", 8)
    assert outcome.code == 1
    assert "not finite for 8 steps in a row" in outcome.last_line
    assert "--lr" in outcome.last_line
    assert max(losses(run_dir)) == 18  # the eighth of 12 … 19 is the last
    assert status_of(run_dir)["state"] == "failed"
    for path in run_dir.glob("last*.pt"):
        assert all(value.isfinite().all() for value in model_in(path).values())


def test_fault_16_bad_steps_before_an_interruption_still_count(tmp_path):
    run_dir = tmp_path / "run"
    assert probe(run_dir, "--fault", "nan-from@4", "--max-bad-steps", 8).code == 1
    outcome = probe(run_dir, "--fault", "nan-from@4", "--max-bad-steps", 8)
    assert "at step 10 of 48" in outcome.text
    assert outcome.code == 1
    assert max(losses(run_dir)) == 10  # seven bad steps are in the checkpoint, the next is the last


def test_fault_18_ranks_with_different_values_stop_in_the_same_epoch(tmp_path):
    run_dir = tmp_path / "run"
    # rank 1's value grows from the second epoch on, rank 0's goes on falling
    args = ["--nproc", 2, "--epochs", 8, "--patience", 2, "--fault", "worse@1@1"]
    # 75 points: each rank gets 4 whole batches of 8, and 11 points are left over
    outcome = run_to_end([PROBE, *args, "--num-points", 75, "--run-dir", run_dir])
    assert outcome.code == 0, outcome.text
    assert "done: stopped early after epoch 3 (exit 0)" in outcome.last_line
    assert status_of(run_dir)["epoch"] == 3
    assert max(losses(run_dir)) == 12


def test_fault_30_set_without_a_whole_batch_is_refused(tmp_path):
    outcome = probe(tmp_path / "run", "--num-points", 7)
    assert outcome.code == 2
    assert "7 samples are too few for one step" in outcome.last_line
    assert "make the batch smaller" in outcome.last_line
    with pytest.raises(UserError, match=r"4 process\(es\) × batch size 1 a process need 4"):
        steps_per_epoch(2, 1, 4)


def test_fault_40_rank_that_leaves_early_is_no_success(tmp_path):
    run_dir = tmp_path / "run"
    outcome = run_to_end([PROBE, "--nproc", 2, "--fault", "leave@6@1", "--run-dir", run_dir])
    assert outcome.code == 1, outcome.text
    assert status_of(run_dir)["state"] == "failed"


def test_number_of_loader_workers_changes_no_loss(tmp_path, undisturbed):
    assert probe(tmp_path / "run", "--workers", 1).code == 0
    assert losses(tmp_path / "run") == undisturbed(1)


def test_values_that_no_loader_can_have_are_refused_in_one_line():
    points = torch.utils.data.TensorDataset(torch.zeros(8))
    with pytest.raises(UserError, match="batch"):
        make_loader(points, 0, World(), seed=0, workers=0)
    with pytest.raises(UserError, match="workers"):
        make_loader(points, 2, World(), seed=0, workers=-1)
