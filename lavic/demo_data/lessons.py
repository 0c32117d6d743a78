"""What the demo's language model knows before a training: words, and how to look things up.

It is trained from random weights, by gradient descent on exercises without pictures: where a
picture's vectors will stand there is a sum of fixed random vectors, one for each word of its look.
It learns to describe a look, and to name the candidate that was asked for, first in two words, then
in the sentences that occur in talks. It never reads stage 2's instruction, nor a comment.

Four things make looking up learnable within a minute: many questions about one list, so that a
step has hundreds of answers; Muon for the matrices; picture vectors unlike those of words, or else
a question finds itself; and a second loss, for naming the id at the picture's places after the
first layer. N picture vectors, D the width.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lavic.demo_data.products import (
    BACKGROUNDS,
    PRODUCT_COLOURS,
    PRODUCT_PATTERNS,
    PRODUCT_SHAPES,
    Item,
    Look,
    wish,
)
from lavic.src.recommend.prompts import RECOMMEND_CANDIDATES, RECOMMEND_MARK
from lavic.src.vision.captions import ANSWER_MARK, CAPTION_HEAD

LOOK_WORDS = (*PRODUCT_COLOURS, *PRODUCT_SHAPES, *PRODUCT_PATTERNS, *BACKGROUNDS)
SLOTS = 5  # places of a picture
ROWS, QUESTIONS, DESCRIPTIONS = 32, 10, 8
LEARNT = 0.9  # the share of right answers that ends a lesson, but for the last one
MOST_STEPS, LAST_STEPS = 400, 120
RATES = (0.01, 3e-3)  # of Muon, of AdamW


@dataclass
class Row:
    """One exercise: tokens, the pictures in it, and the places of what is to be said."""

    tokens: list[int] = field(default_factory=lambda: [1])
    places: list[int] = field(default_factory=list)  # of picture vectors
    seen: list[list[int]] = field(default_factory=list)  # the look's words at each place
    owners: list[int] = field(default_factory=list)  # the candidate's id at each place
    answers: list[int] = field(default_factory=list)

    def read(self, *parts: list[int]) -> None:
        """Add what is given."""
        self.tokens += [token for part in parts for token in part]

    def look_at(self, look: Look, slots: list[int], views: int, owner: int = -1) -> None:
        """Add the places of a picture, the first `views` of them filled."""
        self.places += range(len(self.tokens), len(self.tokens) + views)
        self.seen += [[LOOK_WORDS.index(word) for word in look]] * views
        self.owners += [owner] * views if owner >= 0 else []
        self.tokens += slots

    def say(self, tokens: list[int]) -> None:
        """Add an answer."""
        self.answers += range(len(self.tokens), len(self.tokens) + len(tokens))
        self.tokens += tokens


class Exercises:
    """Rows drawn at random. Ids and looks are thrown together anew for every row: there is nothing
    to learn by heart.
    """

    def __init__(self, tokenizer: Any, items: list[Item], seed: int) -> None:
        self._tokenizer, self._rng = tokenizer, random.Random(seed)
        self._looks = [item.look for item in items]
        self._ids = [self._of(item.id)[0] for item in items]
        self._titles = [self._of(f": {item.title}\n") for item in items]
        self._slots = [len(tokenizer) + number for number in range(SLOTS)]  # spare rows, as later
        self._end = tokenizer.eos_token_id

    def describing(self) -> Row:
        """A title, a picture, its description."""
        row, look = Row(), self._rng.choice(self._looks)
        row.read(self._of(CAPTION_HEAD[:-2]), self._rng.choice(self._titles))
        row.look_at(look, self._slots, self._views())
        row.read(self._of(ANSWER_MARK))
        row.say(self._of(look.description))
        return row

    def asked_after(self, candidates: int, kinds: str, questions: int, *, is_short: bool) -> Row:
        """A list of candidates, then questions of these kinds, each with its answer."""
        row, listed = Row(), self._listed(candidates)
        self._show(row, listed, is_short)
        for _ in range(questions):
            (name, look), kind = self._rng.choice(listed), self._rng.choice(kinds)
            row.read(self._question(look, kind))
            self._answer(row, name, is_marked=kind != "d")
        return row

    def asked_before(self, candidates: int, kinds: str, *, is_short: bool) -> Row:
        """A question, a list of candidates, the answer."""
        row, listed = Row(), self._listed(candidates)
        name, look = self._rng.choice(listed)
        row.read(self._question(look, self._rng.choice(kinds)))
        self._show(row, listed, is_short)
        self._answer(row, name, is_marked=True)
        return row

    def _answer(self, row: Row, name: int, *, is_marked: bool) -> None:
        if is_marked:
            row.read(self._of(RECOMMEND_MARK))
        row.say([name, self._end] if is_marked else [name])

    def _question(self, look: Look, kind: str) -> list[int]:
        """Colour and background: kinds d and w in two words, s in a sentence."""
        if kind == "s":
            return self._of(wish(look, self._rng.randrange(4)))
        two = self._rng.sample([look.colour, look.background], 2)
        return [token for word in two for token in self._of(f" {word}")]

    def _listed(self, count: int) -> list[tuple[int, Look]]:
        """Ids with looks of which no two have both colour and background in common."""
        rng, looks = self._rng, {}
        while len(looks) < count:
            look = rng.choice(self._looks)
            looks.setdefault((look.colour, look.background), look)
        return list(zip(rng.sample(self._ids, count), looks.values(), strict=True))

    def _show(self, row: Row, listed: list[tuple[int, Look]], is_short: bool) -> None:
        """The candidates: short with one vector and no title."""
        row.read(self._of(RECOMMEND_CANDIDATES))
        for name, look in listed:
            row.read([name], self._of(":") if is_short else self._rng.choice(self._titles))
            slots, views = (self._slots[:1], 1) if is_short else (self._slots, self._views())
            row.look_at(look, slots, views, name)
            row.read(self._of("\n"))

    def _views(self) -> int:
        return self._rng.choice((3, 4, 5, 5))

    @cache  # noqa: B019, as long-lived as its cache
    def _of(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


class Lesson(NamedTuple):
    """Taken until most answers are right. Kinds of questions: d, answered where they end; w, after
    the assistant's mark; s, in a sentence.
    """

    candidates: int
    after: str  # kinds of questions after the list
    before: str = ""  # and before it, in half of the rows
    blur: float = 0.1  # of the picture vectors
    long: int = 0  # of two steps so many have titles and five places a picture

    def rows(self, make: Exercises, step: int) -> list[Row]:
        """The exercises of a step."""
        share, is_short = 2 if self.before else 1, step % 2 >= self.long
        after = [
            make.asked_after(self.candidates, self.after, QUESTIONS // share, is_short=is_short)
            for _ in range(ROWS // share)
        ]
        return after + [
            make.asked_before(self.candidates, self.before, is_short=is_short)
            for _ in range(ROWS - ROWS // share)
        ]


LESSONS = (
    *(Lesson(candidates, "d") for candidates in (4, 7, 10)),
    Lesson(10, "dww"),
    Lesson(10, "ws", before="w", blur=0.2, long=1),
    Lesson(10, "ws", before="ws", blur=0.6, long=2),
)


def teach(model: Any, make: Exercises) -> None:
    """Draw the language model's weights and let it take its lessons, the last at falling rates."""
    _draw(model)
    codes = torch.randn(len(LOOK_WORDS), model.lm_head.in_features)
    optimizers, step = _optimizers(model), 0
    for lesson in LESSONS:
        is_last, right = lesson is LESSONS[-1], 0.0
        for number in range(LAST_STEPS if is_last else MOST_STEPS):
            rows = lesson.rows(make, step)
            loss, share = exercise(model, rows, as_seen(rows, codes, lesson.blur))
            loss.backward()
            if step % 4 == 0:
                rows = [make.describing() for _ in range(DESCRIPTIONS)]
                loss, _ = exercise(model, rows, as_seen(rows, codes, lesson.blur))
                (0.5 * loss).backward()
            rate = 1.05 - number / LAST_STEPS if is_last else 1.0
            for optimizer, full in zip(optimizers, RATES, strict=True):
                optimizer.param_groups[0]["lr"] = full * min((step + 1) / 20, rate)
                optimizer.step()
                optimizer.zero_grad()
            step, right = step + 1, 0.9 * right + 0.1 * share
            if right > LEARNT and not is_last:
                break


