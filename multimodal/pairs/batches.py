"""The batches of training: sources mixed in a seeded order, each passed over again and again.

A batch is what one optimizer step takes on this process, accumulation × batch size samples; `split`
cuts it into what is computed at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Subset

from multimodal.datasets import Batch, Source, Task, collate_views
from multimodal.model import FRAMES_A_TOKEN, MODALITIES
from multimodal.pairs.audio import FRAMES_PER_SECOND
from multimodal.training.schedule import Span, order_of, steps_of_sources
from shared.checkpoint import Position
from shared.distributed import World
from shared.loader import make_eval_loader, make_loader
from shared.seed import derive

_PASSES = 10**6  # more than a stage makes over a source: the passes of stages never meet
_NOT_LEARNT = ("replaced", "speaker")
_HIDDEN = 0.8  # share of a sound


@dataclass(frozen=True)
class BatchOptions:
    """What decides about the batches of a run."""

    rows: int  # samples a step on each process
    seed: int
    workers: int
    balance: float
    modality_dropout: float
    clip_seconds: float = 0.0  # of the longest sound

    @property
    def tokens(self) -> int:
        """Of the longest sound."""
        return round(self.clip_seconds * FRAMES_PER_SECOND) // FRAMES_A_TOKEN + 1


def epoch_of(
    sources: Sequence[Source], options: BatchOptions, world: World, span: Span, position: Position
) -> Iterator[tuple[Task, Batch]]:
    """The batches of the position's epoch, from its batch on, with the task each is for."""
    steps = [source.steps(options.rows * world.size) for source in sources]
    counts = steps_of_sources(steps, options.balance)
    order = order_of(counts, options.seed, span.stage, position.epoch)
    done = Counter(order[: position.batch])
    passed = position.epoch - span.first
    streams = [
        _stream(source, options, world, span.stage, passed * count + done[place])
        for place, (source, count) in enumerate(zip(sources, counts, strict=True))
    ]
    for step, place in enumerate(order[position.batch :], position.batch):
        task = sources[place].task(span.stage)
        assert task is not None
        batch = next(streams[place])
        if task.target == "spectrogram":
            generator = torch.Generator().manual_seed(derive(options.seed, position.epoch, step))
            batch = with_hidden_parts(batch, options.tokens, world, generator)
        if span.stage == 2 and task.target:  # only labels are predicted from the fusion
            generator = torch.Generator().manual_seed(derive(options.seed, position.epoch, step))
            batch["modality_mask"] = modality_dropout(
                task, options.rows, world, generator, options.modality_dropout
            )
        yield task, batch


def _stream(
    source: Source, options: BatchOptions, world: World, stage: int, first: int
) -> Iterator[Batch]:
    """The source's batches from number `first` of the stage on, without end."""
    rows = options.rows * world.size
    number, offset = divmod(first, source.steps(rows))
    while True:
        loader = make_loader(
            source.training.of_pass(rows, options.seed, stage * _PASSES + number),
            options.rows,
            world,
            seed=options.seed,
            workers=options.workers,
            epoch=stage * _PASSES + number,
            offset=offset,
            collate=collate_views,
        )
        for batch in loader:
            yield {name: value for name, value in batch.items() if name not in _NOT_LEARNT}
        number, offset = number + 1, 0


def with_hidden_parts(batch: Batch, tokens: int, world: World, generator: torch.Generator) -> Batch:
    """Sounds alone, and which of their tokens are hidden. tokens: to draw for, at least."""
    rows, frames = batch["audio_mask"].shape
    own = -(-frames // FRAMES_A_TOKEN)
    hidden = hidden_parts(rows, max(own, tokens), world, generator)[:, :own]
    return {"audio": batch["audio"], "audio_mask": batch["audio_mask"], "hidden": hidden}


def split(batch: Batch, rows: int, task: Task, device: torch.device) -> list[tuple[Batch, Task]]:
    """The batch in chunks of `rows` samples on the device, each with its task."""
    total = len(next(iter(batch.values())))
    return [
        (on_device({n: value[i : i + rows] for n, value in batch.items()}, device), task)
        for i in range(0, total, rows)
    ]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch there."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def held_out(source: Source, rows: int, world: World, workers: int) -> Iterator[Batch]:
    """This process's share of the validation batches, each of `rows` samples in order.

    The batches are the same for any number of processes: what a contrastive loss is depends on
    them. An incomplete last one is left out, unless there is no other.
    """
    assert source.validation is not None
    total = len(source.validation)
    rows = min(rows, total)
    starts = range(0, total - rows + 1, rows)[world.rank :: world.size]
    own = [index for start in starts for index in range(start, start + rows)]
    yield from in_order(source, own, rows, world.device, workers)


def in_order(
    source: Source, indices: Sequence[int], rows: int, device: torch.device, workers: int
) -> Iterator[Batch]:
    """These held-out samples in batches of `rows`, all of them on this process."""
    if not indices or source.validation is None:
        return
    loader = make_eval_loader(
        Subset(source.validation, indices),
        rows,
        World(device=device),
        workers=workers,
        collate=collate_views,
    )
    for batch in loader:
        yield {name: value for name, value in batch.items() if name not in _NOT_LEARNT}


def labels_of(batch: Batch, device: torch.device) -> Tensor | None:
    """Take the labels (B, classes) out of a batch, to the device; None where it has none."""
    labels = batch.pop("labels", None)
    return None if labels is None else labels.to(device, non_blocking=True)


def modality_dropout(
    task: Task, rows: int, world: World, generator: torch.Generator, share: float
) -> Tensor:
    """(rows, 3) bool: the modalities that each sample of this process shows to the fusion.

    Of `share` of the samples one of the two is left out, either with the same chance. Drawn for all
    processes at once, so that the global batch is the same whoever holds which part.
    """
    shown = torch.tensor([name in task.modalities for name in MODALITIES])
    drawn = torch.rand(world.size * rows, 2, generator=generator)
    own = drawn[world.rank * rows : (world.rank + 1) * rows]
    mask = shown.repeat(rows, 1)
    if len(task.modalities) == 2:
        columns = torch.tensor([MODALITIES.index(name) for name in task.modalities])
        leaves = own[:, 0] < share
        which = columns[(own[:, 1] < 0.5).long()]
        mask[leaves.nonzero().flatten(), which[leaves]] = False
    return mask


def hidden_parts(rows: int, tokens: int, world: World, generator: torch.Generator) -> Tensor:
    """(rows, tokens) bool: the parts of each sound of this process that it does not get to hear.

    4 of 5, as in AudioMAE (Huang et al. 2022, arXiv:2207.06405); drawn for all processes at once.
    """
    drawn = torch.rand(world.size * rows, tokens, generator=generator)
    return drawn[world.rank * rows : (world.rank + 1) * rows] < _HIDDEN
