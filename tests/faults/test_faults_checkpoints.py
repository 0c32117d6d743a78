"""Rows 10 to 14, 19 to 23 of the fault matrix: checkpoints, full disks, resume (see README.md)."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from shared import lock
from tests.faults import probe_recipe
from tests.harness import (
    PROBE,
    killed_saves,
    losses,
    run_here,
    run_to_end,
    status_of,
)

pytestmark = pytest.mark.limit(240)

DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "not a checkpoint": lambda data: b"<html>404</html>",
    "a flipped bit": lambda data: data[:1500] + bytes([data[1500] ^ 1]) + data[1501:],
}


def probe(run_dir, *args):
    return run_here(probe_recipe.main, ["--run-dir", run_dir, *args])


def step_of(path):
    return torch.load(path, weights_only=True)["position"]["step"]


def moved_aside(run_dir):
    return sorted(path.name for path in run_dir.parent.glob(f"{run_dir.name}.*"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs that tests begin with: `interrupted` at step 12 of 48, `finished` after one epoch."""
    root = tmp_path_factory.mktemp("made")
    assert probe(root / "interrupted", "--fault", "term@12").code == 143
    assert probe(root / "finished", "--epochs", 1).code == 0
    return root


@pytest.fixture
def interrupted(made, tmp_path):
    """A run that was stopped at step 12 of 48; its checkpoints are of steps 12 and 10."""
    return shutil.copytree(made / "interrupted", tmp_path / "run")


@pytest.fixture
def finished(made, tmp_path):
    """A run of one epoch."""
    return shutil.copytree(made / "finished", tmp_path / "run")


def test_fault_10_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path):
    found = killed_saves(tmp_path, kills=5, megabytes=8, seed=1)
    assert found.loadable == found.kills == 5
    assert found.half_written > 0, "no kill met a save: the test shows nothing"


def test_fault_11_half_written_files_of_dead_processes_are_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale = tmp_path / f"last.pt.tmp.{ended.pid}"
    alive = tmp_path / f"last.pt.tmp.{os.getpid()}"
    other = tmp_path / "notes.tmp"
    for path in (stale, alive, other):
        path.write_text("half")
    os.close(lock.take(tmp_path))
    assert not stale.exists()
    assert alive.exists()
    assert other.exists()


@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
def test_fault_12_damaged_checkpoint_is_passed_over_with_a_warning(
    interrupted, undisturbed, damage
):
    last = interrupted / "last.pt"
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(DAMAGES[damage](last.read_bytes()))
    outcome = probe(interrupted)
    assert outcome.code == 0
    assert f"WARNING: checkpoint passed over: {last}" in outcome.text
    assert "last.1.pt at step 10 of 48" in outcome.text
    assert losses(interrupted) == undisturbed(1)


def test_fault_12_damaged_checkpoint_that_was_named_is_refused(interrupted):
    last = interrupted / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    outcome = probe(interrupted, "--resume", last)
    assert outcome.code == 2
    assert f"{last}: " in outcome.last_line
    assert "--resume auto" in outcome.last_line


