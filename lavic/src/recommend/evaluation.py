"""A recommender on conversations: its loss on the true answers, and what it recommends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lavic.src.recommend.data import Conversation
from lavic.src.recommend.model import Recommender
from lavic.src.recommend.prompts import ANSWER_ROOM, label_tokens
from lavic.src.recommend.results import Outcome, outcome_of
from shared import distributed
from shared.distributed import World

Batch = dict[str, Any]


@torch.no_grad()
def validation_loss(recommender: Recommender, batches: Iterable[Batch], world: World) -> float:
    """Mean negative log likelihood of a token of the answers, over all ranks, in nats.

    batches: this rank's share.
    """
    recommender.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in batches:
        sums[0] += recommender(batch).double()
        sums[1] += label_tokens(batch)
    sums = distributed.total(sums, world)
    return float(sums[0] / sums[1])


def answer(
    recommender: Recommender,
    conversations: list[Conversation],
    batches: Iterable[Batch],
    tokenizer: Any,
    world: World,
) -> Outcome:
    """What the recommender says to every conversation, in order, on every rank alike.

    batches: this rank's share, padded on the left.
    """
    recommender.eval()
    said: list[str] = []
    for batch in batches:
        said += _say(recommender, batch, tokenizer)
    responses = _in_order(distributed.gather_objects(said, world), len(conversations))
    return outcome_of(conversations, responses)


def _say(recommender: Recommender, batch: Batch, tokenizer: Any) -> list[str]:
    tokens = recommender.answers(batch, ANSWER_ROOM, tokenizer.eos_token_id)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _in_order(shares: list[list[str]], total: int) -> list[str]:
    """The ranks' shares, rank r holding every W-th from its own number on, as one list."""
    return [shares[number % len(shares)][number // len(shares)] for number in range(total)]
