"""What one GPU shows: memory beside --estimate, and each recipe's step beside a loop by hand.

    python tests/benchmarks/gpu.py          # one CUDA device; about five minutes
    python tests/benchmarks/gpu.py --tiny   # small models, on the CPU too: whether it works

Real shapes, random weights, no network. For each of four recipes:

- memory: the peak that torch has allocated in a step, beside what the recipe's --estimate says of
  the same step without the row for CUDA itself. They should agree within 10 %.
- speed: the recipe's step with `Run`'s hooks, beside the loop that everyone writes first on the
  same model, data, loss and precision, in turn; samples a second and TFLOP/s. A step's operations
  are counted by torch: forward pass and gradients, of frozen weights those by their inputs alone.

A recipe whose package is missing is named and skipped. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

import torch
from torch.utils.flop_counter import FlopCounterMode

from shared.amp import Amp
from shared.config import RunOptions
from shared.distributed import World
from shared.reporter import Plan
from shared.run import Run
from tests.benchmarks.measure import compare, conclude, in_turn
from tests.gpu.cases import MAKERS, Case
from tests.harness import run_here

NEVER = 10**9  # a step that no benchmark reaches
WITHIN = 0.10  # of what was allocated


@dataclass(frozen=True)
class Config:
    """The settings that `Run` reads."""

    run: RunOptions = field(default_factory=RunOptions)


def estimated(case: Case) -> float:
    """Bytes that --estimate names for a step of `case`, without CUDA's own.

    Raises ImportError where the script lacks a package.
    """
    main = importlib.import_module(case.script).main
    ended = run_here(main, ["--estimate", "--nproc", "1", *case.words])
    if ended.code == 3:
        raise ImportError(ended.last_line)
    rows = re.findall(r"^  (weights|gradients|optimizer|activations) +([\d.]+) (GB|MB)",
                      ended.text, re.M)  # fmt: skip
    if ended.code or len(rows) != 4:
        raise RuntimeError(f"{case.script} --estimate ended with {ended.code}:\n{ended.text}")
    return sum(float(number) * (1e9 if unit == "GB" else 1e6) for _, number, unit in rows)


def allocated(case: Case, device: torch.device) -> float:
    """Bytes allocated at the peak of a step in float32, as --estimate counts it; 0 on a CPU."""
    amp = Amp("off", device)
    case.step(amp)  # the optimizer's state comes with the first
    if device.type != "cuda":
        case.step(amp)
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    case.step(amp)
    return float(torch.cuda.max_memory_allocated(device))


def operations(step: Callable[[], Any]) -> float:
    """Floating-point operations of a step, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def timed(step: Callable[[], Any], steps: int, device: torch.device) -> Callable[[], float]:
    """What takes `steps` steps and returns the milliseconds of each."""

    def side() -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - begun) / steps

    return side


def speeds(case: Case, device: torch.device, args: argparse.Namespace, folder: Path) -> Any:
    """The recipe's step with Run's hooks, and the loop by hand, in turn."""
    amp = Amp(case.amp or args.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp.mode == "fp16")
    options = replace(RunOptions(device=device.type), save_every=NEVER)
    with Run(Config(options), World(device=device), folder / "run", "bench") as run:
        run.restore({"amp": amp}, Plan(NEVER))

        def ours() -> None:
            run.step({"loss": case.step(amp)})

        def by_hand() -> None:
            case.step_by_hand(amp.mode, scaler)

        work = {"by hand": operations(by_hand), "recipe": operations(ours)}
        sides = {"by hand": by_hand, "recipe": ours}
        turns = {name: timed(step, args.steps, device) for name, step in sides.items()}
        title = f"{case.name}: a step, {case.samples} samples, amp {amp.mode}"
        found: dict[str, Any] = compare(title, "ms", in_turn(turns, args.repeats), "by hand")
    for name, row in found.items():
        row["samples_per_second"] = round(1000 * case.samples / row["median"], 2)
        row["tflop"] = round(work[name] / 1e12, 4)
        row["tflop_per_second"] = round(work[name] / row["median"] / 1e9, 2)
        rate = f"{row['tflop']:.3g} TFLOP a step, {row['tflop_per_second']:.3g} TFLOP/s"
        print(f"  {name:<34} {row['samples_per_second']:>10.4g} samples a second, {rate}")
    return found


def memory(case: Case, device: torch.device) -> dict[str, float]:
    """Bytes estimated and allocated, and their ratio; a line for both."""
    found = {"allocated": allocated(case, device), "estimated": estimated(case)}
    line = f"\n{case.name}: --estimate {found['estimated'] / 1e9:.4g} GB"
    if found["allocated"]:
        found["ratio"] = round(found["estimated"] / found["allocated"], 3)
        verdict = "agree" if abs(found["ratio"] - 1) <= WITHIN else "DIFFER BY MORE THAN 10 %"
        line += f", allocated {found['allocated'] / 1e9:.4g} GB, ratio {found['ratio']} ({verdict})"
    print(line, flush=True)
    return found


def measured(name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one recipe, or why it was skipped."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            case = MAKERS[name](device, folder, tiny=args.tiny)
            found["speed"] = speeds(case, device, args, folder)
            found["memory"] = memory(case, device)
        except ImportError as error:
            found["skipped"] = str(error)
            print(f"\n{name}: skipped: {error}", flush=True)
        except torch.OutOfMemoryError as error:
            found["skipped"] = f"out of memory: {error}".partition("\n")[0]
            print(f"\n{name}: {found['skipped']}", flush=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small models; a CPU will do")
    parser.add_argument("--amp", default="bf16", help="of the timed steps: off, bf16 or fp16")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--steps", type=int, default=5, help="steps of a side in each round")
    parser.add_argument("--recipes", nargs="*", default=list(MAKERS), choices=list(MAKERS))
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        print("no CUDA device is visible here; --tiny tries the script on the CPU", file=sys.stderr)
        return 3
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    torch.manual_seed(0)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    found = {name: measured(name, device, args) for name in args.recipes}
    conclude("gpu", "ms_per_step", card=card, torch=torch.__version__, tiny=args.tiny,
             recipes=found)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
