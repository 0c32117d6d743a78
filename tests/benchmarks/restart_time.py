"""From kill -9 of a worker to the first step of the group that was started again.

    python tests/benchmarks/restart_time.py --repeats 5

Two processes under torchrun train shared/ddp_series/multigpu_torchrun.py with one step an epoch and
a snapshot after each; rank 1 is killed, and the clock runs until the next epoch is printed. Beside
it a fresh start, from the command to its first epoch.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

from tests.benchmarks.measure import ROOT, compare, conclude, in_turn

SCRIPT = str(ROOT / "shared" / "ddp_series" / "multigpu_torchrun.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
FLAGS = ["100000", "1", "--batch_size", "1024", "--snapshot_path"]
LIMIT = 180.0  # seconds to wait for a line


class Run:
    """Two processes started by torchrun; their output, line by line."""

    def __init__(self, folder: str) -> None:
        command = [sys.executable, *TORCHRUN, SCRIPT, *FLAGS, f"{folder}/snapshot.pt"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def wait_for(self, words: str) -> None:
        """Read until a line with `words`."""
        until = time.monotonic() + LIMIT
        assert self._process.stdout
        for line in self._process.stdout:
            if words in line:
                return
            if time.monotonic() > until:
                break
        raise RuntimeError(f"no line with {words!r} (exit code {self._process.poll()})")

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to one of the workers."""
        pid = self._process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                os.kill(int(child), signal.SIGKILL)
                return
        raise RuntimeError(f"no rank {rank} among the children of {pid}")

    def end(self) -> None:
        """Stop it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate(timeout=LIMIT)


def seconds_to_restart() -> float:
    """From the kill to the first epoch of the second start."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        run.wait_for("Epoch 20 |")
        run.kill_rank(1)
        begun = time.perf_counter()
        run.wait_for("Resuming training")
        run.wait_for("| Loss")
        seconds = time.perf_counter() - begun
        run.end()
    return seconds


def seconds_to_start() -> float:
    """From the command to the first epoch."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        run = Run(folder)
        run.wait_for("| Loss")
        seconds = time.perf_counter() - begun
        run.end()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sides = {
        "fresh start, torchrun": seconds_to_start,
        "kill to step, torchrun --standalone": seconds_to_restart,
    }
    found = compare("first step", "s", in_turn(sides, args.repeats), "fresh start, torchrun")
    conclude("restart_time", "s", restarts=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
