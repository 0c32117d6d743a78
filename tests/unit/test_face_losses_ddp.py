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
from shared.distributed import World, gather_with_grad
from tests.harness import run_ranks

pytestmark = pytest.mark.slow

WORLD, BATCH, CLASSES, WIDTH = 2, 8, 5, 32
Batch = dict[str, Tensor]


def test_two_processes_give_the_gradients_of_one(report: dict[str, float]) -> None:
    exact = {name: error for name, error in report.items() if not name.startswith("local")}
    names = {"kl_energy", "zagoruyko", "checkpointing", "all gathered", "pieces", "uneven pieces"}
    assert exact.keys() == names
    assert max(exact.values()) < 1e-10, exact


def test_relations_within_each_process_alone_would_give_other_gradients(
    report: dict[str, float],
) -> None:
    assert report["local relations"] > 1e-2


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Relative gradient errors by case, from two processes over gloo."""
    directory = tmp_path_factory.mktemp("ddp")
    run_ranks(__file__, WORLD, directory / "store", directory / "report.json")
    return json.loads((directory / "report.json").read_text())


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_in_pieces_gives_the_gradients_of_the_whole(
    micro_batch: int, checkpointing: bool
) -> None:
    batch, one = make_batch(), make_student()
    pieces = make_student(checkpointing=checkpointing, micro_batch=micro_batch)
    losses = [whole_loss(student, student, batch, World()) for student in (one, pieces)]
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
    student: FaceStudent,
    model: nn.Module,
    batch: Batch,
    world: World,
    mode: str = "kl_energy",
    gather_tokens: bool = False,
    gather_relations: bool = True,
) -> Tensor:
    """ArcFace + attention transfer + both relations, each of a size that the others do not hide."""
    kind = "features" if mode == "zagoruyko" else "probability"
    embeddings, tokens = model(batch["images"])
    labels, maps, judged = batch["labels"], batch[kind], embeddings
    if gather_tokens:
        tokens, labels, maps = (gather_with_grad(t, world) for t in (tokens, labels, maps))
        judged = gather_with_grad(embeddings, world)
    arc = student.get_submodule("head")(judged, labels)
    objective = Distillation({"ArcFace": 0.1, "AT": 1, "RKD": 10}, mode, "offdiag", 2.0)
    wanted = (batch["embeddings"], maps, kind)
    whole = world if gather_relations else None
    return objective.total(objective.terms((embeddings, tokens, arc), wanted, whole))


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(rank: int, how: dict[str, Any] | None = None, **options: Any) -> float:
    """How far the two processes' gradient is from that of one process with the whole batch.

    how: options of the two processes' student.
    """
    batch = make_batch()
    one = make_student()
    mode = options.get("mode", "kl_energy")
    expected = gradient(one, whole_loss(one, one, batch, World(), mode))
    share = slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD)
    student = make_student(**how or {})
    model = nn.parallel.DistributedDataParallel(student)
    world = World(rank=rank, local_rank=rank, size=WORLD)
    local = {name: tensor[share] for name, tensor in batch.items()}
    found = gradient(model, whole_loss(student, model, local, world, **options))
    return ((found - expected).norm() / expected.norm()).item()


def main(rank: int, store: str, report: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD
    )
    errors = {
        "kl_energy": relative_error(rank),
        "zagoruyko": relative_error(rank, mode="zagoruyko"),
        "checkpointing": relative_error(rank, {"checkpointing": True}),
        "pieces": relative_error(rank, {"micro_batch": 1}),
        "uneven pieces": relative_error(rank, {"micro_batch": 3}, mode="zagoruyko"),
        "all gathered": relative_error(rank, gather_tokens=True),
        "local relations": relative_error(rank, gather_relations=False),
    }
    if rank == 0:
        Path(report).write_text(json.dumps(errors))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
