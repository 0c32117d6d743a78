"""What the demo's language model knows before a training: words, and how to look things up.

It learns from words alone: where a picture's vectors will stand, its lessons have the sum of the
picture's words. Lesson one: say what the vectors say. Lesson two: of ten candidates name the one
whose vectors say what was asked for, and end there.

Looking up needs heads that find an earlier token and carry it on, which trained models have and
random ones learn slowly; `arrange` puts their like in place. R rows of a lesson, L tokens, D the
width.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lavic.demo_data.products import (
    BACKGROUNDS,
    PRODUCT_COLOURS,
    PRODUCT_PATTERNS,
    PRODUCT_SHAPES,
    Item,
    Look,
    all_looks,
    wish,
)
from lavic.src.recommend.prompts import RECOMMEND_CANDIDATES, RECOMMEND_HEAD, RECOMMEND_MARK
from lavic.src.vision.captions import ANSWER_MARK, CAPTION_HEAD

ID_DIMS, WORD_DIMS = slice(0, 40), slice(40, 60)  # of the width; the rest is for everything else
ANY, IS_ID, IS_WORD, IS_SEEN = 60, 61, 62, 63  # flags
SLOTS = 5
BLUR = 0.15
STEPS, SHORT_STEPS, DESCRIPTIONS, CHOICES = 300, 180, 8, 8
LEARNING_RATE = 3e-3


class Words:
    """Token ids of what the lessons speak of."""

    def __init__(self, tokenizer: Any, items: list[Item]) -> None:
        self._tokenizer = tokenizer
        self.ids = [self.of(item.id)[0] for item in items]
        self.titles = [self.of(f": {item.title}\n") for item in items]
        everything = (*PRODUCT_COLOURS, *PRODUCT_SHAPES, *PRODUCT_PATTERNS, *BACKGROUNDS)
        self.look = {word: self.of(f" {word}")[0] for word in everything}
        self.end = tokenizer.eos_token_id
        self.slots = [len(tokenizer) + number for number in range(SLOTS)]  # spare rows, as later

    @cache  # noqa: B019, as long-lived as its cache
    def of(self, text: str) -> list[int]:
        """The tokens of a text, without a beginning."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class Row:
    """One exercise: tokens, where which look is seen, and the places of what is to be said."""

    tokens: list[int] = field(default_factory=list)
    seen: list[tuple[int, list[int]]] = field(default_factory=list)  # place, the look's words
    answers: list[int] = field(default_factory=list)

    def read(self, *parts: list[int]) -> None:
        """Add what is given."""
        for tokens in parts:
            self.tokens += tokens

    def look_at(self, look: Look, words: Words, views: int) -> None:
        """Add the five places of a picture, the first `views` of them filled."""
        shown = [words.look[word] for word in look]
        self.seen += [(len(self.tokens) + number, shown) for number in range(views)]
        self.tokens += words.slots

    def say(self, tokens: list[int]) -> None:
        """Add an answer."""
        self.answers += range(len(self.tokens), len(self.tokens) + len(tokens))
        self.tokens += tokens


def arrange(model: Any, words: Words) -> None:
    """Draw embeddings and attention so that ids and words can be looked up and carried on."""
    core = model.model.language_model
    with torch.no_grad():
        table = core.embed_tokens.weight
        table.normal_(0, 0.1)
        table[:, WORD_DIMS] = 0
        table[:, ID_DIMS] *= 0.3
        table[:, ANY] = 1
        table[:, IS_ID : IS_SEEN + 1] = 0
        ids = torch.tensor(words.ids)
        table[ids, ID_DIMS] = nn.functional.normalize(torch.randn(len(ids), 40), dim=1) * 2
        table[ids, IS_ID] = 2
        look = torch.tensor(list(words.look.values()))
        basis = nn.init.orthogonal_(torch.empty(20, 20))[: len(look)]
        table[look, WORD_DIMS] = basis * 1.5
        table[look, IS_WORD] = 2
        model.lm_head.weight.copy_(table)
        model.lm_head.weight[:, ANY:] = 0
        for layer in core.layers:
            _quieten(layer)
        _carry_ids_to_what_follows(core.layers[0].self_attn, head=0)
        _carry_words_on(core.layers[0].self_attn, head=1)
        for head, half in ((0, slice(0, 20)), (1, slice(20, 40))):
            _match_words_and_name_the_id(core.layers[1].self_attn, head, half)


def _quieten(layer: Any) -> None:
    """Small random weights, from which what the arrangement leaves open is learnt."""
    for weight in (p for p in layer.parameters() if p.dim() == 2):
        weight.normal_(0, 0.3 * weight.shape[1] ** -0.5)


def _rows(head: int) -> slice:
    return slice(32 * head, 32 * (head + 1))


def _carry_ids_to_what_follows(attention: Any, head: int) -> None:
    """Every token looks at the latest id: all rotations agree at distance 0 and part beyond."""
    rows = _rows(head)
    for name, flag, gain in (("q_proj", ANY, 0.8), ("k_proj", IS_ID, 1.1)):
        weight = getattr(attention, name).weight
        weight[rows] = 0
        weight[rows.start : rows.start + 16, flag] = gain
    attention.v_proj.weight[rows] = 0
    attention.v_proj.weight[rows, 0:32] = torch.eye(32)
    attention.o_proj.weight[:, rows] = 0
    attention.o_proj.weight[0:32, rows] = torch.eye(32)