def test_fault_12_run_starts_anew_when_no_checkpoint_is_whole(interrupted, undisturbed):
    for path in interrupted.glob("last*.pt"):
        path.write_bytes(b"")
    outcome = probe(interrupted)
    assert outcome.code == 0
    assert outcome.text.count("checkpoint passed over") == 2
    assert "starting from the beginning" in outcome.text
    assert losses(interrupted) == undisturbed(1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB, for checkpoints (--width 50000) of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system; the file-size limit is tested beside this")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


FILLING = ["--epochs", 1, "--width", 50000, "--fault"]
NOT_WRITTEN = "the checkpoint of step 10 was not written: [Errno 28] No space left on device"


def test_fault_13_full_disk_costs_a_checkpoint_not_the_run(small_disk):
    outcome = probe(small_disk / "run", *FILLING, "full@6,free@12")
    assert outcome.code == 0, outcome.text
    assert f"WARNING: {NOT_WRITTEN}" in outcome.text
    assert "free some space" in outcome.text
    assert "training continues" in outcome.text
    assert step_of(small_disk / "run" / "last.pt") == 16
    assert status_of(small_disk / "run")["state"] == "done"


@pytest.mark.parametrize(
    "more",
    [
        ["full@6,term@10"],  # 143 would promise that it saved
        ["full@6", "--on-full-disk", "stop"],
    ],
    ids=["SIGTERM", "--on-full-disk stop"],
)
def test_fault_13_a_stop_on_a_full_disk_is_not_called_a_saved_run(small_disk, more):
    outcome = probe(small_disk / "run", *FILLING, *more)
    assert outcome.code == 1, outcome.text
    assert NOT_WRITTEN in outcome.last_line and "training continues" not in outcome.text
    assert "free some space" in outcome.last_line
    assert step_of(small_disk / "run" / "last.pt") == 5
    assert not list((small_disk / "run").glob("*.tmp.*"))


def test_fault_13_limit_on_file_sizes_leaves_no_part_of_a_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "-", sys.executable]  # 64 KB
    args = ["--width", 1000, "--epochs", 1, "--run-dir", run_dir]
    outcome = run_to_end([PROBE, *args], program=limited)
    assert outcome.code == 1, outcome.text  # nothing of what was trained is on the disk
    assert "WARNING: the checkpoint of step 5 was not written: [Errno 27]" in outcome.text
    assert not list(run_dir.glob("last*"))
    assert max(losses(run_dir)) == 16


def test_fault_14_too_little_disk_is_refused_before_the_first_step(
    tmp_path, interrupted, monkeypatch
):
    written = (interrupted / "last.pt").stat().st_size
    space = SimpleNamespace(free=int(2.5 * written))  # keep 2 and one being written: 3 needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: space)
    outcome = probe(tmp_path / "other")
    assert outcome.code == 2
    assert "GB free" in outcome.last_line
    assert "--keep" in outcome.last_line
    assert not losses(tmp_path / "other")


@pytest.mark.parametrize("ranks", [1, 2])
def test_fault_19_resumed_run_has_the_losses_of_an_undisturbed_one(
    stopped, undisturbed, tmp_path, ranks
):
    run_dir = shutil.copytree(stopped(ranks)[0], tmp_path / "run")
    assert 16 // ranks < max(losses(run_dir)) < 48 // ranks, "not stopped on its way"
    args = ["--nproc", ranks, "--workers", 2, "--run-dir", run_dir]
    outcome = run_to_end([PROBE, *args])
    assert outcome.code == 0, outcome.text
    assert "continuing from" in outcome.text
    assert losses(run_dir) == undisturbed(ranks)


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (16, 2), (48, 0)])
def test_fault_19_first_and_last_step_of_an_epoch_and_of_the_run(
    tmp_path, undisturbed, step, workers
):
    run_dir = tmp_path / "run"
    assert probe(run_dir, "--fault", f"term@{step}", "--workers", workers).code == 143
    assert probe(run_dir, "--workers", workers).code == 0
    assert losses(run_dir) == undisturbed(1)


