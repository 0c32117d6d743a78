"""Stage 1's samples as the model reads them: prompt, item tokens, description, the picture's views.

All of it is done in the loader's workers. A sample that cannot be used (a picture that is none, a
title that leaves no room for the answer) is left out of its batch, with its reason; nothing takes
its place. B rows of a batch, L tokens of the longest, V views of all pictures together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lavic.src.catalogue import Sample
from lavic.src.vision.model import ITEM_TOKENS, MOST_VIEWS, picture_views
from shared.errors import UserError
from shared.images import problem, read_rgb

NO_LABEL = -100
# Title and item tokens follow the head; the answer begins right after the mark, without a space.
CAPTION_HEAD = (
    "You are a helpful assistant.\n"
    "Given an Amazon product's title and its image, please provide a detailed, visually grounded "
    "description of the product that would help someone decide whether to purchase it. Focus on "
    "the product's appearance, features, and any other visually informative aspects. Do not "
    "mention the product's title in your answer. This product's title is: "
)
ANSWER_MARK = "\n\nAssistant:"


class LeftOut(NamedTuple):
    """A sample that cannot be used, and why."""

    name: str
    reason: str


class Exercise(NamedTuple):
    """One sample: `tokens` (L,) of which those from `answer` on are to be said."""

    tokens: Tensor
    head: int  # tokens before the first item token; they know nothing of the picture
    answer: int
    views: Tensor  # (V, 3, S, S)


class Batch(NamedTuple):
    """Rows of one forward pass, filled up on the right."""

    tokens: Tensor  # (B, L)
    mask: Tensor  # (B, L) int64, 1 where there is a token
    labels: Tensor  # (B, L), NO_LABEL where nothing is to be said
    views: Tensor  # (V, 3, S, S)
    num_views: Tensor  # (B,)
    head: int  # tokens at the start of every row before its first item token
    has_fixed: bool  # whether every row starts with the tokens that all prompts have in common
    num_labels: int

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        tokens, mask, labels, views, num_views = (
            part.to(device, non_blocking=True) for part in self[:5]
        )
        return self._replace(
            tokens=tokens, mask=mask, labels=labels, views=views, num_views=num_views
        )


class Step(NamedTuple):
    """What one optimizer step of this process reads: its batches, and what was left out of them."""

    batches: list[Batch]
    left_out: list[LeftOut]

    @property
    def num_labels(self) -> int:
        """Tokens to be said in all its batches."""
        return sum(batch.num_labels for batch in self.batches)

    @property
    def num_used(self) -> int:
        """Samples in all its batches."""
        return sum(len(batch.tokens) for batch in self.batches)


def one_by_one(step: Step) -> Iterator[Batch]:
    """Each sample of a step as a batch of its own."""
    for batch in step.batches:
        views = batch.views.split(batch.num_views.tolist())
        for row, own in enumerate(views):
            one = slice(row, row + 1)
            labels = batch.labels[one]
            yield batch._replace(
                tokens=batch.tokens[one], mask=batch.mask[one], labels=labels, views=own,
                num_views=batch.num_views[one], num_labels=int((labels != NO_LABEL).sum()),
            )  # fmt: skip


class Captions(Dataset[Exercise | LeftOut]):
    """Samples as exercises.

    slots: fixed5 has five item tokens whatever the picture, those without a view keep their own
    embedding (the original at batch size 1); views has as many item tokens as views.
    """

    def __init__(self, samples: list[Sample], processor: Any, slots: str, max_length: int) -> None:
        self._samples, self._processor = samples, processor
        self._slots, self._max_length = slots, max_length
        self._tokenizer = processor.tokenizer
        self._first_item = self._tokenizer.convert_tokens_to_ids(ITEM_TOKENS[0])

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Exercise | LeftOut:
        sample = self._samples[index]
        try:
            views = picture_views(self._processor, read_rgb(sample.image_path))
            return self._exercise(sample, views)
        except ValueError as reason:
            return LeftOut(str(sample.image_path), str(reason))

    def _exercise(self, sample: Sample, views: Tensor) -> Exercise:
        slots = MOST_VIEWS if self._slots == "fixed5" else len(views)
        text = prompt(without_item_tokens(sample.title), slots)
        asked: list[int] = self._tokenizer(text)["input_ids"]
        said = self._tokenizer(without_item_tokens(sample.description), add_special_tokens=False)
        if len(asked) >= self._max_length:
            raise ValueError(
                f"the prompt alone has {len(asked)} of the --max_length {self._max_length} tokens"
            )
        tokens = torch.tensor((asked + said["input_ids"])[: self._max_length])
        return Exercise(tokens, asked.index(self._first_item), len(asked), views)


class Collate:
    """The samples of a step as its batches of `batch_size`, the last of which may be smaller."""

    def __init__(self, batch_size: int, pad: int, fixed: list[int]) -> None:
        self._batch_size, self._pad, self._fixed = batch_size, pad, torch.tensor(fixed)

    def __call__(self, samples: list[Exercise | LeftOut]) -> Step:
        """The step that these samples make."""
        usable = [sample for sample in samples if isinstance(sample, Exercise)]
        left_out = [sample for sample in samples if isinstance(sample, LeftOut)]
        groups = range(0, len(usable), self._batch_size)
        batches = [self._batch(usable[start : start + self._batch_size]) for start in groups]
        return Step(batches, left_out)

    def _batch(self, rows: list[Exercise]) -> Batch:
        longest = max(len(row.tokens) for row in rows)
        tokens = torch.full((len(rows), longest), self._pad)
        labels = torch.full_like(tokens, NO_LABEL)
        mask = torch.zeros_like(tokens)
        for number, row in enumerate(rows):
            length = len(row.tokens)
            tokens[number, :length] = row.tokens
            labels[number, row.answer : length] = row.tokens[row.answer :]
            mask[number, :length] = 1
        return Batch(
            tokens,
            mask,
            labels,
            torch.cat([row.views for row in rows]),
            torch.tensor([len(row.views) for row in rows]),
            min(row.head for row in rows),
            all(torch.equal(row.tokens[: len(self._fixed)], self._fixed) for row in rows),
            int((labels != NO_LABEL).sum()),
        )


def refuse_unusable(samples: list[Sample], what: str) -> None:
    """Raise UserError when not one of the samples has a picture that can be decoded.

    The first that can be ends the search, so that this costs nothing where all is well.
    """
    reason = ""
    for sample in samples:
        reason = problem(sample.image_path) or ""
        if not reason:
            return
    raise UserError(
        f"none of the {len(samples)} {what} samples has a usable picture; the last is "
        f"{samples[-1].image_path} ({reason}): fetch them again with src/crawl_images.py"
    )


def prompt(title: str, slots: int) -> str:
    """What is asked about a product of this title, with `slots` item tokens for its picture."""
    return f"{CAPTION_HEAD}{title}\n{''.join(ITEM_TOKENS[:slots])}{ANSWER_MARK}"


def without_item_tokens(text: str) -> str:
    """`text`, in which a foreign hand could have put item tokens, without them."""
    for token in ITEM_TOKENS:
        text = text.replace(token, "")
    return text


def fixed_tokens(tokenizer: Any) -> list[int]:
    """The tokens with which the prompts begin whatever the title.

    A tokenizer may join the head's last characters with the title's first, so it is asked with
    several; a prompt that begins otherwise all the same is found by Collate.
    """
    several = [
        tokenizer(prompt(title, 1))["input_ids"] for title in ("A", "b", "7", "(", "é", "手")
    ]
    return list(_common_start(several))


def _common_start(rows: list[list[int]]) -> Iterator[int]:
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            return
        yield tokens[0]
