"""What stage 2 reads: the three conversation files, the products' titles, and loaders over them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from lavic.src import sample_limit
from lavic.src.catalogue import read_titles
from lavic.src.conversations import (
    Conversation,
    Request,
    as_asked,
    read_conversations,
    with_answers,
)
from lavic.src.recommend_prompts import (
    Prompt,
    PromptEncoder,
    collate_generation,
    collate_training,
)
from shared.checkpoint import Position
from shared.distributed import World
from shared.errors import UserError
from shared.loader import make_eval_loader, make_loader

if TYPE_CHECKING:
    from lavic.src.prompt_tuning import Config

log = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass(frozen=True)
class Talks:
    """The requests of training and validation, one for each true id; the test's conversations."""

    train: list[Request]
    valid: list[Request]
    test: list[Conversation]
    titles: dict[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """How many there are, for the run's status."""
        requests = {"training requests": len(self.train), "validation requests": len(self.valid)}
        return requests | {"test conversations": len(self.test), "items": len(self.items())}

    @property
    def asked(self) -> list[Request]:
        """The test's requests."""
        return as_asked(self.test)

    def items(self) -> set[str]:
        """Every candidate of every request."""
        requests = (*self.train, *self.valid, *self.asked)
        return {item for request in requests for item in request.candidates}


def read_talks(cfg: Config) -> Talks:
    """The files of `cfg`, checked. Raises UserError for a bad line, and for files without use."""
    found = {split: _first(cfg, split) for split in ("train", "valid", "test")}
    train, valid = (with_answers(found[split], cfg.run.seed) for split in ("train", "valid"))
    for split, requests in (("train", train), ("valid", valid)):
        if not requests:
            raise UserError(f"{cfg.conversations(split)} holds no gt_items: nothing to learn from")
    talks = Talks(train, valid, found["test"], read_titles(cfg.item_meta_path))
    nameless = [item for item in sorted(talks.items()) if item not in talks.titles]
    if len(nameless) == len(talks.items()):
        raise UserError(
            f"{cfg.item_meta_path} has none of the {len(nameless)} candidates, the first is "
            f"{nameless[0]}: give the products of these conversations by --item_meta_path"
        )
    if nameless:
        log.warning(
            "%d of %d candidates have no title in %s, the first is %s",
            len(nameless),
            len(talks.items()),
            cfg.item_meta_path,
            nameless[0],
        )
    return talks


def training_batches(
    cfg: Config, talks: Talks, encoder: PromptEncoder, pad_id: int, world: World, position: Position
) -> Iterator[list[Batch]]:
    """The rest of an epoch for this rank: each step's batches, `grad_accum` of them."""
    return iter(
        make_loader(
            Prompts(talks.train, encoder),
            cfg.samples_a_step,
            world,
            seed=cfg.run.seed,
            workers=cfg.num_workers,
            epoch=position.epoch,
            offset=position.batch,
            collate=partial(_in_batches, size=cfg.batch_size, pad_id=pad_id),
        )
    )


def validation_batches(
    batch_size: int, requests: Sequence[Request], encoder: PromptEncoder, pad_id: int, world: World
) -> Iterator[Batch]:
    """This rank's share of the requests with their answers; none left out, none repeated."""
    collate = partial(collate_training, pad_id=pad_id)
    return iter(make_eval_loader(Prompts(requests, encoder), batch_size, world, collate=collate))


def test_batches(
    batch_size: int, requests: Sequence[Request], encoder: PromptEncoder, pad_id: int, world: World
) -> Iterator[Batch]:
    """This rank's share of the requests, to be answered."""
    collate = partial(collate_generation, pad_id=pad_id)
    return iter(make_eval_loader(Prompts(requests, encoder), batch_size, world, collate=collate))


class Prompts(Dataset[Prompt]):
    """Requests, encoded when asked for."""

    def __init__(self, requests: Sequence[Request], encoder: PromptEncoder) -> None:
        self._requests, self._encoder = requests, encoder

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> Prompt:
        return self._encoder.encode(self._requests[index])


def _in_batches(prompts: list[Prompt], size: int, pad_id: int) -> list[Batch]:
    """A step's prompts in batches of `size`."""
    starts = range(0, len(prompts), size)
    return [collate_training(prompts[start : start + size], pad_id) for start in starts]


def _first(cfg: Config, split: str) -> list[Conversation]:
    found = read_conversations(cfg.conversations(split), cfg.candidate_type)
    return found[: sample_limit.most(cfg.max_samples)]
