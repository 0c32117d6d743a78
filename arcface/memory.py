"""--estimate and --fit: the memory of one step of the training, its tensors without values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from arcface.inshop_retrieval.encoders import build_encoder, checkpoint_activations
from arcface.inshop_retrieval.partial_fc import CentreRows, PartialFC, shard
from arcface.inshop_retrieval.pipeline import build_pipeline
from arcface.inshop_retrieval.recipe import Recipe
from arcface.inshop_retrieval.schedule import build_optimizers, parameters
from arcface.run_scripts.run_arcface import build_head
from shared import fit, memory
from shared.amp import Amp
from shared.distributed import World

if TYPE_CHECKING:
    from arcface.run_scripts.run_arcface import Config


def fitted(cfg: Config, recipe: Recipe, processes: int) -> Config:
    """`cfg` with the checkpointing and precision that --fit has room for. Raises UserError."""
    ways = [{"gradient_checkpointing": again} for again in (False, True)]
    tried = (
        (other, plan(recipe, other.run.amp, processes, again=other.gradient_checkpointing))
        for other in fit.variants(cfg, ways)
    )
    return fit.first(
        cfg, tried, "--amp auto, --cfg-options train_dataloader.batch_size=N", fit.AT_ONCE
    )


def text(recipe: Recipe, amp: str, processes: int, *, again: bool = False) -> str:
    """The table for one of `processes`, whether it fits on the GPUs here, and what saves most."""
    option, half = "--cfg-options ", max(1, recipe.train.batch_size // 2)
    others = {
        f"{option}train_dataloader.batch_size={half}": replace(
            recipe, train=replace(recipe.train, batch_size=half)
        ),
        f"{option}model.head.shard=True": replace(recipe, shard=True),
        f"{option}model.head.sample_rate=0.1": replace(recipe, shard=True, sample_rate=0.1),
    }
    plans = {name: plan(other, amp, processes, again=again) for name, other in others.items()}
    plans["--gradient-checkpointing"] = plan(recipe, amp, processes, again=True)
    if amp == "off":
        plans["--amp bf16"] = plan(recipe, "bf16", processes, again=again)
    return memory.report(plan(recipe, amp, processes, again=again), plans)


def plan(recipe: Recipe, amp: str, processes: int, *, again: bool = False) -> memory.Plan:
    """What one of `processes` holds at the peak of a step. again: with gradient checkpointing."""
    batch = recipe.train.batch_size
    pipeline = build_pipeline(recipe.train.pipeline)
    ranks = processes if recipe.is_sharded else 1  # whose embeddings the centres meet
    own = replace(recipe, num_classes=len(shard(recipe.num_classes, 0, ranks)))
    margins = torch.tensor(0.5 if isinstance(recipe.margins, list) else recipe.margins)
    with memory.counted() as live:
        encoder = build_encoder(recipe.encoder, "random").to(memory_format=torch.channels_last)
        if again:
            checkpoint_activations(encoder)
        head = build_head(own, margins, World(), seed=0)
        trained = nn.ModuleList([encoder, head]).train()
        optimizer, head_optimizer = build_optimizers(recipe, encoder.backbone, head, recipe.lr)
        shape = (batch, 3, pipeline.height, pipeline.width)
        pictures = torch.empty(shape, memory_format=torch.channels_last)
        labels = torch.tensor([0] * batch * ranks)
        live.begin(trained, *filter(None, [optimizer, head_optimizer]))
        if head_optimizer:
            rows = CentreRows(head, head_optimizer)
            rows.sample(labels, 0)
            live.count_as("optimizer", list(rows.moments.values()))
        precision = Amp(memory.mode_of(amp), memory.CPU)
        with precision.autocast():
            loss = head(torch.cat([encoder(pictures)] * ranks), labels)
        precision.backward(loss)
        sharded = (head_optimizer, World()) if head_optimizer else None
        precision.step(
            optimizer, parameters(optimizer), clip_norm=recipe.largest_norm, sharded=sharded
        )
    title = f"arcface: {batch} pictures a process of {shape[2]} x {shape[3]}, amp {amp}"
    wrapped = encoder if head_optimizer else trained
    what = "pictures, and all that is kept of them" + ", recomputed" * again
    return live.plan(title, what, wrapped=wrapped, processes=processes)


def head_bytes(
    num_classes: int, width: int, ranks: int, batch_size: int, sample_rate: float = 1.0
) -> int:
    """Bytes of a sharded head on one of `ranks` at the peak of a step with SGD and momentum.

    Embeddings of all ranks and their gradients are counted; batch_size: of one rank.
    """
    with memory.counted() as live:
        classes = len(shard(num_classes, 0, ranks))
        head = PartialFC(classes, width, World(), sample_rate=sample_rate)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        rows, labels = CentreRows(head, optimizer), torch.tensor([0] * batch_size * ranks)
        embeddings = torch.empty(len(labels), width, requires_grad=True)
        live.begin(head, optimizer)
        rows.sample(labels, 0)
        live.count_as("optimizer", list(rows.moments.values()))
        head(embeddings, labels).backward()
        optimizer.step()
    return sum(live.peak.values())
