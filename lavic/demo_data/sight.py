"""What the demo's projector knows before a training: a little of what the tower's vectors mean.

It is trained as LLaVA's is, between a tower and a language model that stay as they are. The
exercises are those of lessons.py, with a picture's own vectors where those have a sum for its look.
The pictures are drawn for this alone, of the looks of the training.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavic.demo_data.lessons import LOOK_WORDS, Exercises, exercise
from lavic.demo_data.products import SIZES, Item, draw
from lavic.src.vision.model import cls_vectors, picture_views

STEPS, ROWS, RATE = 150, 16, 3e-3


def teach(model: Any, processor: Any, items: list[Item], make: Exercises, seed: int) -> None:
    """Train the projector, in place."""
    shown, rng = _features(model, processor, items, seed), random.Random(seed)
    projector = model.model.multi_modal_projector
    model.requires_grad_(False)
    projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), weight_decay=0.0)
    for step in range(STEPS):
        described = [make.describing() for _ in range(ROWS)]
        chosen = [make.asked_before(10, "ws", is_short=step % 2 == 0) for _ in range(ROWS)]
        for rows in (described, chosen):
            views = [rng.choice(shown[tuple(look)]) for row in rows for look in row.seen]
            exercise(model, rows, projector(torch.stack(views)))[0].backward()
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / 10, 1.05 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(True)


@torch.no_grad()
def _features(model: Any, processor: Any, items: list[Item], seed: int) -> dict[Any, list[Tensor]]:
    """Of each look, by its words' places in LOOK_WORDS, the projector's input for its views."""
    core, rng, found = model.model, np.random.default_rng([seed, 77]), {}
    projector, core.multi_modal_projector = core.multi_modal_projector, torch.nn.Identity()
    for number, item in enumerate(items):
        picture = draw(item.look, SIZES[number % len(SIZES)], rng)
        look = tuple(LOOK_WORDS.index(word) for word in item.look)
        found[look] = list(cls_vectors(model, picture_views(processor, picture)))
    core.multi_modal_projector = projector
    return found
