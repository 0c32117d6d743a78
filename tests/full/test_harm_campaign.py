"""What must do no harm, on the real recipes: kills, full disks, no locks, pipes, forged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import ROOT, Outcome, Running, moments, start, status_of, wait_until
from tests.trainings import TRAININGS, records

pytestmark = [pytest.mark.full, pytest.mark.serial, pytest.mark.limit(1200)]
MONITOR = ROOT / "shared" / "tools" / "monitor.py"
every_recipe = pytest.mark.parametrize("recipe", TRAININGS)


class Command:
    """One training of a recipe on its smallest data; typed again it continues."""

    def __init__(self, recipe: str, root: Path) -> None:
        training = TRAININGS[recipe](root / "data")
        self.run_dir = training.run_dir(root / "run")
        self.words = [training.script, *training.words(root / "run", "--save-every", 1)]
        if recipe == "face_distill":
            self.words.append("--no-cache")  # which fills /dev/shm and not the small disk

    def start(self, program: list[object] | None = None, **env: str) -> Running:
        return start(self.words, program=program, **env)

    def finish(self, **env: str) -> Outcome:
        with self.start(**env) as running:
            return running.finish(timeout=600)

    def wait_for(self, step: int, running: Running) -> None:
        reached = lambda: max((row["step"] for row in self.records()), default=0) >= step  # noqa: E731
        wait_until(reached, f"step {step}", 600, running)

    def records(self) -> list[dict[str, Any]]:
        return records(self.run_dir)


@every_recipe
def test_killed_at_random_moments_every_recipe_ends_as_if_undisturbed(recipe, tmp_path):
    whole, broken = Command(recipe, tmp_path / "whole"), Command(recipe, tmp_path / "broken")
    assert whole.finish().code == 0
    for moment in moments(3, longest=1.5, seed=1):
        with broken.start() as running:
            broken.wait_for(1, running)
            time.sleep(moment)  # the moment of the kill is the experiment
            running.signal(signal.SIGKILL)
            running.process.wait()
            assert running.leaves_nothing()
        if status_of(broken.run_dir)["state"] == "done":
            break
    if status_of(broken.run_dir)["state"] != "done":
        assert broken.finish().code == 0
    assert broken.records() == whole.records()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 600 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@every_recipe
def test_a_disk_that_fills_up_is_said_and_the_same_command_continues(recipe, small_disk):
    command = Command(recipe, small_disk)
    ballast = small_disk / "ballast"
    with command.start() as running:
        command.wait_for(1, running)
        running.signal(signal.SIGSTOP)
        with ballast.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space"):
            while True:
                stream.write(bytes(1 << 16))
        running.signal(signal.SIGCONT)
        outcome = running.finish(timeout=600)
    assert outcome.code == 1, outcome.text
    assert "No space left on device" in outcome.last_line, outcome.text
    assert outcome.text.count("Traceback") == 0, outcome.text
    ballast.unlink()
    assert command.finish().code == 0
    assert status_of(command.run_dir)["state"] == "done"


@every_recipe
def test_files_that_may_not_grow_end_in_one_line(recipe, tmp_path):
    command = Command(recipe, tmp_path)
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "-", sys.executable]  # 40 KB
    with command.start(program=limited) as running:
        outcome = running.finish(timeout=600)
    assert outcome.code == 1, outcome.text
    assert "File too large" in outcome.last_line
    assert outcome.text.count("Traceback") == 0, outcome.text
    for path in (path for kind in ("*.pth", "*.pt") for path in command.run_dir.rglob(kind)):
        torch.load(path)  # small ones may be there, and are whole
    assert command.finish().code == 0


@every_recipe
def test_without_locks_every_recipe_trains_and_the_monitor_sees_it_done(recipe, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler to take flock away from a process")
    source, library = tmp_path / "flock.c", tmp_path / "flock.so"
    source.write_text("#include <errno.h>\nint flock(int d, int h) { errno = ENOLCK; return -1; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    command = Command(recipe, tmp_path / "root")
    outcome = command.finish(LD_PRELOAD=str(library))
    assert outcome.code == 0, outcome.text
    with start([MONITOR, command.run_dir, "--json"], LD_PRELOAD=str(library)) as watching:
        assert json.loads(watching.finish(timeout=60).text)["state"] == "done"


@every_recipe
def test_a_pipe_in_place_of_a_runs_files_stops_nobody(recipe, tmp_path):
    command = Command(recipe, tmp_path)
    command.run_dir.mkdir(parents=True)
    os.mkfifo(command.run_dir / "status.json")
    outcome = command.finish()
    assert outcome.code == 2, outcome.text
    assert "holds status.json and no run of this toolkit" in outcome.last_line
    with start([MONITOR, command.run_dir]) as watching:
        assert watching.finish(timeout=60).code in (1, 2)


@every_recipe
def test_a_forged_status_reaches_no_process_and_bars_no_run(recipe, tmp_path):
    command = Command(recipe, tmp_path)
    command.run_dir.mkdir(parents=True)
    with subprocess.Popen(["sleep", "1200"]) as other:
        forged = {"schema": 1, "state": "running", "pid": other.pid, "host": socket.gethostname()}
        forged |= {"started_at": "2999-01-01T00:00:00Z", "updated_at": "2999-01-01T00:00:00Z"}
        (command.run_dir / "status.json").write_text(json.dumps(forged))
        with start([MONITOR, command.run_dir, "--stop"]) as stopping:
            assert stopping.finish(timeout=60).code == 2
        assert command.finish().code == 0
        assert other.poll() is None
        other.kill()
