"""A trained encoder out of its checkpoint, tested on its configuration's queries and gallery."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from arcface import evaluation, splits
from arcface.encoders import build_encoder
from arcface.evaluation import Outcome, Split
from arcface.run_settings import Settings
from arcface.weight_files import load_weights
from shared.distributed import World
from shared.precision import Amp


@dataclass(frozen=True)
class Tested:
    """The figures, what they were taken on, and the weights that gave them."""

    outcome: Outcome
    query: Split
    gallery: Split
    checkpoint: Path
    data: Path


def evaluate(
    settings: Settings,
    checkpoint: Path,
    device: torch.device,
    *,
    amp: str = "off",
    batch_size: int | None = None,
    limit: int | None = None,
) -> Tested:
    """The encoder in `checkpoint` tested as `settings` say, in this one process.

    limit: so many queries, evenly spread, against the whole gallery. Raises UserError for weights
    or data that are missing or do not fit.
    """
    world, recipe = World(device=device), settings.recipe
    encoder = build_encoder(recipe.encoder, "random", settings.cwd)
    load_weights(encoder, None, checkpoint)
    encoder.to(device).to(memory_format=torch.channels_last)
    query, gallery = splits.open_test(settings)
    if batch_size:
        query, gallery = (replace(split, batch_size=batch_size) for split in (query, gallery))
    total = len(query.dataset)
    if limit and limit < total:
        query = replace(query, numbers=torch.arange(limit) * total // limit)
    outcome = evaluation.evaluate(
        encoder,
        splits.preprocess_of(settings, world),
        query,
        gallery,
        world,
        autocast=Amp(amp, device).autocast,
        recall_at=recipe.recall_at,
        map_at=recipe.map_at,
    )
    return Tested(outcome, query, gallery, checkpoint, settings.roots[recipe.query.name])
