"""File systems without flock (NFS without lockd, some Lustre and FUSE mounts)."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.harness import PROBE, ROOT, losses, run_to_end, start, status_of, wait_for_step

pytestmark = [pytest.mark.serial, pytest.mark.slow]
MONITOR = ROOT / "shared" / "tools" / "monitor.py"
WARNING = "this file system has no locks"
_FLOCK = """
#include <errno.h>
int flock(int descriptor, int how) { errno = %d; return -1; }
"""


@pytest.fixture(scope="module")
def without_locks(tmp_path_factory) -> dict[str, str]:
    """The environment of a program whose flock fails as on such a file system."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler to take flock away from a process")
    place = tmp_path_factory.mktemp("flock")
    (place / "flock.c").write_text(_FLOCK % errno.ENOLCK)
    library = place / "flock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, place / "flock.c"], check=True)
    return {"LD_PRELOAD": str(library)}


def listed(run_dir: Path, environment: dict[str, str]) -> str:
    with start([MONITOR, run_dir, "--json"], **environment) as watching:
        return json.loads(watching.finish(timeout=60).text)["state"]


def test_a_run_trains_stops_and_continues_with_one_warning(tmp_path, without_locks, undisturbed):
    run_dir = tmp_path / "run"
    args = [PROBE, "--step-ms", 400, "--run-dir", run_dir]
    with start(args, **without_locks) as running:
        wait_for_step(run_dir, 3, running)
        assert listed(run_dir, without_locks) == "running"
        with start(args, **without_locks) as second:
            refused = second.finish(timeout=60)
        with start([MONITOR, run_dir, "--stop"], **without_locks) as stopping:
            assert stopping.finish(timeout=60).code == 0
        outcome = running.finish()
    assert (outcome.code, outcome.text.count(WARNING)) == (143, 1)
    assert refused.code == 2
    assert f"in use by a live run (pid {running.pid})" in refused.last_line
    outcome = run_to_end([*args, "--step-ms", 0], **without_locks)
    assert (outcome.code, "continuing from" in outcome.text) == (0, True)
    assert losses(run_dir) == undisturbed(1)
    assert listed(run_dir, without_locks) == "done"


def test_a_run_that_was_killed_is_in_nobodys_way(tmp_path, without_locks):
    args = [PROBE, "--epochs", 1, "--step-ms", 100, "--run-dir", tmp_path]
    with start(args, **without_locks) as running:
        wait_for_step(tmp_path, 2, running)
        running.kill()
    assert run_to_end(args, **without_locks).code == 0
    assert status_of(tmp_path)["state"] == "done"


@pytest.mark.parametrize(("age_s", "is_refused"), [(5, True), (600, False)])
def test_a_run_on_another_host_is_told_by_its_heartbeat(tmp_path, without_locks, age_s, is_refused):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - age_s))
    fields = {"schema": 1, "state": "running", "host": "elsewhere", "pid": 7, "updated_at": moment}
    (run_dir / "status.json").write_text(json.dumps(fields))
    outcome = run_to_end([PROBE, "--epochs", 1, "--run-dir", run_dir], **without_locks)
    assert outcome.code == (2 if is_refused else 0)
    assert ("in use by a live run on elsewhere" in outcome.text) == is_refused
