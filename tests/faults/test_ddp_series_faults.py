"""The steps of shared/ddp_series as users start them: killed, stopped, on two hosts, continued."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from shared import checkpoint
from tests.harness import ROOT, Running, free_port, ranks_of, start, wait_until

pytestmark = [pytest.mark.serial, pytest.mark.slow, pytest.mark.limit(300)]

SERIES = ROOT / "shared" / "ddp_series"
TORCHRUN = [Path(sys.executable).with_name("torchrun")]
EPOCHS = 20  # long enough to be killed in the middle of
FLAGS = [EPOCHS, 1, "--dropout", 0.2, "--device", "cpu", "--snapshot-path"]


def torchrun(step: str, snapshot: Path, *flags: object, **env: str) -> Running:
    """`torchrun FLAGS STEP.py 20 1`, as a user types it."""
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    own = [*flags, f"--nproc_per_node={1 if '--nnodes=2' in flags else 2}"]
    return start([*own, SERIES / f"{step}.py", *FLAGS, snapshot], program=TORCHRUN, **env)


def position(snapshot: Path) -> dict[str, int]:
    return checkpoint.load(snapshot)["position"]


def epochs(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"epoch (\d+), step", text)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The snapshot of two processes that nothing happened to."""
    snapshot = tmp_path_factory.mktemp("undisturbed") / "snapshot.pt"
    with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome.text
    assert epochs(outcome.text) == list(range(1, EPOCHS + 1))
    return snapshot


def same_end(left: Path, right: Path) -> bool:
    """Whether two snapshots agree to the bit: weights, momentum, schedule, generators, position."""
    return _same(checkpoint.load(left), checkpoint.load(right))


def _same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right


RENDEZVOUS = [
    pytest.param(["--standalone"], id="standalone"),
    pytest.param(
        ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"],
        id="c10d",
        marks=pytest.mark.full,
    ),
    pytest.param(["--nnodes=1", "--master-port=0"], id="static", marks=pytest.mark.full),
]


@pytest.mark.parametrize("flags", RENDEZVOUS)
def test_group_whose_worker_is_killed_ends_as_an_undisturbed_one(tmp_path, undisturbed, flags):
    snapshot = tmp_path / "snapshot.pt"
    flags = [f"--master-port={free_port()}" if f == "--master-port=0" else f for f in flags]
    with torchrun("multigpu_torchrun", snapshot, *flags, "--max-restarts=3") as running:
        running.wait_for_text("epoch 3,")
        os.kill(ranks_of(running)[1], signal.SIGKILL)
        outcome = running.finish()
        assert running.leaves_nothing()
    assert outcome.code == 0, outcome.text
    assert outcome.text.count("loaded: Position") == 1, "not one restart"
    done = epochs(outcome.text)
    assert done[-1] == EPOCHS
    assert len(done) <= EPOCHS + 1, "more than the epoch in which the kill fell was run twice"
    assert same_end(snapshot, undisturbed)


def test_group_that_gets_sigterm_saves_and_the_same_command_goes_on(tmp_path, undisturbed):
    snapshot = tmp_path / "snapshot.pt"
    with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
        running.wait_for_text("epoch 3,")
        running.signal(signal.SIGTERM)
        first = running.finish()
        assert running.leaves_nothing()
    stopped = position(snapshot)
    assert 3 <= stopped["epoch"] < EPOCHS
    assert f"saved at Position(step={stopped['step']}, " in first.text
    with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
        then = running.finish()
        assert then.code == 0, then.text
    assert epochs(first.text) + epochs(then.text) == list(range(1, EPOCHS + 1))
    assert same_end(snapshot, undisturbed)


@pytest.mark.full
def test_workers_of_a_killed_torchrun_save_and_leave(tmp_path):
    snapshot = tmp_path / "snapshot.pt"
    with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
        running.wait_for_text("epoch 3,")
        running.signal(signal.SIGKILL)
        running.finish()
        assert running.leaves_nothing()
        stopped = position(snapshot)
        assert 3 <= stopped["epoch"] < EPOCHS
        assert f"saved at Position(step={stopped['step']}, " in running.text


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_script_that_starts_its_own_processes_tells_how_it_was_stopped(tmp_path, number, code):
    snapshot = tmp_path / "snapshot.pt"
    args = [SERIES / "multigpu_torchrun.py", *FLAGS, snapshot, "--nproc", 2]
    with start(args) as running:
        running.wait_for_text("epoch 3,")
        running.signal(number)
        outcome = running.finish()
        assert running.leaves_nothing()
    assert outcome.code == code, outcome.text
    assert 3 <= position(snapshot)["epoch"] < EPOCHS


def hosts(folder: Path, *flags: object, **env: str) -> list[Running]:
    """An agent a host, both on the loopback; each with a directory that the other does not see."""
    port = free_port()
    meeting = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return [
        torchrun(
            "multinode_torchrun",
            folder / f"host{number}" / "snapshot.pt",
            *meeting,
            f"--node-rank={number}",
            *flags,
            **env,
        )
        for number in (0, 1)
    ]


def test_two_hosts_without_a_common_disk_stop_go_on_and_end_as_two_processes(tmp_path, undisturbed):
    own, other = (tmp_path / f"host{number}" / "snapshot.pt" for number in (0, 1))
    both = hosts(tmp_path)
    with both[0], both[1]:
        both[0].wait_for_text("epoch 3,")
        both[1].signal(signal.SIGTERM)  # one host is enough: the processes tell each other
        first = both[0].finish()
        both[1].finish()
        assert all(running.leaves_nothing() for running in both)
    assert 3 <= position(own)["epoch"] < EPOCHS
    assert not other.exists(), "a process other than rank 0 has written"
    both = hosts(tmp_path)
    with both[0], both[1]:
        then = both[0].finish()
        assert [then.code, both[1].finish().code] == [0, 0], then.text
    assert not other.exists()
    assert epochs(first.text) + epochs(then.text) == list(range(1, EPOCHS + 1))
    assert same_end(own, undisturbed)


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
        said = lambda: any("epoch 3," in running.text for running in both)  # noqa: E731
        wait_until(said, "epoch 3", 120, both[0])
        (victim,) = ranks_of(both[1]).values()
        os.kill(victim, signal.SIGKILL)
        outcomes = [running.finish() for running in both]
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].text + outcomes[1].text
        assert all(running.leaves_nothing() for running in both)
    assert same_end(snapshot, undisturbed)


@pytest.mark.full
def test_fewer_processes_go_on_from_the_snapshot_of_more(tmp_path):
    snapshot = tmp_path / "snapshot.pt"
    with torchrun("multigpu_torchrun", snapshot, "--standalone") as running:
        running.wait_for_text("epoch 3,")
        running.signal(signal.SIGTERM)
        running.finish()
    stopped = position(snapshot)
    args = [SERIES / "multigpu_torchrun.py", *FLAGS, snapshot]
    with start(args) as running:
        outcome = running.finish()
    assert outcome.code == 0, outcome.text
    batches = 2 * stopped["batch"]  # of half the samples each
    assert f"epoch={stopped['epoch']}, batch={batches})" in outcome.text
    assert epochs(outcome.text) == list(range(stopped["epoch"] + 1, EPOCHS + 1))
