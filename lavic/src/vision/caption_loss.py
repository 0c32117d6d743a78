"""Stage 1's loss: how well the frozen language model says a description from a picture's vectors.

Three shortcuts, each without effect on the value: the tokens that all prompts begin with are run
once a run, and many others before a batch's first picture without gradients; logits are formed only
where something is to be said; the tower's last layer is computed for the CLS row alone (model.py).
B rows of L tokens.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lavic.src.vision.captions import NO_LABEL, Batch
from lavic.src.vision.model import cls_vectors, core_of, filled_slots, head_of, place_vectors

log = logging.getLogger(__name__)

# Rotations that do not depend on how long the whole text is, so that a start can be kept.
_STEADY_ROTATIONS = ("default", "linear", "llama3", "yarn")
# Tokens without a picture that are run apart, without gradients: a pass of its own reads every
# weight once more, which fewer tokens do not pay for.
_WORTH_A_PASS = 48


class FixedStart:
    """Keys and values of the tokens that every prompt begins with, computed once.

    Exact only while the language model is frozen and in eval, whose answer for these tokens never
    changes; anything else is refused.
    """

    def __init__(self, model: nn.Module, tokens: list[int]) -> None:
        language = core_of(model).language_model
        reason = why_not_reusable(language)
        if reason:
            raise ValueError(f"the prompts' start cannot be kept: {reason}")
        self.length = len(tokens)
        rows = torch.tensor([tokens], device=language.embed_tokens.weight.device)
        cache = _empty_cache(language)
        with torch.no_grad():
            language(input_ids=rows, past_key_values=cache, use_cache=True)
        self._states = [(layer.keys, layer.values) for layer in cache.layers]

    def cache(self, language: Any, rows: int) -> Any:
        """A cache of its own for `rows` rows, which the model may add to."""
        cache = _empty_cache(language)
        for number, (keys, values) in enumerate(self._states):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
        return cache


def fixed_start(model: nn.Module, tokens: list[int]) -> FixedStart | None:
    """The prompts' start, kept; None, with a log line, where it cannot be."""
    reason = why_not_reusable(core_of(model).language_model)
    if reason:
        log.info("every prompt is run as a whole: %s", reason)
    return None if reason else FixedStart(model, tokens)


def why_not_reusable(language: Any) -> str | None:
    """Why the beginning of a text cannot be run apart from the rest, or None when it can."""
    if language.training or any(p.requires_grad for p in language.parameters()):
        return "the language model is not frozen and in eval"
    if language.config.sliding_window is not None:
        return "the language model attends through a sliding window"
    rotation = (getattr(language.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in _STEADY_ROTATIONS:
        return f"the language model's {rotation} rotations follow the length of the text"
    return None


def caption_nll(
    model: nn.Module, batch: Batch, item_ids: list[int], start: FixedStart | None
) -> Tensor:
    """The sum over the batch's labels of -log p(label): a float32 scalar.

    start: of the prompts; None runs every row as a whole, as models do whose start cannot be kept.
    """
    embeds = embed(model, batch, item_ids)
    first, hidden = _hidden(core_of(model).language_model, embeds, batch, start)
    labels = batch.labels[:, first + 1 :]
    said = labels != NO_LABEL
    logits = head_of(model)(hidden[:, :-1][said])
    return nn.functional.cross_entropy(logits.float(), labels[said], reduction="sum")


def embed(model: nn.Module, batch: Batch, item_ids: list[int]) -> Tensor:
    """The batch's embeddings (B, L, D), the pictures' vectors in their places."""
    with torch.no_grad():  # the table is frozen
        embeds = core_of(model).language_model.embed_tokens(batch.tokens)
    filled = filled_slots(batch.tokens, item_ids, batch.num_views)
    return place_vectors(embeds, filled, cls_vectors(model, batch.views))


def _hidden(
    language: Any, embeds: Tensor, batch: Batch, start: FixedStart | None
) -> tuple[int, Tensor]:
    """(the first position computed with gradients, the states from there on)."""
    if start is None:
        whole = language(inputs_embeds=embeds, attention_mask=batch.mask, use_cache=False)
        return 0, whole.last_hidden_state
    use_fixed = batch.has_fixed and batch.head >= start.length
    known = start.length if use_fixed else 0
    cache = start.cache(language, len(embeds)) if use_fixed else _empty_cache(language)
    first = batch.head if batch.head - known >= _WORTH_A_PASS else known
    if first > known:
        with torch.no_grad():
            language(
                inputs_embeds=embeds[:, known:first].detach(),
                past_key_values=cache,
                use_cache=True,
            )
    rest = language(
        inputs_embeds=embeds[:, first:],
        attention_mask=batch.mask,
        past_key_values=cache,
        use_cache=True,
    )
    return first, rest.last_hidden_state


def _empty_cache(language: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=language.config)