def _optimizers(model: Any) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the layers' matrices, AdamW for everything else."""
    core = model.model.language_model
    inner = [p for p in core.layers.parameters() if p.dim() == 2]
    outer = [p for p in core.parameters() if p.dim() < 2]
    outer += [core.embed_tokens.weight, model.lm_head.weight]
    muon = torch.optim.Muon(inner, weight_decay=0.0, adjust_lr_fn="original")
    return muon, torch.optim.AdamW(outer, weight_decay=0.0, betas=(0.9, 0.98))


def _draw(model: Any) -> None:
    """Random weights: what is read as a word is at first also said as that word, quietly."""
    core = model.model.language_model
    with torch.no_grad():
        table = core.embed_tokens.weight.normal_(0, 1)
        model.lm_head.weight.copy_(0.3 * table.shape[1] ** -0.5 * table)
        for layer in core.layers:
            for weight in (p for p in layer.parameters() if p.dim() == 2):
                weight.normal_(0, weight.shape[1] ** -0.5)
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)


def exercise(model: Any, rows: list[Row], vectors: Tensor) -> tuple[Tensor, float]:
    """The rows' loss, in nats a token, and the share of answers that are right.

    vectors: (N, D), what stands at the picture places. Where there are candidates, half the loss of
    naming them there, after the first layer, is added.
    """
    core = model.model.language_model
    tokens = torch.zeros(len(rows), max(len(row.tokens) for row in rows), dtype=torch.long)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
    seen, (numbers, places) = _columns(rows, "places"), _columns(rows, "answers")
    embeds = core.embed_tokens(tokens).index_put(seen, vectors)
    found = core(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
    logits, wanted = model.lm_head(found[0][numbers, places - 1]), tokens[numbers, places]
    loss = nn.functional.cross_entropy(logits, wanted)
    if owners := [owner for row in rows for owner in row.owners]:
        early = model.lm_head(core.norm(found.hidden_states[1][seen]))
        loss = loss + 0.5 * nn.functional.cross_entropy(early, torch.tensor(owners))
    return loss, float((logits.argmax(1) == wanted).float().mean())


def _columns(rows: list[Row], name: str) -> tuple[Tensor, Tensor]:
    """(numbers of rows, places in them) of all the rows' lists of places."""
    pairs = [(number, place) for number, row in enumerate(rows) for place in getattr(row, name)]
    first, second = torch.tensor(pairs).unbind(1)
    return first, second


def as_seen(rows: list[Row], codes: Tensor, blur: float) -> Tensor:
    """What stands for pictures in the lessons, louder or softer, shifted and blurred: (N, D).

    codes: (words, D), a vector for each of LOOK_WORDS. All vectors of a row are shifted alike.
    """
    looks = torch.tensor([look for row in rows for look in row.seen])
    shift = 2 * blur * torch.randn(len(rows), codes.shape[1])
    volume = torch.empty(len(looks), 1).uniform_(-2.5 * blur, 2.5 * blur).exp()
    clear = volume * (0.5 * codes[looks].sum(1) + shift[_columns(rows, "places")[0]])
    return clear + blur * torch.randn_like(clear)
