"""The parts of stage 2: base model, stage 1's vectors of all pictures, a fresh adapter."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lavic.src import item_vectors
from lavic.src.adapters import add_adapter, load_adapter
from lavic.src.distillation_setup import precision
from lavic.src.item_vectors import ItemVectors, Tower
from lavic.src.llava import add_item_tokens, load_base
from lavic.src.recommend_prompts import PromptEncoder
from lavic.src.recommender import (
    LANGUAGE_TARGETS,
    Recommender,
    checkpoint_activations,
    drop_tower,
)
from shared import seed
from shared.distributed import World

if TYPE_CHECKING:
    from lavic.src.prompt_tuning import Config
    from lavic.src.recommend_data import Talks

log = logging.getLogger(__name__)

CHECKPOINT_BELOW = 48 * 10**9  # bytes of a GPU on which 2048 tokens' activations are tight


@dataclass(frozen=True)
class Built:
    """What training and test work with."""

    recommender: Recommender
    encoder: PromptEncoder
    processor: Any
    vectors: ItemVectors
    amp_mode: str = "off"

    @property
    def pad_id(self) -> int:
        """What fills rows up; it is masked, so that any token would do."""
        found = self.processor.tokenizer.pad_token_id
        return self.processor.tokenizer.eos_token_id if found is None else found


@dataclass(frozen=True)
class Sources:
    """Where a recommender comes from, and how its prompts are made."""

    model_name: str
    vision: Path
    images: Path
    cache: Path
    workers: int
    dtype: torch.dtype
    max_length: int
    slots: str


def build(cfg: Config, talks: Talks, world: World) -> Built:
    """The recommender with a fresh adapter, ready to train; the same on every rank."""
    assert cfg.model_name
    dtype, mode = precision(cast(Any, cfg), world.device)
    sources = Sources(
        cfg.model_name,
        cfg.adapter,
        cfg.image_dir,
        cfg.cache,
        cfg.num_workers,
        dtype,
        cfg.max_length,
        cfg.slots,
    )
    built = assemble(sources, talks, world)
    seed.seed_all(cfg.run.seed)  # the same adapter on every process
    built.recommender.model = add_adapter(built.recommender.model, LANGUAGE_TARGETS)
    seed.seed_all(cfg.run.seed, world.rank)  # and dropout of its own
    if _checkpoints(cfg, world.device):
        checkpoint_activations(built.recommender.model)
    trainable = sum(p.numel() for p in built.recommender.parameters() if p.requires_grad)
    log.info(
        "%s, %s, with vectors of %d pictures | %.2f M parameters train",
        cfg.model_name,
        str(sources.dtype).removeprefix("torch."),
        len(built.vectors.views),
        trainable / 1e6,
    )
    return replace(built, amp_mode=mode)


def assemble(sources: Sources, talks: Talks, world: World) -> Built:
    """The frozen base model with every candidate's vectors, its tower given back."""
    base, processor = load_base(sources.model_name, world.device, sources.dtype)
    item_ids = add_item_tokens(base, processor.tokenizer)
    model: Any = load_adapter(base, sources.vision)
    tower = Tower(model, processor)
    vectors = item_vectors.prepare(
        talks.items(), sources.images, tower, sources.cache, world, workers=sources.workers
    )
    plain = model.unload()  # stage 1's layers leave with the tower
    drop_tower(plain)
    encoder = PromptEncoder(
        processor.tokenizer,
        talks.titles,
        vectors.views,
        max_length=sources.max_length,
        slots=sources.slots,
    )
    return Built(Recommender(plain, item_ids, vectors), encoder, processor, vectors)


def _checkpoints(cfg: Config, device: torch.device) -> bool:
    if cfg.gradient_checkpointing != "auto":
        return cfg.gradient_checkpointing == "on"
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).total_memory < CHECKPOINT_BELOW
