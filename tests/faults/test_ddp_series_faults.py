"""The steps of shared/ddp_series as users start them: killed, stopped, on two hosts, continued."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.harness import ROOT, Running, free_port, ranks_of, start, wait_until

pytestmark = [pytest.mark.serial, pytest.mark.slow, pytest.mark.limit(300)]

SERIES = ROOT / "shared" / "ddp_series"
TORCHRUN = [Path(sys.executable).with_name("torchrun")]
EPOCHS = 20  # long enough to be killed in the middle of
LEFT_BEHIND = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
tasks = "/proc/self/task"
names = [open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)]
os.write(1, f"left behind: {[name for name in names if 'gloo' in name]}\\n".encode())
"""


def torchrun(step: str, snapshot: Path, *flags: object, **env: str) -> Running:
    """`torchrun FLAGS STEP.py 20 1`, as a user types it, with two processes in all."""
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    own = [*flags, f"--nproc_per_node={1 if '--nnodes=2' in flags else 2}"]
    words = [SERIES / f"{step}.py", EPOCHS, 1, "--snapshot_path", snapshot]
    return start([*own, *words], program=TORCHRUN, **env)


def load(snapshot: Path) -> dict[str, Any]:
    return torch.load(snapshot, map_location="cpu", weights_only=True)


def epochs(text: str) -> list[int]:
    """The epochs that rank 0 has run."""
    return [int(number) for number in re.findall(r"\[rank 0\] Epoch (\d+) \| Loss", text)]


class Undisturbed(NamedTuple):
    """Two processes that nothing happened to: what they said, their snapshot and an early one."""

    text: str
    end: dict[str, Any]
    early: bytes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    snapshot, driver = folder / "snapshot.pt", folder / "driver.py"
    driver.write_text(LEFT_BEHIND)
    words = [driver, SERIES / "multigpu_torchrun.py", EPOCHS, 1, "--snapshot_path", snapshot]
    with start(["--standalone", "--nproc_per_node=2", *words], program=TORCHRUN) as running:
        running.wait_for_text("Epoch 3 | Snapshot saved")
        early = snapshot.read_bytes()
        outcome = running.finish()
    assert outcome.code == 0, outcome.text
    assert epochs(outcome.text) == list(range(EPOCHS))
    return Undisturbed(outcome.text, load(snapshot), early)


def same(left: Any, right: Any) -> bool:
    """Whether two snapshots agree to the bit: weights, momentum, epochs."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_the_threads_of_the_group_end_with_it(undisturbed):
    """One that is alive while the interpreter ends can abort the process: a finished run failed."""
    assert undisturbed.text.count("left behind: []") == 2, undisturbed.text


@pytest.mark.parametrize(
    "flags",
    [
        "--standalone",
        pytest.param("--rdzv-backend=c10d --rdzv-endpoint=localhost:0", marks=pytest.mark.full),
        pytest.param("--nnodes=1 --master-port={port}", marks=pytest.mark.full),
    ],
)
def test_group_whose_worker_is_killed_ends_as_an_undisturbed_one(tmp_path, undisturbed, flags):
    snapshot = tmp_path / "snapshot.pt"
    words = [*flags.format(port=free_port()).split(), "--max-restarts=3"]
    with torchrun("multigpu_torchrun", snapshot, *words) as running:
        running.wait_for_text("[rank 0] Epoch 3 |")
        os.kill(ranks_of(running)[1], signal.SIGKILL)
        outcome = running.finish()
        assert running.leaves_nothing()
    assert outcome.code == 0, outcome.text
    assert outcome.text.count("Resuming training") == 2, "not one restart of two processes"
    done = epochs(outcome.text)
    assert done[-1] == EPOCHS - 1
    assert len(done) <= EPOCHS + 1, "more than the epoch in which the kill fell was run twice"
    assert same(load(snapshot), undisturbed.end)


@pytest.mark.full
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_stopped_group_ends_and_the_same_command_continues(
    tmp_path, undisturbed, number, processes
):
    snapshot = tmp_path / "snapshot.pt"
    with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
        running.wait_for_text("[rank 0] Epoch 3 |")
        running.signal(number)
        assert running.finish().code != 0
        assert running.leaves_nothing()
    stopped = load(snapshot)["EPOCHS_RUN"]
    assert 3 <= stopped < EPOCHS
    words = [SERIES / "multigpu_torchrun.py", EPOCHS, 1, "--snapshot_path", snapshot]
    own = ["--standalone", f"--nproc_per_node={processes}"]  # another number continues, too
    with start([*own, *words], program=TORCHRUN) as running:
        then = running.finish()
    assert then.code == 0, then.text
    assert epochs(then.text) == list(range(stopped, EPOCHS))
    assert processes == 1 or same(load(snapshot), undisturbed.end)


def test_nothing_is_left_of_processes_that_the_script_started(tmp_path):
    words = [SERIES / "multigpu.py", 2000, 2000, "--nproc", 2]
    with start([*words, "--checkpoint_path", tmp_path / "checkpoint.pt"]) as running:
        running.wait_for_text("[rank 1] Epoch 1 |")
        running.signal(signal.SIGTERM)
        assert running.finish().code == -signal.SIGTERM
        assert running.leaves_nothing()


def test_two_hosts_without_a_common_disk_continue_and_end_as_two_processes(tmp_path, undisturbed):
    own, other = (tmp_path / f"host{number}" / "snapshot.pt" for number in (0, 1))
    own.parent.mkdir()
    own.write_bytes(undisturbed.early)
    begin = load(own)["EPOCHS_RUN"]
    assert 3 < begin < EPOCHS
    meeting = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    both = [
        torchrun("multinode_torchrun", snapshot, *meeting, f"--node-rank={number}")
        for number, snapshot in enumerate((own, other))
    ]
    with both[0], both[1]:
        then = both[0].finish()
        assert [then.code, both[1].finish().code] == [0, 0], then.text
    assert not other.exists(), "a process other than rank 0 has written"
    assert epochs(then.text) == list(range(begin, EPOCHS))
    assert same(load(own), undisturbed.end)


@pytest.mark.full
def test_two_hosts_start_again_when_a_worker_of_one_is_killed(tmp_path, undisturbed):
    """As slurm/sbatch_run.sh starts them: c10d, the agents' store kept from the workers."""
    flags = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=7", "--max-restarts=3"]
    flags.append(f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    snapshot = tmp_path / "snapshot.pt"
    kept = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    both = [torchrun("multinode_torchrun", snapshot, *flags, **kept) for _ in range(2)]
    with both[0], both[1]:
        said = lambda: any("Epoch 3 |" in running.text for running in both)  # noqa: E731
        wait_until(said, "epoch 3", 120, both[0])
        (victim,) = ranks_of(both[1]).values()
        os.kill(victim, signal.SIGKILL)
        outcomes = [running.finish() for running in both]
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].text + outcomes[1].text
        assert all(running.leaves_nothing() for running in both)
    assert same(load(snapshot), undisturbed.end)
