"""Two processes give the gradients of one on the same global batch.

The file is also the program of each process: `python test_face_losses_ddp.py RANK STORE REPORT`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from face_distill.distill.losses import ArcFaceHead, Distillation
from face_distill.distill.model import FaceStudent, adapter_layers
from shared.distributed import World
from tests.harness import run_ranks

pytestmark = pytest.mark.slow

WORLD, BATCH, CLASSES, WIDTH = 2, 8, 5, 32
Batch = dict[str, Tensor]


def test_two_processes_give_the_gradients_of_one(report):
    exact = {name: error for name, error in report.items() if name != "local relations"}
    assert exact.keys() == {"kl_energy", "zagoruyko in uneven pieces", "checkpointing"}
    assert max(exact.values()) < 1e-10, exact
    assert report["local relations"] > 1e-2  # they would not do: the test sees the difference


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Relative gradient errors by case, from two processes over gloo."""
    directory = tmp_path_factory.mktemp("ddp")
    run_ranks(__file__, WORLD, directory / "store", directory / "report.json")
    return json.loads((directory / "report.json").read_text())


@pytest.mark.parametrize(("micro_batch", "checkpointing"), [(1, False), (3, True), (8, False)])
def test_a_batch_in_pieces_gives_the_gradients_of_the_whole(micro_batch, checkpointing):
    batch, one = make_batch(), make_student()
    pieces = make_student(checkpointing=checkpointing, micro_batch=micro_batch)
    losses = [whole_loss(student, batch, World()) for student in (one, pieces)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
    expected, found = (gradient(s, loss) for s, loss in zip((one, pieces), losses, strict=True))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-10


def make_student(**options: Any) -> FaceStudent:
    from transformers import Blip2VisionConfig, Blip2VisionModel

    torch.manual_seed(0)
    config = Blip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        initializer_range=0.02,
    )
    student = FaceStudent(
        Blip2VisionModel(config),
        adapter_layers(3, "spread:2"),
        ArcFaceHead(WIDTH, CLASSES),
        **options,
    )
    for name, parameter in student.named_parameters():
        if "up_proj" in name:
            nn.init.normal_(parameter, std=0.3)
    return student.double()


def make_batch() -> Batch:
    values = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=values, dtype=torch.float64)

    return {
        "images": normal(3, 56, 56),
        "labels": torch.arange(BATCH) % CLASSES,
        "embeddings": normal(12),
        "probability": normal(49).softmax(1),
        "features": normal(6, 7, 7),
    }


def whole_loss(
    model: nn.Module, batch: Batch, world: World | None, mode: str = "kl_energy"
) -> Tensor:
    """ArcFace + attention transfer + both relations, each of a size that the others do not hide."""
    kind = "features" if mode == "zagoruyko" else "probability"
    objective = Distillation({"ArcFace": 0.1, "AT": 1, "RKD": 10}, mode, "offdiag", 2.0)
    wanted = (batch["embeddings"], batch[kind], kind)
    outputs = model(batch["images"], batch["labels"])
    return objective.total(objective.terms(outputs, wanted, world))


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(rank: int, mode: str = "kl_energy", local: bool = False, **how: Any) -> float:
    """How far the two processes' gradient is from that of one process with the whole batch.

    local: relations within each process. how: options of the two processes' student.
    """
    batch, one = make_batch(), make_student()
    expected = gradient(one, whole_loss(one, batch, World(), mode))
    share = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    model = nn.parallel.DistributedDataParallel(make_student(**how))
    world = None if local else World(rank=rank, local_rank=rank, size=WORLD)
    mine = {name: tensor[share] for name, tensor in batch.items()}
    found = gradient(model, whole_loss(model, mine, world, mode))
    return ((found - expected).norm() / expected.norm()).item()


def main(rank: int, store: str, report: str):
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD
    )
    errors = {
        "kl_energy": relative_error(rank),
        "zagoruyko in uneven pieces": relative_error(rank, "zagoruyko", micro_batch=3),
        "checkpointing": relative_error(rank, checkpointing=True),
        "local relations": relative_error(rank, local=True),
    }
    if rank == 0:
        Path(report).write_text(json.dumps(errors))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
