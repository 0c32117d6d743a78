"""From the command to the first step: a fresh run beside one that continues from its checkpoint.

    python tests/benchmarks/resume_time.py --repeats 5 --megabytes 64

The probe recipe is stopped in the middle of an epoch; each round then starts it anew in an empty
directory, and again in a copy of the stopped run's, until the next step stands in metrics.jsonl.
Beside it, what reading a checkpoint costs: checkpoint.load checks every byte, torch.load does not.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

from tests.benchmarks.measure import ROOT, compare, conclude, in_turn

PROBE = ROOT / "tests" / "faults" / "probe_recipe.py"
LIMIT = 120.0  # seconds to wait for a step
FLAGS = ["--epochs", "400", "--step-ms", "5", "--log-every", "1", "--device", "cpu"]


def start(run_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(PROBE), *FLAGS, "--run-dir", str(run_dir)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rows_of(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Return when a step after `step` stands in the run's metrics."""
    until = time.monotonic() + LIMIT
    while process.poll() is None and time.monotonic() < until:
        rows = rows_of(run_dir)
        if rows and rows[-1].endswith("}") and json.loads(rows[-1])["step"] > step:
            return
        time.sleep(0.002)
    raise RuntimeError(f"no step after {step} in {run_dir} (exit code {process.poll()})")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    if process.wait(LIMIT) != 143:
        raise RuntimeError(f"the probe left with {process.returncode} in place of 143")


def stopped_run(run_dir: Path) -> int:
    """Leave a run stopped in its second epoch in `run_dir`; its step."""
    process = start(run_dir)
    wait_for_step(run_dir, 20, process)
    stop(process)
    return int(json.loads((run_dir / "status.json").read_text())["step"])


def first_step(run_dir: Path, step: int) -> float:
    """Seconds until a step after `step` is done in `run_dir`."""
    begun = time.perf_counter()
    process = start(run_dir)
    wait_for_step(run_dir, step, process)
    seconds = time.perf_counter() - begun
    stop(process)
    shutil.rmtree(run_dir)
    return seconds


def compare_starts(directory: Path, repeats: int) -> dict[str, dict[str, float]]:
    origin = directory / "stopped"
    step = stopped_run(origin)

    def resumed() -> float:
        shutil.copytree(origin, directory / "again")
        for row in rows_of(directory / "again")[-1:]:
            assert json.loads(row)["step"] == step  # no later row could be taken for the new one
        return first_step(directory / "again", step)

    sides = {"fresh run": lambda: first_step(directory / "fresh", 0), "resumed run": resumed}
    return compare("command to first step", "s", in_turn(sides, repeats), "fresh run")


def compare_loads(directory: Path, megabytes: int, repeats: int) -> dict[str, dict[str, float]]:
    import torch

    from shared import checkpoint

    path = directory / "big.pt"
    checkpoint.save(path, {"weights": torch.randn(megabytes * 250_000)})

    def timed(load: object) -> float:
        begun = time.perf_counter()
        load(path)  # type: ignore[operator]
        return (time.perf_counter() - begun) * 1e3

    sides = {
        "torch.load": lambda: timed(lambda p: torch.load(p, weights_only=True)),
        "checkpoint.load": lambda: timed(checkpoint.load),
    }
    return compare(f"reading {megabytes} MB", "ms", in_turn(sides, repeats), "torch.load")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        starts = compare_starts(Path(name), args.repeats)
        loads = compare_loads(Path(name), args.megabytes, args.repeats)
    conclude("resume_time", "s, ms", starts=starts, loads=loads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
