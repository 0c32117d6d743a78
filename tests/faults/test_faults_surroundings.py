"""Rows 38, 41 to 47 of the fault matrix: ports, memory, streams, clocks, text (see README.md)."""

import itertools
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import probe_recipe
from tests.harness import (
    PROBE,
    ROOT,
    Running,
    environment,
    losses,
    run_here,
    run_to_end,
    start,
    status_of,
    wait_for_step,
)

pytestmark = pytest.mark.limit(240)


def probe(run_dir, *args):
    return run_here(probe_recipe.main, ["--run-dir", run_dir, *args])


def test_fault_38_two_runs_at_once_while_the_usual_port_is_taken(tmp_path):
    with socket.socket() as usual:
        usual.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            usual.bind(("127.0.0.1", 29500))
            usual.listen()
        except OSError:
            pass  # somebody else holds it: the same to the runs
        both = [start([PROBE, "--nproc", 2, "--run-dir", tmp_path / name]) for name in "ab"]
        with both[0], both[1]:
            assert [running.finish().code for running in both] == [0, 0]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_fault_41_full_device_ends_the_run_with_a_hint(tmp_path):
    outcome = probe(tmp_path / "run", "--fault", "oom@3")
    assert outcome.code == 1
    assert "OutOfMemoryError: CUDA out of memory" in outcome.last_line
    assert "lower --batch-size" in outcome.last_line
    assert "--amp bf16" in outcome.last_line
    assert "at step 3 of 48" in outcome.last_line
    assert status_of(tmp_path / "run")["state"] == "failed"


def test_fault_42_small_shared_memory_ends_the_run_with_a_hint(tmp_path):
    outcome = probe(tmp_path / "run", "--fault", "shm@3")
    assert outcome.code == 1
    assert "lower --workers (0: none)" in outcome.last_line
    assert "--shm-size" in outcome.last_line


def test_fault_42_loader_workers_in_a_shared_memory_that_is_too_small(tmp_path):
    own = ["unshare", "--mount", "bash", "-c"]
    tiny = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    if subprocess.run([*own, tiny, "-", "true"], capture_output=True, check=False).returncode:
        pytest.skip(
            "only root may mount a /dev/shm of its own; the wordings are tested beside this"
        )
    run_dir = tmp_path / "run"
    args = ["--workers", 2, "--batch-size", 2048, "--num-points", 4096, "--run-dir", run_dir]
    outcome = run_to_end([PROBE, *args], program=[*own, tiny, "-", sys.executable])
    assert outcome.code == 1
    assert "unable to allocate shared memory" in outcome.last_line, outcome.text
    assert "--shm-size" in outcome.last_line
    assert len(outcome.last_line) < 500, "the loader worker's traceback is not for the last line"
    assert status_of(run_dir)["state"] == "failed"


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_fault_43_output_that_cannot_be_written_ends_no_training(tmp_path, streams):
    run_dir = tmp_path / "run"
    shell = ["bash", "-c", f'exec "$@" {streams}', "-", sys.executable]
    assert run_to_end([PROBE, "--epochs", 1, "--run-dir", run_dir], program=shell).code == 0
    assert max(losses(run_dir)) == 16
    assert status_of(run_dir)["state"] == "done"


def test_fault_43_reader_that_goes_away_ends_no_training(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, str(PROBE), "--nproc", "2", "--step-ms", "50"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with Running([*command, "--run-dir", str(run_dir)], environment(), **pipe) as running:
        wait_for_step(run_dir, 2, running)
        running.process.stdout.close()  # as `| head` does
        assert running.finish().code == 0
    assert max(losses(run_dir)) == 24
    assert status_of(run_dir)["exit_code"] == 0


def test_fault_44_clock_that_jumps_leaves_plausible_numbers(tmp_path, monkeypatch):
    jumps = itertools.cycle([3600.0, -7200.0])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    assert probe(tmp_path / "run", "--epochs", 1).code == 0
    assert 0 <= status_of(tmp_path / "run")["eta_s"] < 60


def test_fault_45_run_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    outcome = probe(tmp_path / "run", "--epochs", 1)
    assert outcome.code == 0
    assert outcome.text.count("WARNING: no TensorBoard") == 1
    assert max(losses(tmp_path / "run")) == 16


def old_python() -> str | None:
    """An interpreter from 3.8 to 3.10, on PATH or behind a version manager's empty shim."""
    for name in ("python3.10", "python3.9", "python3.8"):
        managed = Path.home().glob(f".pyenv/versions/3.*/bin/{name}")
        for program in (shutil.which(name), *map(str, managed)):
            if program and subprocess.run([program, "-V"], capture_output=True).returncode == 0:
                return program
    return None


def test_fault_46_old_python_is_refused_in_one_line():
    program = old_python()
    if program is None:
        pytest.skip("no Python older than 3.11 on this machine; one is imitated beside this")
    ended = subprocess.run([program, PROBE], capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    assert ended.stderr.startswith("Python 3.11 or newer is needed, this is 3.")
    assert "./setup.sh" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("version", [(3, 10, 13), (2, 7, 18)])
def test_fault_46_imitated_old_python_is_refused_in_one_line(monkeypatch, capsys, version):
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "shared" / "errors.py"))
    assert left.value.code == 3
    said = capsys.readouterr().err
    assert said.startswith("Python 3.11 or newer is needed")
    assert said.count("\n") == 1


ASCII = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii"}


def test_fault_47_ascii_locale_and_a_path_with_chinese_characters(tmp_path):
    run_dir = tmp_path / "数据 集 $(touch X)" / "-run'"
    assert run_here(probe_recipe.main, ["--fault", "term@3", "--run-dir", run_dir]).code == 143
    outcome = run_to_end([PROBE, "--nproc", 2, "--run-dir", run_dir], **ASCII)
    assert outcome.code == 0, outcome.text
    assert f"the run in {run_dir} is now in {run_dir}.1" in outcome.text  # that of one process
    assert max(losses(run_dir)) == 24
    assert not Path("X").exists()


def test_fault_47_message_with_chinese_characters_is_whole_in_an_ascii_locale():
    outcome = run_to_end([PROBE, "--resume", "/数据/没有.pt"], **ASCII)
    assert outcome.code == 2
    assert "--resume /数据/没有.pt: no such checkpoint" in outcome.text
