"""--estimate: the memory of one step of the training, its tensors without values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from arcface import config_options, config_reader
from arcface.encoders import build_encoder
from arcface.learner import Learner
from arcface.pipeline import build_pipeline
from arcface.recipe import Recipe
from arcface.recipe_reader import KNOWN, read_recipe
from shared import memory
from shared.class_centres import bytes_per_rank, shard
from shared.distributed import World
from shared.precision import Amp


def recipe_of(config: str, options: tuple[str, ...], cwd: Path) -> Recipe:
    """What the configuration file asks for, under the options; its data need not be there.

    Raises UserError for anything not understood.
    """
    configuration = config_reader.read_config(config_reader.find_config(config, cwd))
    configuration, _ = config_options.with_options(configuration, options, known=KNOWN)
    return read_recipe(configuration, cwd)[0]


def text(recipe: Recipe, amp: str, processes: int, cwd: Path) -> str:
    """The table for one of `processes`, whether it fits on the GPUs here, and what saves most."""
    option, half = "--cfg-options ", max(1, recipe.train.batch_size // 2)
    others = {
        f"{option}train_dataloader.batch_size={half}": _with_batch(recipe, half),
        f"{option}model.head.shard=True": _with_head(recipe, shard=True),
        f"{option}model.head.sample_rate=0.1": _with_head(recipe, shard=True, sample_rate=0.1),
    }
    plans = {name: plan(other, amp, processes, cwd) for name, other in others.items()}
    if amp == "off":
        plans["--amp bf16"] = plan(recipe, "bf16", processes, cwd)
    return memory.report(plan(recipe, amp, processes, cwd), plans)


def plan(recipe: Recipe, amp: str, processes: int, cwd: Path) -> memory.Plan:
    """What one of `processes` holds at the peak of a step."""
    batch, (height, width) = recipe.train.batch_size, _size(recipe)
    with memory.counted() as live:
        encoder = build_encoder(recipe.encoder, "random", cwd).to(memory_format=torch.channels_last)
        margins = torch.tensor(0.5 if recipe.head.adaptive else recipe.head.margins)
        learner = Learner(_one_rank(recipe, processes), encoder, margins, World(), seed=0)
        learner.train()
        pictures = torch.empty(batch, 3, height, width, memory_format=torch.channels_last)
        labels = torch.tensor([0] * batch)
        trained = nn.ModuleList([encoder, learner.head])
        live.begin(trained, *learner.optimizers)
        if learner.rows is not None:
            learner.rows.sample(labels, 0)  # a step before this one
            live.count_as("optimizer", learner.rows.moments)
        precision = Amp(memory.mode_of(amp), memory.CPU)
        with precision.autocast():
            loss = learner.loss(pictures, labels, step=0)
        precision.backward(loss)
        learner.step(precision)
    title = f"arcface: {batch} pictures a process of {height} x {width}, amp {amp}"
    what = "pictures, and all that is kept of them"
    wrapped = encoder if recipe.head.is_separate else trained
    found = live.plan(title, what, wrapped=wrapped, processes=processes)
    if processes > 1 and recipe.head.is_separate:
        found.add("head", _of_other_ranks(recipe, processes), "pictures of the other processes")
    return found


def _size(recipe: Recipe) -> tuple[int, int]:
    """Height and width of the pictures that the encoder gets."""
    name = f"{recipe.train.name}.dataset.pipeline"
    pipeline = build_pipeline(recipe.train.dataset.get("pipeline"), name)
    return pipeline.height, pipeline.width


def _one_rank(recipe: Recipe, processes: int) -> Recipe:
    """The recipe with the classes of the first of `processes`."""
    if not recipe.head.is_separate:
        return recipe
    margins = 0.5 if isinstance(recipe.head.margins, tuple) else recipe.head.margins
    own = len(shard(recipe.head.num_classes, 0, processes))
    return _with_head(recipe, num_classes=own, margins=margins)


def _of_other_ranks(recipe: Recipe, processes: int) -> int:
    """Bytes that a sharded head needs for the others' embeddings."""
    own, classes = len(shard(recipe.head.num_classes, 0, processes)), recipe.head.num_classes
    of_all, of_one = (
        bytes_per_rank(
            count,
            recipe.head.in_channels,
            ranks,
            recipe.train.batch_size,
            sub_centres=recipe.head.sub_centres,
            sample_rate=recipe.head.sample_rate,
        )
        for count, ranks in ((classes, processes), (own, 1))
    )
    return sum(of_all.values()) - sum(of_one.values())


def _with_batch(recipe: Recipe, size: int) -> Recipe:
    return replace(recipe, train=replace(recipe.train, batch_size=size))


def _with_head(recipe: Recipe, **changes: object) -> Recipe:
    return replace(recipe, head=replace(recipe.head, **changes))  # type: ignore[arg-type]
