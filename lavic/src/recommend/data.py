"""The conversations of stage 2, data/<category>/{train,valid,test}.jsonl, as requests to answer.

A line holds context, context_items, gt, gt_items, candidates_st and candidates_gpt_large. The
context keeps its marks (<submission>…</submission>, <comment>…</comment>). An item's id is any text
without white space: books' begin with a digit. Standard library only.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.src.catalogue import read_objects, read_titles
from shared.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversation:
    """One line: what was said, what was recommended in truth, what may be recommended here."""

    context: str
    gt_items: tuple[str, ...]
    candidates: tuple[str, ...]
    row: dict[str, Any]  # as in the file

    @property
    def reachable(self) -> bool:
        """Whether a true recommendation is among the candidates."""
        return not set(self.gt_items).isdisjoint(self.candidates)


@dataclass(frozen=True)
class Request:
    """One prompt: a context, the candidates in their order, and the id to answer with, if known."""

    context: str
    candidates: tuple[str, ...]
    answer: str | None = None


def read_conversations(path: Path, candidate_type: str) -> list[Conversation]:
    """The conversations of a file, in order, with the candidates of one type.

    Those without a true recommendation are there too, with `gt_items` empty. True ids are kept as
    listed, some of them twice; a candidate that stands twice counts once, at its first place.
    Raises UserError for a file that is missing or empty, and for a line that is not of this form,
    with its number.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing: put the conversations of the category there, or type --data-root"
        )
    found = [
        _conversation(row, candidate_type, f"{path} line {number}")
        for number, row in read_objects(path)
    ]
    if not found:
        raise UserError(f"{path} holds no conversation")
    return found


def with_answers(conversations: Iterable[Conversation], seed: int) -> list[Request]:
    """A request for every conversation and true recommendation of it as listed, in order.

    Where the list of candidates lacks the true id, that takes the place of another one, which is
    drawn from (seed, number of the conversation, number of the id): the same in every epoch. Other
    true ids keep their places, and the conversations stay what they are.
    """
    return [
        Request(c.context, _including(answer, c, f"{seed}/{number}/{rank}"), answer)
        for number, c in enumerate(conversations)
        for rank, answer in enumerate(c.gt_items)
    ]


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
        """The test's requests as users make them: each with its own candidates, no answer."""
        return [Request(talk.context, talk.candidates) for talk in self.test]

    def items(self) -> set[str]:
        """Every candidate of every request."""
        requests = (*self.train, *self.valid, *self.asked)
        return {item for request in requests for item in request.candidates}


def read_talks(
    files: dict[str, Path], candidate_type: str, titles: Path, *, limit: int | None, seed: int
) -> Talks:
    """The conversations of train, valid and test, the first `limit` of each, and the titles.

    Raises UserError for a bad line, and for files without use.
    """
    found = {
        split: read_conversations(path, candidate_type)[:limit] for split, path in files.items()
    }
    train, valid = (with_answers(found[split], seed) for split in ("train", "valid"))
    for split, requests in (("train", train), ("valid", valid)):
        if not requests:
            raise UserError(f"{files[split]} holds no gt_items: nothing to learn from")
    talks = Talks(train, valid, found["test"], read_titles(titles))
    _check_titles(talks, titles)
    return talks


def _check_titles(talks: Talks, path: Path) -> None:
    """Warn of candidates without a title. Raises UserError when none has one."""
    items = talks.items()
    nameless = [item for item in sorted(items) if item not in talks.titles]
    if len(nameless) == len(items):
        raise UserError(
            f"{path} has none of the {len(nameless)} candidates, the first is {nameless[0]}: give "
            "the products of these conversations by --item_meta_path"
        )
    if nameless:
        log.warning(
            "%d of %d candidates have no title in %s, the first is %s",
            len(nameless), len(items), path, nameless[0],
        )  # fmt: skip


def _including(answer: str, conversation: Conversation, key: str) -> tuple[str, ...]:
    candidates = conversation.candidates
    if answer in candidates:
        return candidates
    places = [n for n, item in enumerate(candidates) if item not in conversation.gt_items]
    places = places or list(range(len(candidates)))
    if not places:
        return (answer,)
    place = random.Random(key).choice(places)
    return (*candidates[:place], answer, *candidates[place + 1 :])


def _conversation(row: dict[str, Any], candidate_type: str, where: str) -> Conversation:
    context = row.get("context")
    if not isinstance(context, str):
        raise UserError(
            f"{where}: no text under 'context' (keys there: {', '.join(row) or 'none'})"
        )
    gt_items = _ids(row, "gt_items", where)
    candidates = tuple(dict.fromkeys(_ids(row, candidate_type, where)))
    if not candidates:
        raise UserError(f"{where}: {candidate_type} is empty, there is nothing to recommend")
    return Conversation(context, gt_items, candidates, row)


def _ids(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    found = row.get(key)
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        have = ", ".join(row) or "none"
        raise UserError(f"{where}: no list of ids under {key!r} (keys there: {have})")
    ids = tuple(item.strip() for item in found)
    if any(not item or len(item.split()) > 1 for item in ids):
        raise UserError(f"{where}: {key} holds an id that is empty or has white space in it")
    return ids
