"""The steps of shared/ddp_series as users start them: killed, stopped, on two hosts, continued."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import (
    ROOT,
    Running,
    children_of,
    free_port,
    moments,
    ranks_of,
    start,
    wait_until,
)

pytestmark = [pytest.mark.serial, pytest.mark.slow, pytest.mark.limit(300)]

SERIES = ROOT / "shared" / "ddp_series"
TORCHRUN = [Path(sys.executable).with_name("torchrun")]
EPOCHS = 20  # long enough to be killed in the middle of


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The snapshot of two processes that nothing happened to."""
    snapshot = tmp_path_factory.mktemp("undisturbed") / "snapshot.pt"
    with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome.text
    assert epochs(outcome.text) == list(range(EPOCHS))
    return snapshot


def same(left: Any, right: Any) -> bool:
    """Whether two snapshots agree to the bit: weights, momentum, epochs."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


RENDEZVOUS = [
    "--standalone",
    *(
        pytest.param(flags, marks=pytest.mark.full)
        for flags in (
            "--rdzv-backend=c10d --rdzv-endpoint=localhost:0",
            "--nnodes=1 --master-port={port}",
        )
    ),
]


@pytest.mark.parametrize("flags", RENDEZVOUS)
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
    assert same(load(snapshot), load(undisturbed))


def stopped_at_epoch_3(snapshot: Path, number: int = signal.SIGTERM) -> int:
    """How many epochs two processes have run and saved that were stopped in the fourth."""
    with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
        running.wait_for_text("[rank 0] Epoch 3 |")
        running.signal(number)
        assert running.finish().code != 0
        assert running.leaves_nothing()
    stopped = load(snapshot)["EPOCHS_RUN"]
    assert 3 <= stopped < EPOCHS
    return stopped


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)]
)
def test_stopped_group_ends_and_the_same_command_continues(tmp_path, undisturbed, number):
    snapshot = tmp_path / "snapshot.pt"
    stopped = stopped_at_epoch_3(snapshot, number)
    with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
        then = running.finish()
        assert then.code == 0, then.text
    assert epochs(then.text) == list(range(stopped, EPOCHS))
    assert same(load(snapshot), load(undisturbed))


@pytest.mark.full
def test_snapshot_is_whole_whenever_the_group_is_killed(tmp_path, undisturbed):
    snapshot, epochs_run = tmp_path / "snapshot.pt", 0
    for moment in moments(4, 0.5):
        with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
            running.wait_for_text(f"Epoch {epochs_run} | Snapshot saved")
            time.sleep(moment)  # the moment of the kill is the experiment
            running.kill()
        assert load(snapshot)["EPOCHS_RUN"] > epochs_run
        epochs_run = load(snapshot)["EPOCHS_RUN"]
        if epochs_run == EPOCHS:
            break  # a fast machine
    with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
        assert running.finish().code == 0
    assert same(load(snapshot), load(undisturbed))


@pytest.mark.parametrize("victim", ["script", pytest.param("worker", marks=pytest.mark.full)])
def test_nothing_is_left_of_processes_that_the_script_started(tmp_path, victim):
    words = [SERIES / "multigpu.py", 2000, 2000, "--nproc", 2]
    with start([*words, "--checkpoint_path", tmp_path / "checkpoint.pt"]) as running:
        running.wait_for_text("[rank 1] Epoch 1 |")
        workers = [pid for pid in children_of(running.pid) if "spawn_main" in command_of(pid)]
        assert len(workers) == 2
        if victim == "script":
            running.signal(signal.SIGTERM)
        else:
            os.kill(workers[1], signal.SIGKILL)
        outcome = running.finish()
        assert running.leaves_nothing()
    assert outcome.code == (-signal.SIGTERM if victim == "script" else 1), outcome.text


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")


def hosts(folder: Path) -> list[Running]:
    """An agent a host, both on the loopback; each with a directory that the other does not see."""
    meeting = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [
        torchrun("multinode_torchrun", folder / f"host{number}" / "snapshot.pt", *meeting,
                 f"--node-rank={number}")
        for number in (0, 1)
    ]  # fmt: skip


def test_two_hosts_without_a_common_disk_stop_and_end_as_two_processes(tmp_path, undisturbed):
    own, other = (tmp_path / f"host{number}" / "snapshot.pt" for number in (0, 1))
    both = hosts(tmp_path)
    with both[0], both[1]:
        both[0].wait_for_text("[rank 0] Epoch 3 |")
        both[1].signal(signal.SIGTERM)  # the other host's processes fail without their peers
        assert all(running.finish().code != 0 for running in both)
        assert all(running.leaves_nothing() for running in both)
    stopped = load(own)["EPOCHS_RUN"]
    assert 3 <= stopped < EPOCHS
    assert not other.exists(), "a process other than rank 0 has written"
    both = hosts(tmp_path)
    with both[0], both[1]:
        then = both[0].finish()
        assert [then.code, both[1].finish().code] == [0, 0], then.text
    assert not other.exists()
    assert epochs(then.text) == list(range(stopped, EPOCHS))
    assert same(load(own), load(undisturbed))


@pytest.mark.full
def test_two_hosts_start_again_when_a_worker_of_one_is_killed(tmp_path, undisturbed):
    """As slurm/sbatch_run.sh starts them: c10d, the agents' store kept from the workers."""
    port = free_port()
    flags = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=7", "--max-restarts=3"]
    flags.append(f"--rdzv-endpoint=127.0.0.1:{port}")
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
    assert same(load(snapshot), load(undisturbed))


@pytest.mark.full
def test_fewer_processes_continue_from_the_snapshot_of_more(tmp_path):
    snapshot = tmp_path / "snapshot.pt"
    stopped = stopped_at_epoch_3(snapshot)
    words = [SERIES / "multigpu_torchrun.py", EPOCHS, 1, "--snapshot_path", snapshot]
    one = ["--standalone", "--nproc_per_node=1", *words]
    with start(one, program=TORCHRUN) as running:
        outcome = running.finish()
    assert outcome.code == 0, outcome.text
    assert epochs(outcome.text) == list(range(stopped, EPOCHS))


LEFT_BEHIND = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
tasks = "/proc/self/task"
names = [open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)]
os.write(1, f"left behind: {[name for name in names if 'gloo' in name]}\\n".encode())
"""


@pytest.mark.parametrize(
    "step", ["multigpu_torchrun", pytest.param("multinode_torchrun", marks=pytest.mark.full)]
)
def test_the_threads_of_the_group_end_with_it(tmp_path, step):
    """One that is alive while the interpreter ends can abort the process: a finished run failed."""
    driver = tmp_path / "driver.py"
    driver.write_text(LEFT_BEHIND)
    words = ["--standalone", "--nproc_per_node=2", driver, SERIES / f"{step}.py", 1, 1]
    with start([*words, "--snapshot_path", tmp_path / "s.pt"], program=TORCHRUN) as running:
        outcome = running.finish()
    assert outcome.code == 0, outcome.text
    assert outcome.text.count("left behind: []") == 2, outcome.text
