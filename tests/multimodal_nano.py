"""Small inputs for the tests of multimodal/."""

from __future__ import annotations

import torch
from torch import Tensor

from multimodal.datasets import Task
from multimodal.model import create_model
from multimodal.pairs.batches import with_hidden_parts
from multimodal.training import grad_cache
from multimodal.training.losses import Learner, LossOptions, loss_of
from shared.amp import Amp
from shared.distributed import World

IMAGE_TEXT, AUDIO_TEXT, IMAGE_AUDIO = ("image", "text"), ("audio", "text"), ("image", "audio")


def inputs(rows: int, seed: int = 0, frames: int = 20) -> dict[str, Tensor]:
    """A batch with all modalities for the nano model, its labels and its keywords."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 49000, (rows, 12), generator=generator)
    ends = torch.randint(3, 12, (rows, 1), generator=generator)
    place = torch.arange(12)
    ids = torch.where(place < ends, ids, 0).scatter(1, ends, 49407)
    lengths = torch.randint(8, frames + 1, (rows, 1), generator=generator)
    return {
        "images": torch.randn(rows, 3, 64, 64, generator=generator),
        "input_ids": ids,
        "attention_mask": place <= ends,
        "audio": torch.randn(rows, frames, 80, generator=generator),
        "audio_mask": torch.arange(frames) < lengths,
        "labels": torch.rand(rows, 5, generator=generator) < 0.3,
    }


def rows_of(batch: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """Some rows of every tensor of a batch."""
    return {name: value[start:end] for name, value in batch.items()}


def learner(kind: str = "infonce", **options: object) -> Learner:
    """A nano model in float64 with 5 classes and 5 keywords."""
    torch.manual_seed(0)
    model = create_model("nano", num_classes=5, embed_dim=32, **options)  # type: ignore[arg-type]
    return Learner(model, 5, kind, fills_in=True).double()


def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floats as float64."""
    return {
        name: value.double() if value.is_floating_point() else value
        for name, value in batch.items()
    }


def step(
    module: torch.nn.Module,
    batch: dict[str, Tensor],
    task: Task,
    size: int,
    options: LossOptions,
    *,
    world: World | None = None,
    amp: Amp | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and outputs of a step in chunks of `size` rows; the gradients are added to `module`."""
    world, batch = world or World(), dict(batch)
    labels, rows = batch.pop("labels"), len(batch["images"])
    if task.target == "spectrogram":
        batch = with_hidden_parts(batch, 0, world, torch.Generator().manual_seed(0))
    chunks = [(rows_of(batch, i, i + size), task) for i in range(0, rows, size)]
    return grad_cache.backward(
        module, chunks, lambda found: loss_of(task, found, labels, options, world)[0],
        amp or Amp("off", torch.device("cpu")),
    )  # fmt: skip


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients by parameter, of those that have one."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, relative to the largest expected value."""
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale
