"""What `Run` costs a step: its hooks against a bare loop, in one process, on the same tiny net.

    python tests/benchmarks/loop_overhead.py --block 20 --repeats 100

All sides train the same net on the same points. `run` adds Amp and run.step; `run, log every step`
is the same with --log-every 1; `run and make_loader` takes its batches from the loader that is
exact under resume; the hooks alone train nothing. The sides take turns every `--block` steps. Times
are of the processor (all threads), so that other programs on the machine count less. Opening and
closing a run are left out; saves are in checkpoint_bytes.py.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from shared.amp import Amp
from shared.config import RunOptions
from shared.distributed import World
from shared.loader import make_loader
from shared.reporter import Plan
from shared.run import Run
from tests.benchmarks.measure import compare, conclude, in_turn

BATCH_SIZE, WIDTH, NUM_POINTS = 8, 256, 16_384
NEVER = 10**9  # a step that no benchmark reaches
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Config:
    """The settings that `Run` reads."""

    run: RunOptions = field(default_factory=lambda: RunOptions(device="cpu"))


def make_data() -> TensorDataset:
    points = torch.randn(NUM_POINTS, WIDTH, generator=torch.Generator().manual_seed(0))
    return TensorDataset(points, (points.sum(1) > 0).long())


def make_net() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    return net, torch.optim.AdamW(net.parameters(), lr=1e-3)


def plain_loader(data: TensorDataset) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True, generator=generator)


def bare(batches: Callable[[], Batches]) -> Generator[int]:
    """The loop that everyone writes first, a step at a time."""
    net, optimizer = make_net()
    step = 0
    while True:
        for points, labels in batches():
            loss = nn.functional.cross_entropy(net(points), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)
            yield step


def ours(batches: Callable[[], Batches], log_every: int, directory: Path) -> Generator[int]:
    """The loop on `Run`, a step at a time."""
    net, optimizer = make_net()
    config = Config(replace(RunOptions(device="cpu"), log_every=log_every, save_every=NEVER))
    amp = Amp("off", torch.device("cpu"))
    parts: dict[str, Any] = {"model": net, "optimizer": optimizer, "amp": amp}
    with Run(config, World(), directory, "bench") as run:
        position = run.restore(parts, Plan(NEVER))
        while True:
            for points, labels in batches():
                with amp.autocast():
                    loss = nn.functional.cross_entropy(net(points), labels)
                amp.backward(loss)
                norm = amp.step(optimizer, net.parameters(), clip_norm=1.0)
                run.step({"loss": loss, "grad_norm": norm})
                yield position.step


def hooks_alone(directory: Path) -> Generator[int]:
    """What `Run` adds to a step and nothing else, a step at a time."""
    loss = torch.tensor(0.5, requires_grad=True) * 2
    amp = Amp("off", torch.device("cpu"))
    with Run(Config(), World(), directory, "bench") as run:
        position = run.restore({}, Plan(NEVER))
        while True:
            with amp.autocast():
                pass
            run.step({"loss": loss, "grad_norm": 0.5})
            yield position.step


def timed(loop: Generator[int], block: int) -> Callable[[], float]:
    """What takes `block` steps of a loop and returns the microseconds of each."""

    def measure() -> float:
        begun = time.process_time()
        for _ in range(block):
            next(loop)
        return (time.process_time() - begun) / block * 1e6

    return measure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", type=int, default=20, help="steps of a side in each round")
    parser.add_argument("--repeats", type=int, default=100, help="rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    data = make_data()

    def plain() -> Batches:
        return plain_loader(data)

    def exact() -> Batches:
        return make_loader(data, BATCH_SIZE, World(), seed=0, workers=0)

    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loops = {
            "bare loop": bare(plain),
            "run (log every 20)": ours(plain, 20, root / "a"),
            "run, log every step": ours(plain, 1, root / "b"),
            "run and make_loader": ours(exact, 20, root / "c"),
            "the hooks alone (log every 20)": hooks_alone(root / "d"),
        }
        for loop in loops.values():
            stack.callback(loop.close)
        sides = {name: timed(loop, args.block) for name, loop in loops.items()}
        figures = in_turn(sides, args.repeats)
    found = compare("a step", "µs of the processor", figures, "bare loop")
    hooks = found["the hooks alone (log every 20)"]["median"]
    share = 100 * hooks / found["bare loop"]["median"]
    loader = found["run and make_loader"]["median"] - found["run (log every 20)"]["median"]
    print(f"\n  hooks: {hooks:.0f} µs a step, {share:.1f} % of the bare one")
    print(f"  exact loader: {loader / BATCH_SIZE:+.0f} µs a sample over a plain one")
    conclude("loop_overhead", "us_per_step_cpu", block=args.block, sides=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
