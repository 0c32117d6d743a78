"""A recommender on conversations: its loss on the true answers, and what it recommends."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lavic.src.conversations import Conversation
from lavic.src.recommend_data import Batch
from lavic.src.recommend_prompts import ANSWER_ROOM, label_tokens
from lavic.src.recommend_results import counts_of, metrics_of, recommended_in
from lavic.src.recommender import Recommender
from shared import distributed
from shared.distributed import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What was said in the test, and the figures of it."""

    responses: list[str]
    recommended: list[str]
    metrics: dict[str, float]
    counts: dict[str, int]

    def line(self) -> str:
        """The figures for people."""
        shown = {name: f"{value:.4f}" for name, value in self.metrics.items()}
        return (
            f"Recall@1 {shown['recall@1']} (at most {shown['recall_ceiling@1']}) | "
            f"HitRatio@1 {shown['hit_ratio@1']} (at most {shown['hit_ratio_ceiling@1']}; "
            f"{shown['hit_if_reachable']} where possible) | Validity {shown['validity@1']} | "
            f"{self.counts['conversations']} conversations, {self.counts['gt_items']} true items"
        )


@torch.no_grad()
def validation_loss(
    recommender: Recommender, batches: Iterator[Batch], world: World
) -> tuple[float, float]:
    """Mean negative log likelihood of a token of the answers, over all ranks; its exponential."""
    recommender.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in batches:
        sums[0] += recommender(batch).double()
        sums[1] += label_tokens(batch)
    sums = distributed.total(sums, world)
    loss = float(sums[0] / sums[1])
    return loss, math.exp(loss) if loss < 20 else math.inf


def answer(
    recommender: Recommender,
    conversations: list[Conversation],
    batches: Iterator[Batch],
    tokenizer: Any,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome | None:
    """What the recommender says to every conversation, in order, on every rank alike.

    batches: this rank's share, as `test_batches` gives it. None when the user wanted to stop.
    """
    recommender.eval()
    said: list[str] = []
    batch = next(batches, None)
    while distributed.any_rank(batch is not None, world):  # shares may differ by one batch
        said += _say(recommender, batch, tokenizer) if batch else []
        if should_stop():
            return None
        batch = next(batches, None)
    responses = _in_order(distributed.gather_objects(said, world), len(conversations))
    recommended = [
        recommended_in(response, talk.candidates)
        for response, talk in zip(responses, conversations, strict=True)
    ]
    metrics, counts = metrics_of(conversations, recommended), counts_of(conversations)
    return Outcome(responses, recommended, metrics, counts)


def _say(recommender: Recommender, batch: Batch, tokenizer: Any) -> list[str]:
    tokens = recommender.answers(batch, ANSWER_ROOM, tokenizer.eos_token_id)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _in_order(shares: list[list[str]], total: int) -> list[str]:
    """The ranks' shares, rank r holding every W-th from its own number on, as one list."""
    return [shares[number % len(shares)][number // len(shares)] for number in range(total)]
