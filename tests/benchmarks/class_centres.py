"""What sharding the class centres over two ranks saves, in bytes and in time a step.

    python tests/benchmarks/class_centres.py --classes 85742 --width 512 --batch-size 32

Both sides in one pair of processes over gloo, in turn: a head with all centres on each rank under
DDP, as face_distill has it, and the sharded one at rate 1 and 0.1. The backbone is one linear
layer, so the head is nearly all of a step. Bytes are `head_bytes`'s and, for DDP, its copy of the
gradient.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
import torch.distributed as dist
from torch import nn

from arcface.inshop_retrieval.partial_fc import CentreRows, PartialFC
from arcface.memory import head_bytes
from shared import distributed
from shared.distributed import World
from tests.benchmarks.measure import compare, conclude, in_turn

RANKS = 2


class WithHead(nn.Module):
    """What DDP wraps where every rank has all centres."""

    def __init__(self, head: PartialFC, width: int) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(width, width), head

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images), labels)


def unsharded(args: argparse.Namespace, world: World) -> Callable[[], float]:
    """Seconds of a step of the head under DDP."""
    model = WithHead(PartialFC(args.classes, args.width, World()), args.width)
    wrapped = distributed.wrap(model, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> float:
        images, labels = batch(args)
        begun = time.perf_counter()
        wrapped(images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return seconds_since(begun, world)

    return step


def sharded(args: argparse.Namespace, world: World, rate: float) -> Callable[[], float]:
    """Seconds of a step of the sharded head."""
    backbone = nn.Linear(args.width, args.width)
    wrapped = distributed.wrap(backbone, world)
    centres = PartialFC(args.classes, args.width, world, sample_rate=rate)
    own = torch.optim.SGD(centres.parameters(), lr=0.1, momentum=0.9)
    optimizers = [torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9), own]
    rows, numbers = CentreRows(centres, own), iter(range(10**6))

    def step() -> float:
        images, labels = batch(args)
        begun = time.perf_counter()
        rows.sample(labels, next(numbers))
        centres(wrapped(images), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return seconds_since(begun, world)

    return step


def batch(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(args.batch_size, args.width)
    return images, torch.randint(0, args.classes, (args.batch_size,))


def seconds_since(begun: float, world: World) -> float:
    distributed.barrier(world)
    return time.perf_counter() - begun


def bytes_of(args: argparse.Namespace) -> dict[str, int]:
    """Bytes of a rank at the peak of a step, by side."""

    def peak(ranks: int, rate: float) -> int:
        return head_bytes(args.classes, args.width, ranks, args.batch_size, rate)

    bucket = 4 * args.classes * args.width  # DDP's buckets, beside the gradient itself
    sides = {"unsharded, DDP": peak(1, 1.0) + bucket}
    return sides | {f"sharded, rate {rate}": peak(RANKS, rate) for rate in (1.0, 0.1)}


def work(args: argparse.Namespace) -> None:
    store = f"file://{args.store}"
    dist.init_process_group("gloo", init_method=store, rank=args.rank, world_size=RANKS)
    world = World(rank=args.rank, local_rank=args.rank, size=RANKS)
    torch.manual_seed(args.rank)
    sides = {
        "unsharded, DDP": unsharded(args, world),
        "sharded, rate 1.0": sharded(args, world, 1.0),
        "sharded, rate 0.1": sharded(args, world, 0.1),
    }
    figures = in_turn(sides, args.repeats)
    if world.is_main:
        report(args, figures)
    distributed.cleanup(world)


def report(args: argparse.Namespace, figures: dict[str, list[float]]) -> None:
    title = f"a step of {args.classes} x {args.width}, {RANKS} ranks of {args.batch_size}"
    times = compare(title, "s", figures, "unsharded, DDP")
    sizes = bytes_of(args)
    base = sizes["unsharded, DDP"]
    print("\nbytes of a rank at the peak of a step")
    for name, size in sizes.items():
        print(f"  {name:<34} {size / 1e6:>8.0f} MB  {size / base:>6.2f}")
    conclude("class_centres", "s, bytes", seconds=times, bytes=sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=85_742)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32, help="of one rank")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank >= 0:
        work(args)
        return 0
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, *sys.argv[1:], "--store", str(Path(name) / "store")]
        processes = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(RANKS)]
        return max(process.wait() for process in processes)


if __name__ == "__main__":
    sys.exit(main())
