"""Requests as token ids: prompts that fit, with five item tokens for each candidate's picture.

    encoder = PromptEncoder(processor.tokenizer, titles, views, max_length=2048)
    batch = collate_training([encoder.encode(request) for request in …], pad_id)

The texts are tokenised piece by piece, so that where one ends nothing depends on its neighbours;
what users and shops wrote may spell special tokens without becoming them.
B prompts of a batch, L tokens the longest, V views of all its pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lavic.src.catalogue import NO_TITLE
from lavic.src.recommend.data import Request
from lavic.src.vision.model import ITEM_TOKENS
from shared.errors import UserError

ANSWER_ROOM = 32  # tokens kept free for an id and its end, whether the answer is known or not
IGNORED = -100  # no label
# The conversation follows the head, then a line and the item tokens of each candidate.
RECOMMEND_HEAD = (
    "You are an AI assistant specialized in providing personalized product recommendations based "
    "on user conversations. You are given a conversation between a user seeking recommendations "
    "(denoted by <submission>) and other users providing comments (denoted by <comment>). You are "
    "also given a set of candidate products with their IDs, titles and images formatted as "
    '"ID: title" followed by an image. Among the candidates, recommend the most relevant product '
    "to the seeker. Only reply with its ID, and don't say anything else.\n\nConversation:\n"
)
RECOMMEND_CANDIDATES = "\n\nCandidates:\n"
RECOMMEND_MARK = "\nAssistant:"


@dataclass(frozen=True)
class Prompt:
    """One encoded request. ids: the prompt, then the answer and the end, if there is an answer."""

    ids: list[int]
    num_prompt: int  # tokens before the answer
    pictured: tuple[str, ...]  # the candidates with a picture, in their order
    num_cut: int  # tokens of the context that did not fit


class PromptEncoder:
    """Requests → prompts of at most `max_length` tokens.

    titles: {item id: title}. views: {item id: number of views} of the items that have a picture;
    the others are named by their title alone. slots: five item tokens a picture (fixed5), or one a
    view (views).
    """

    def __init__(
        self,
        tokenizer: Any,
        titles: Mapping[str, str],
        views: Mapping[str, int],
        *,
        max_length: int = 2048,
        slots: str = "fixed5",
    ) -> None:
        self._tokenizer, self._titles, self._views = tokenizer, titles, views
        self._max_length, self._slots = max_length, slots
        self._item_ids: list[int] = tokenizer.convert_tokens_to_ids(ITEM_TOKENS)
        self._head: list[int] = tokenizer(RECOMMEND_HEAD)["input_ids"]  # with the start's token
        self._candidates = self._tokens(RECOMMEND_CANDIDATES)
        self._line_end, self._mark = self._tokens("\n"), self._tokens(RECOMMEND_MARK)
        self._candidate = lru_cache(maxsize=None)(self._candidate_tokens)

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache, which cannot travel to a worker."""
        return {name: value for name, value in vars(self).items() if name != "_candidate"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._candidate = lru_cache(maxsize=None)(self._candidate_tokens)

    def encode(self, request: Request) -> Prompt:
        """The prompt of a request; of a context that is too long the oldest part is left out.

        Raises UserError when the candidates and the instruction alone are too long.
        """
        tail = [*self._candidates]
        for item in request.candidates:
            tail += self._candidate(item)
        tail += self._mark
        context = self._tokens(request.context)
        room = self._max_length - ANSWER_ROOM - len(self._head) - len(tail)
        if room < 0:
            raise UserError(
                f"--max-length {self._max_length} is too short: instruction and "
                f"{len(request.candidates)} candidates need {self._max_length - room} tokens "
                "without any conversation"
            )
        cut = max(0, len(context) - room)
        prompt = [*self._head, *context[cut:], *tail]
        answer = self.answer(request.answer) if request.answer is not None else []
        pictured = tuple(item for item in request.candidates if item in self._views)
        return Prompt([*prompt, *answer], len(prompt), pictured, cut)

    def answer(self, item: str) -> list[int]:
        """What the model is to say: the id, then the end of the text."""
        tokens = [*self._tokens(item), self._tokenizer.eos_token_id]
        if len(tokens) > ANSWER_ROOM:
            raise UserError(
                f"the id {item!r} takes {len(tokens)} tokens, at most {ANSWER_ROOM} fit"
            )
        return tokens

    def _candidate_tokens(self, item: str) -> list[int]:
        tokens = self._tokens(f"{item}: {self._titles.get(item, NO_TITLE)}\n")
        if item in self._views:
            count = len(ITEM_TOKENS) if self._slots == "fixed5" else self._views[item]
            tokens += [*self._item_ids[:count], *self._line_end]
        return tokens

    def _tokens(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return encoded["input_ids"]


class Prompts(Dataset[Prompt]):
    """Requests, encoded when asked for."""

    def __init__(self, requests: Sequence[Request], encoder: PromptEncoder) -> None:
        self._requests, self._encoder = requests, encoder

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> Prompt:
        return self._encoder.encode(self._requests[index])


def collate_step(prompts: list[Prompt], size: int, pad_id: int) -> list[dict[str, Any]]:
    """A training step's prompts in batches of `size`."""
    starts = range(0, len(prompts), size)
    return [collate_training(prompts[start : start + size], pad_id) for start in starts]


def collate_training(prompts: list[Prompt], pad_id: int) -> dict[str, Any]:
    """A batch to learn from, padded on the right.

    ids, mask and labels (B, L), labels being IGNORED but for answers; pictured: the ids of the
    items whose vectors are needed, prompt after prompt.
    """
    batch = _padded(prompts, pad_id, on_the_left=False)
    labels = torch.full_like(batch["ids"], IGNORED)
    for row, prompt in enumerate(prompts):
        answer = prompt.ids[prompt.num_prompt :]
        labels[row, prompt.num_prompt : len(prompt.ids)] = torch.tensor(answer, dtype=torch.long)
    return batch | {"labels": labels}


def collate_generation(prompts: list[Prompt], pad_id: int) -> dict[str, Any]:
    """A batch to be continued, padded on the left: every prompt ends at the last column."""
    return _padded(prompts, pad_id, on_the_left=True)


def _padded(prompts: list[Prompt], pad_id: int, *, on_the_left: bool) -> dict[str, Any]:
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        length = len(prompt.ids)
        place = slice(longest - length, longest) if on_the_left else slice(0, length)
        ids[row, place] = torch.tensor(prompt.ids, dtype=torch.long)
        mask[row, place] = 1
    pictured = [item for prompt in prompts for item in prompt.pictured]
    return {"ids": ids, "mask": mask, "pictured": pictured}


def label_tokens(*batches: Mapping[str, Tensor]) -> int:
    """How many tokens of training batches are learnt from."""
    return sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
