"""The language model that recommends: LoRA on its own layers, fixed vectors in place of pictures.

B prompts, L tokens, V views of all pictures of a batch, D the model's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lavic.src.recommend import item_vectors
from lavic.src.recommend.data import Talks
from lavic.src.recommend.item_vectors import Beat, ItemVectors, Tower
from lavic.src.recommend.prompts import IGNORED, PromptEncoder
from lavic.src.vision.adapters import load_adapter
from lavic.src.vision.model import (
    add_item_tokens,
    core_of,
    filled_slots,
    head_of,
    likeliest,
    load_base,
    place_vectors,
)
from shared.distributed import World

ROOM_FOR_ALL_FROM = 48 * 10**9  # bytes of a GPU that holds the activations of 2048 tokens

# Every Linear of the language model's layers, and nothing else; for peft, a full match.
LANGUAGE_TARGETS = (
    r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
)


class Recommender(nn.Module):
    """A batch → the summed negative log likelihood of its answers, in nats.

    model: LLaVA-NeXT under peft's adapter on the language model; its vision tower is not needed.
    """

    def __init__(self, model: nn.Module, item_ids: list[int], vectors: ItemVectors) -> None:
        super().__init__()
        self.model = model
        self._item_ids, self._vectors = item_ids, vectors

    @property
    def device(self) -> torch.device:
        """Where the model reads tokens."""
        return core_of(self.model).get_input_embeddings().weight.device

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """The sum over all label tokens of the batch, a scalar; logits exist for these alone."""
        labels = batch["labels"].to(self.device)[:, 1:]
        hidden = core_of(self.model).language_model(
            inputs_embeds=self.embed(batch),
            attention_mask=batch["mask"].to(self.device),
            use_cache=False,
        )
        wanted = labels != IGNORED
        logits = head_of(self.model)(hidden.last_hidden_state[:, :-1][wanted])
        return nn.functional.cross_entropy(logits.float(), labels[wanted], reduction="sum")

    def embed(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, L, D): the tokens' embeddings, with the pictures' vectors at their places."""
        ids = batch["ids"].to(self.device)
        vectors, views = self._vectors.of(batch["pictured"])
        with torch.no_grad():
            embeds = core_of(self.model).get_input_embeddings()(ids)
            if not views:
                return embeds
            filled = filled_slots(ids, self._item_ids, views)
            return place_vectors(embeds, filled, vectors.to(embeds.device))

    @torch.no_grad()
    def answers(self, batch: Mapping[str, Any], max_tokens: int, eos_id: int) -> list[list[int]]:
        """What the model says after each prompt of a left-padded batch: the likeliest tokens,
        without the end of the text, at most `max_tokens`.
        """
        mask = batch["mask"].to(self.device)
        return likeliest(self.model, self.embed(batch), mask, max_tokens, eos_id)


class Built(NamedTuple):
    """A recommender without an adapter of its own, and what its prompts are made with."""

    recommender: Recommender
    encoder: PromptEncoder
    processor: Any
    vectors: ItemVectors


def build(
    model_name: str,
    vision: Path,
    images: Path,
    cache: Path,
    talks: Talks,
    world: World,
    *,
    workers: int,
    dtype: torch.dtype,
    max_length: int,
    slots: str,
    four_bit: bool = False,
    spread: bool = False,
    beat: Beat | None = None,
) -> Built:
    """The frozen base model with every candidate's vectors, its tower given back.

    vision: stage 1's adapter. images: the folder of {id}_0.jpg. cache: keeps the vectors. four_bit
    and spread: as of load_base. beat: is told how far the making of vectors is.
    """
    base, processor = load_base(model_name, world.device, dtype, four_bit=four_bit, spread=spread)
    item_ids = add_item_tokens(base, processor.tokenizer)
    adapted: Any = load_adapter(base, vision)
    tower = Tower(adapted, processor)
    vectors = item_vectors.prepare(
        talks.items(), images, tower, cache, world, workers=workers, beat=beat
    )
    frozen = adapted.unload()  # stage 1's layers leave with the tower
    drop_tower(frozen)
    encoder = PromptEncoder(
        processor.tokenizer, talks.titles, vectors.views, max_length=max_length, slots=slots
    )
    return Built(Recommender(frozen, item_ids, vectors), encoder, processor, vectors)


def drop_tower(model: nn.Module) -> None:
    """Give the memory of vision tower and projector back: all pictures' vectors are there."""
    core = core_of(model)
    core.vision_tower = core.multi_modal_projector = None