def test_fault_19_failed_run_is_continued_from_its_last_checkpoint(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    assert probe(run_dir, "--fault", "raise@14").code == 1
    assert max(losses(run_dir)) == 13
    outcome = probe(run_dir)
    assert "at step 10 of 48" in outcome.text
    assert losses(run_dir) == undisturbed(1)


def test_fault_19_tensorboard_shows_each_step_once_after_a_resume(interrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    probe(interrupted)
    events = EventAccumulator(str(interrupted / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 49))


def test_fault_20_other_number_of_processes_moves_the_run_aside(stopped, tmp_path):
    run_dir = shutil.copytree(stopped(2)[0], tmp_path / "run")
    outcome = probe(run_dir, "--nproc", 1)
    assert outcome.code == 0
    assert "world_size: 2 → 1" in outcome.text
    assert moved_aside(run_dir) == ["run.1"]


def test_fault_20_named_checkpoint_of_another_number_of_processes(stopped, tmp_path):
    run_dir = shutil.copytree(stopped(2)[0], tmp_path / "run")
    names = ("config.json", "status.json", "metrics.jsonl", "last.pt")
    before = {name: (run_dir / name).read_bytes() for name in names}
    args = ["--nproc", 1, "--resume", run_dir / "last.pt"]
    refused = probe(run_dir, *args)
    assert refused.code == 2
    assert "written by 2 process(es), this run has 1" in refused.last_line
    assert "--nproc 2" in refused.last_line
    assert "--allow-reshard" in refused.last_line
    # with another config.json the same command as before would no longer continue the run
    assert {name: (run_dir / name).read_bytes() for name in names} == before
    outcome = probe(run_dir, *args, "--allow-reshard")
    assert outcome.code == 0
    assert "2 → 1 processes" in outcome.text


def test_fault_20_other_batch_size_is_refused_by_name(interrupted):
    outcome = probe(interrupted, "--resume", interrupted / "last.pt", "--batch-size", 4)
    assert outcome.code == 2
    assert "batch_size: 8 → 4" in outcome.last_line
    assert "--resume never" in outcome.last_line


def test_fault_21_same_command_after_a_finished_run_starts_a_new_one(finished):
    before, aside = losses(finished), finished.with_name("run.1")
    outcome = probe(finished, "--epochs", 1)
    assert outcome.code == 0
    assert outcome.text.count("a new run starts: the run there is finished") == 1
    assert str(aside) in outcome.text
    assert losses(aside) == before == losses(finished)
    assert step_of(aside / "last.pt") == 16


def test_fault_21_resume_of_a_finished_run_says_so_and_takes_more_epochs(finished):
    before = losses(finished)
    outcome = probe(finished, "--epochs", 1, "--resume", finished / "last.pt")
    assert outcome.code == 0
    assert "this run is finished" in outcome.text
    assert losses(finished) == before
    assert status_of(finished)["state"] == "done"
    assert probe(finished, "--resume", finished, "--epochs", 2).code == 0
    assert max(losses(finished)) == 32
    assert not moved_aside(finished)


def test_fault_22_resume_with_other_settings_lists_them(interrupted):
    args = ["--resume", interrupted / "last.pt", "--width", 32, "--dropout", 0.5, "--workers", 2]
    outcome = probe(interrupted, *args)
    assert outcome.code == 2
    assert "width: 16 → 32" in outcome.last_line
    assert "dropout: 0.1 → 0.5" in outcome.last_line
    assert "workers" not in outcome.last_line, "workers may change"


def test_fault_22_resume_into_another_model_lists_the_shapes(interrupted):
    config = interrupted / "config.json"
    written = json.loads(config.read_text())
    written["settings"]["width"] = 32  # somebody edits the file
    config.write_text(json.dumps(written))
    outcome = probe(interrupted, "--resume", interrupted / "last.pt")
    assert outcome.code == 2
    assert "0.weight: (16, 4) → (32, 4)" in outcome.last_line
    assert "3.weight: (2, 16) → (2, 32)" in outcome.last_line


def test_fault_22_other_settings_without_resume_move_the_run_aside(interrupted):
    outcome = probe(interrupted, "--batch-size", 4, "--epochs", 1)
    assert outcome.code == 0
    line = next(line for line in outcome.text.splitlines() if "a new run starts" in line)
    assert "batch_size: 8 → 4" in line
    assert "epochs: 3 → 1" in line
    assert moved_aside(interrupted) == ["run.1"]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_fault_23_checkpoint_that_would_run_code_is_refused(interrupted, tmp_path):
    payload = tmp_path / "payload"
    state = torch.load(interrupted / "last.pt", weights_only=True)
    torch.save(state | {"extra": Evil(payload)}, interrupted / "last.pt")
    for args in ([], ["--resume", interrupted / "last.pt"]):
        outcome = probe(interrupted, *args)
        assert outcome.code == 2
        assert "could run code" in outcome.last_line
        assert not payload.exists()
