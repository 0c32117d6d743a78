"""Two processes give the gradients of one on the same global batch, whatever modality it brings.

The file is also the program of each process: `python test_multimodal_ddp.py RANK STORE REPORT`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from multimodal.datasets import Task
from multimodal.training.losses import LossOptions
from shared.distributed import World
from tests import multimodal_nano as nano
from tests.harness import run_ranks

pytestmark = pytest.mark.slow

WORLD, ROWS = 2, 8
# One after another through one DDP module: each batch lacks a modality, and the next another one.
SERIES = (
    Task("coco", ("image",), False, "classes"),
    Task("clotho", nano.AUDIO_TEXT, True, "keywords"),
    Task("audiocaps", ("audio",), False, "spectrogram"),
    Task("voxceleb", nano.IMAGE_AUDIO, True),
    Task("coco", nano.IMAGE_TEXT, True, "classes"),
)
CASES = {
    "two chunks": (2, LossOptions()),
    "two chunks, local loss": (2, LossOptions(local=True)),
    "two chunks, sigmoid": (2, LossOptions("sigmoid")),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The largest relative error of the gradients by case and task, from two processes."""
    directory = tmp_path_factory.mktemp("ddp")
    run_ranks(__file__, WORLD, directory / "store", directory / "report.json")
    return json.loads((directory / "report.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_gradients_of_one_on_the_whole_batch(report, case):
    errors = report[case]
    assert len(errors) == len(SERIES)
    assert max(errors) < 1e-10, errors


def gradients_of(
    module: torch.nn.Module, plain: torch.nn.Module, world: World, case: str, task: Task
) -> dict[str, torch.Tensor]:
    """The gradients that one step with this process's rows leaves."""
    size, options = CASES[case]
    rows = ROWS // world.size
    own = nano.rows_of(nano.double(nano.inputs(ROWS)), world.rank * rows, (world.rank + 1) * rows)
    plain.zero_grad(set_to_none=True)
    nano.step(module, own, task, size, options, world=world)
    return nano.gradients(plain)


def work(rank: int, store: str, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    world, found = World(rank=rank, size=WORLD), dict[str, Any]()
    for case, (_, options) in CASES.items():
        learner = nano.learner(options.kind)
        wrapped = DistributedDataParallel(learner, find_unused_parameters=True)
        alone = nano.learner(options.kind)
        found[case] = [
            nano.largest_error(
                gradients_of(wrapped, learner, world, case, task),
                gradients_of(alone, alone, World(), case, task),
            )
            for task in SERIES
        ]
    if rank == 0:
        Path(path).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], sys.argv[3])
