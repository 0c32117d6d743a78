"""Two processes of the quality classifier take the step of one on the same pictures.

The file is also the program of each process: `python test_vasevqa_quality_ddp.py RANK STORE OUT`.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

from shared.distributed import World
from tests.harness import run_ranks
from vasevqa.filter.quality import ImageQualityNet, Learner

pytestmark = pytest.mark.slow

SIZE, SHARE = 2, 4
LABELS = [0, 0, 0, 0, 0, 1, 1, 1]  # the first process has one class alone


def gradients(world: World) -> dict[str, Tensor]:
    """The gradients of one step in float64 on this rank's pictures; batch norm stands still."""
    torch.manual_seed(0)
    images = torch.rand(len(LABELS), 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor(LABELS)
    net = ImageQualityNet(arch="resnet10").double()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    weights = torch.tensor([0.8, 4 / 3], dtype=torch.float64)
    learner = Learner(net, weights, world, epochs=200, lr=1e-3, weight_decay=1e-4)
    share = slice(world.rank * SHARE, (world.rank + 1) * SHARE) if world.size > 1 else slice(None)
    found: dict[str, Tensor] = {}

    def keep(*_: object) -> None:  # before the step, which clears them
        for name, each in net.named_parameters():
            assert each.grad is not None
            found[name] = each.grad.clone()

    learner.optimizer.register_step_pre_hook(keep)
    learner.step(images[share], labels[share])
    return found


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    run_ranks(__file__, SIZE, tmp_path / "store", tmp_path / "gradients.pt")
    found, expected = torch.load(tmp_path / "gradients.pt"), gradients(World())
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(gradient.norm() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


if __name__ == "__main__":
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, SIZE), rank=rank, world_size=SIZE
    )
    result = gradients(World(rank, rank, SIZE))
    if rank == 0:
        torch.save(result, out)
    distributed.barrier()
    distributed.destroy_process_group()
