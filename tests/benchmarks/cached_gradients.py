"""What exact accumulation costs: gradients of 4 chunks by cached features against one large batch.

    python tests/benchmarks/cached_gradients.py --size tiny --rows 16 --chunks 4 --repeats 10

Both sides give the same gradients of one contrastive loss over image-text pairs. `naive` adds up
the losses of the chunks, which are other gradients: it is there for its time. All with and without
gradient checkpointing. Times are of the processor.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch

from multimodal.datasets import Task
from multimodal.model import create_model
from multimodal.training import grad_cache
from multimodal.training.losses import Learner, LossOptions, loss_of
from shared.amp import Amp
from shared.distributed import World
from tests.benchmarks.measure import compare, conclude, in_turn

TASK, ALONE = Task("coco", ("image", "text"), True), World()
AMP = Amp("off", torch.device("cpu"))


def make_batch(side: int, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 49000, (rows, 77), generator=generator)
    ids[:, 20], ids[:, 21:] = 49407, 0
    return {
        "images": torch.randn(rows, 3, side, side, generator=generator),
        "input_ids": ids,
        "attention_mask": (torch.arange(77) <= 20).expand(rows, 77),
    }


def pieces(batch: dict[str, torch.Tensor], rows: int) -> list[tuple[dict[str, torch.Tensor], Task]]:
    total = len(batch["images"])
    return [
        ({name: value[i : i + rows] for name, value in batch.items()}, TASK)
        for i in range(0, total, rows)
    ]


def contrast(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return loss_of(TASK, outputs, None, LossOptions(), ALONE)[0]


def timed(learner: Learner, step: Callable[[], object]) -> Callable[[], float]:
    """The processor's seconds of one step."""

    def run() -> float:
        learner.zero_grad(set_to_none=True)
        began = time.process_time()
        step()
        return time.process_time() - began

    return run


def sides(
    size: str, rows: int, chunks: int, *, checkpointing: bool
) -> dict[str, Callable[[], float]]:
    torch.manual_seed(0)
    learner = Learner(create_model(size, use_checkpoint=checkpointing), 0)
    batch = make_batch(learner.model.image_size, rows)
    whole, parts = pieces(batch, rows), pieces(batch, rows // chunks)

    def naive() -> None:
        for part in parts:
            (contrast(learner(*part)) / chunks).backward()

    return {
        "one large batch": timed(
            learner, lambda: grad_cache.backward(learner, whole, contrast, AMP)
        ),
        f"{chunks} chunks, cached": timed(
            learner, lambda: grad_cache.backward(learner, parts, contrast, AMP)
        ),
        f"{chunks} chunks, naive": timed(learner, naive),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for checkpointing in (False, True):
        with_or_without = "with" if checkpointing else "without"
        title = f"{args.size}, {args.rows} pairs, {with_or_without} gradient checkpointing"
        each = sides(args.size, args.rows, args.chunks, checkpointing=checkpointing)
        found[title] = compare(title, "s", in_turn(each, args.repeats), "one large batch")
    conclude("cached_gradients", "s", figures=found)


if __name__ == "__main__":
    main()