def _carry_words_on(attention: Any, head: int) -> None:
    """Every token looks at the words of looks before it; slow rotations: from any distance."""
    rows = _rows(head)
    for name, flag, gain in (("q_proj", ANY, 0.5), ("k_proj", IS_WORD, 0.7)):
        weight = getattr(attention, name).weight
        weight[rows] = 0
        weight[rows.start + 13 : rows.start + 16, flag] = gain
    attention.q_proj.weight[rows.start + 13 : rows.start + 16, IS_SEEN] = -0.5
    attention.v_proj.weight[rows] = 0
    attention.v_proj.weight[rows.start : rows.start + 20, WORD_DIMS] = torch.eye(20)
    attention.o_proj.weight[:, rows] = 0
    attention.o_proj.weight[WORD_DIMS, rows.start : rows.start + 20] = torch.eye(20)


def _match_words_and_name_the_id(attention: Any, head: int, half: slice) -> None:
    """Every token looks at pictures whose words it carries, and takes over half of their id."""
    rows = _rows(head)
    slow = [*range(rows.start + 6, rows.start + 16), *range(rows.start + 22, rows.start + 32)]
    for name in ("q_proj", "k_proj"):
        weight = getattr(attention, name).weight
        weight[rows] = 0
        weight[slow, WORD_DIMS] = 2.5 * torch.eye(20)
    attention.q_proj.weight[rows.start + 5, ANY] = 4.0
    attention.k_proj.weight[rows.start + 5, IS_SEEN] = 4.0
    attention.v_proj.weight[rows] = 0
    attention.v_proj.weight[rows.start : rows.start + 20, half] = torch.eye(20)
    attention.o_proj.weight[:, rows] = 0
    attention.o_proj.weight[half, rows.start : rows.start + 20] = 4 * torch.eye(20)


def describing(words: Words, rng: random.Random) -> Row:
    """Lesson one: a title, a picture, its description."""
    look, row = rng.choice(all_looks()), Row()
    row.read([1], words.of(CAPTION_HEAD[:-2]), rng.choice(words.titles))
    row.look_at(look, words, rng.choice((3, 4, 5, 5)))
    row.read(words.of(ANSWER_MARK))
    row.say(words.of(look.description))
    return row


def choosing(words: Words, rng: random.Random, candidates: int, *, is_short: bool) -> Row:
    """Lesson two: a wish, candidates of which one fits it, that one's id and the end.

    Ids and looks are thrown together anew for every row: there is nothing to learn by heart.
    """
    looks = _different_looks(rng, candidates)
    ids = rng.sample(words.ids, candidates)
    wanted, row = rng.randrange(candidates), Row([1])
    row.read([] if is_short else words.of(RECOMMEND_HEAD))
    row.read(words.of(wish(looks[wanted], rng.randrange(4))), words.of(RECOMMEND_CANDIDATES))
    for name, look in zip(ids, looks, strict=True):
        row.read([name], rng.choice(words.titles))
        row.look_at(look, words, rng.choice((3, 4, 5, 5)))
        row.read(words.of("\n"))
    row.read(words.of(RECOMMEND_MARK))
    row.say([ids[wanted], words.end])
    return row


def _different_looks(rng: random.Random, count: int) -> list[Look]:
    """Looks of which no two have both colour and background in common."""
    pairs = [(colour, ground) for colour in PRODUCT_COLOURS for ground in BACKGROUNDS]
    return [
        Look(colour, rng.choice(PRODUCT_SHAPES), rng.choice(PRODUCT_PATTERNS), ground)
        for colour, ground in rng.sample(pairs, count)
    ]


def lesson_loss(model: Any, rows: list[Row], pad: int) -> Tensor:
    """The mean of the answers' token losses, in nats; a scalar."""
    core = model.model.language_model
    tokens = torch.full((len(rows), max(len(row.tokens) for row in rows)), pad)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
    embeds = core.embed_tokens(tokens)
    at = [(number, place) for number, row in enumerate(rows) for place, _ in row.seen]
    shown = torch.tensor([look for row in rows for _, look in row.seen])
    embeds = embeds.index_put(_columns(at), as_seen(core.embed_tokens.weight, shown))
    hidden = core(inputs_embeds=embeds, use_cache=False).last_hidden_state
    said = [(number, place) for number, row in enumerate(rows) for place in row.answers]
    numbers, places = _columns(said)
    logits = model.lm_head(hidden[numbers, places - 1])
    return nn.functional.cross_entropy(logits, tokens[numbers, places])


def as_seen(table: Tensor, looks: Tensor) -> Tensor:
    """What stands for a picture in the lessons: its words' sum, louder or softer, blurred; (N, D).

    table: (tokens, D), the embeddings; looks: (N, words), the ids of each picture's words.
    """
    clear = torch.zeros(len(looks), table.shape[1])
    clear[:, WORD_DIMS] = table[looks][..., WORD_DIMS].sum(1)
    clear[:, ANY], clear[:, IS_SEEN] = 1, 2
    volume = torch.empty(len(looks), 1).uniform_(0.7, 1.4)
    return volume * clear + BLUR * torch.randn_like(clear)


def _columns(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    first, second = torch.tensor(pairs).unbind(1)
    return first, second


def teach(model: Any, tokenizer: Any, items: list[Item], seed: int) -> None:
    """Arrange the language model, and let it take its lessons."""
    words, rng = Words(tokenizer, items), random.Random(seed)
    arrange(model, words)
    pupils = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(pupils, lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 20, 1.05 - step / STEPS)
        for rows in (
            [describing(words, rng) for _ in range(DESCRIPTIONS)],
            [choosing(words, rng, 10, is_short=step < SHORT_STEPS) for _ in range(CHOICES)],
        ):
            lesson_loss(model, rows, tokenizer.pad_token_id).backward()
        nn.utils.clip_grad_norm_(pupils, 1.0)
        optimizer.step()
        optimizer.zero_grad()
