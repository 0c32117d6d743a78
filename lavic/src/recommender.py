"""The language model that recommends: LoRA on its own layers, fixed vectors in place of pictures.

B prompts, L tokens, V views of all pictures of a batch, D the model's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lavic.src.item_vectors import ItemVectors
from lavic.src.llava import core_of, filled_slots, head_of, place_vectors
from lavic.src.recommend_prompts import IGNORED

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
        """Where the model lies."""
        return next(self.model.parameters()).device

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
        language, head = core_of(self.model).language_model, head_of(self.model)
        said: list[list[int]] = [[] for _ in mask]
        over = torch.zeros(len(mask), dtype=torch.bool, device=self.device)
        inputs: dict[str, Any] = {"inputs_embeds": self.embed(batch)}
        positions, cache = (mask.cumsum(1) - 1).clamp(min=0), None
        for _ in range(max_tokens):
            out = language(
                **inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            likeliest = head(out.last_hidden_state[:, -1]).argmax(-1)
            over |= likeliest == eos_id
            for words, token, is_over in zip(said, likeliest.tolist(), over.tolist(), strict=True):
                words += [] if is_over else [token]
            if over.all():
                break
            inputs, cache = {"input_ids": likeliest[:, None]}, out.past_key_values
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = positions[:, -1:] + 1
        return said


def checkpoint_activations(model: nn.Module) -> None:
    """Have the language model's layers compute their activations again in the backward pass."""
    core_of(model).language_model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )


def drop_tower(model: nn.Module) -> None:
    """Give the memory of vision tower and projector back: all pictures' vectors are there."""
    core = core_of(model)
    core.vision_tower = core.multi_modal_projector = None
