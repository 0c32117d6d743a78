"""Rows 15, 35 to 37, 39 of the fault matrix: directories, flags, files, devices (see README.md)."""

import pytest

from shared import device, launch
from tests.faults import probe_recipe
from tests.harness import PROBE, losses, run_here, run_to_end, start, status_of, wait_for_step

pytestmark = pytest.mark.limit(240)


def probe(*args):
    return run_here(probe_recipe.main, args)


def is_one_line(outcome):
    return outcome.text.startswith("error: ") and outcome.text.count("\n") == 1


@pytest.mark.parametrize("place", ["below a file", "/proc/no/such"])
def test_fault_15_run_directory_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "below a file").write_text("")
    outcome = probe("--run-dir", tmp_path / place / "run")
    assert outcome.code == 2
    assert f"the run directory {tmp_path / place}" in outcome.last_line
    assert "choose another --run-dir" in outcome.last_line
    assert "Traceback" not in outcome.text
    assert "step=" not in outcome.text


def test_fault_15_two_processes_say_it_once(tmp_path):
    (tmp_path / "file").write_text("")
    outcome = run_to_end([PROBE, "--nproc", 2, "--run-dir", tmp_path / "file" / "run"])
    assert outcome.code == 2
    assert outcome.text.count("cannot be written") == 1
    assert outcome.last_line.startswith("error: the run directory")
    assert "Traceback" not in outcome.text


@pytest.mark.parametrize("mask", ["", "7", "GPU-8932f937", "nonsense"])
def test_fault_36_mask_on_a_machine_without_a_gpu_runs_on_the_cpu(tmp_path, monkeypatch, mask):
    monkeypatch.setattr(device, "present_gpus", lambda: 0)
    monkeypatch.setattr(launch, "present_gpus", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    outcome = probe("--epochs", 1, "--run-dir", tmp_path / "run")
    assert outcome.code == 0
    assert "no visible GPU: running on the CPU" in outcome.text


@pytest.mark.parametrize(
    ("args", "environ", "said"),
    [
        (["--nproc", 3], {}, "--nproc 3: 2 GPU(s) are visible; allowed: 1 to 2"),
        ([], {"NPROC_PER_NODE": "3"}, "3: 2 GPU(s) are visible"),
        (["--nproc", 2], {"CUDA_VISIBLE_DEVICES": "1"}, "1 GPU(s) are visible; allowed: 1 to 1"),
        (["--nproc", 0], {}, "nproc must be a whole number from 1"),
        (["--nproc", 1000, "--device", "cpu"], {}, "--nproc 1000: no GPU is visible"),
        ([], {"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE"),
        (["--nnodes", 2, "--node-rank", 2], {}, "--node-rank 2 of --nnodes 2"),
    ],
)
def test_fault_37_more_processes_than_devices_are_refused_before_they_start(
    monkeypatch, args, environ, said
):
    monkeypatch.setattr(launch, "present_gpus", lambda: 2)
    for name in ("_alone", "_together"):
        monkeypatch.setattr(launch, name, lambda *_: pytest.fail("it was started"))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    outcome = probe(*args)
    assert outcome.code == 2
    assert is_one_line(outcome)
    assert said in outcome.text


def test_fault_37_several_hosts_need_a_meeting_point(tmp_path):
    outcome = probe("--nnodes", 2, "--nproc", 1, "--run-dir", tmp_path / "run")
    assert (outcome.code, is_one_line(outcome)) == (2, True)
    assert "--nnodes 2 needs a meeting point: --master-addr" in outcome.text


def test_fault_39_run_directory_of_a_live_run_is_refused(tmp_path):
    run_dir = tmp_path / "run"
    with start([PROBE, "--step-ms", 50, "--run-dir", run_dir]) as running:
        wait_for_step(run_dir, 3, running)
        second = probe("--run-dir", run_dir)
        assert second.code == 2
        assert f"is in use by a live run (pid {running.pid})" in second.last_line
        assert "--run-dir" in second.last_line
        assert running.process.poll() is None
        assert running.finish().code == 0
    assert sorted(losses(run_dir)) == list(range(1, 49))
    assert status_of(run_dir)["state"] == "done"
    assert not list(tmp_path.glob("run.*"))
