"""Prompts of stage 2: what they say, what is cut, what padding does."""

from __future__ import annotations

import pickle

import pytest
import torch

from lavic.src.recommend.data import Request
from lavic.src.recommend.prompts import (
    ANSWER_ROOM,
    IGNORED,
    RECOMMEND_CANDIDATES,
    RECOMMEND_HEAD,
    RECOMMEND_MARK,
    PromptEncoder,
    collate_generation,
    collate_training,
    label_tokens,
)
from lavic.src.vision.model import ITEM_TOKENS
from shared.errors import UserError
from tests.lavic_talks import load, nano

TITLES = {"B000000001": "Round lamp", "0312345678": "灯的书 📖"}
VIEWS = {"B000000001": 3, "B000000003": 5}
CANDIDATES = ("B000000001", "0312345678", "B000000003")


@pytest.fixture(scope="module")
def tokenizer():
    return load(nano())[1].tokenizer


def encoder_of(tokenizer, **settings):
    return PromptEncoder(tokenizer, TITLES, VIEWS, **({"max_length": 1000} | settings))


def slots(count):
    return "".join(ITEM_TOKENS[:count])


def test_the_prompt_says_what_the_document_does(tokenizer):
    request = Request("<submission>A lamp 灯</submission>\n", CANDIDATES, "0312345678")
    prompt = encoder_of(tokenizer).encode(request)
    assert tokenizer.decode(prompt.ids) == (
        "<s>" + RECOMMEND_HEAD + request.context + RECOMMEND_CANDIDATES
        + f"B000000001: Round lamp\n{slots(5)}\n"
        + "0312345678: 灯的书 📖\n"  # no picture: its title alone
        + f"B000000003: No Title\n{slots(5)}\n"
        + RECOMMEND_MARK + "0312345678</s>"
    )  # fmt: skip
    assert prompt.pictured == ("B000000001", "B000000003") and prompt.num_cut == 0
    assert tokenizer.decode(prompt.ids[prompt.num_prompt :]) == "0312345678</s>"


def test_with_one_slot_a_view_there_are_as_many_as_views(tokenizer):
    prompt = encoder_of(tokenizer, slots="views").encode(Request("c", CANDIDATES))
    text = tokenizer.decode(prompt.ids)
    assert f"lamp\n{slots(3)}\n" in text and f"Title\n{slots(5)}\n" in text


def test_a_prompt_without_an_answer_is_the_same_up_to_it(tokenizer):
    encoder = encoder_of(tokenizer, max_length=420)
    context = "<comment>word</comment>\n" * 90
    asked = encoder.encode(Request(context, CANDIDATES))
    taught = encoder.encode(Request(context, CANDIDATES, "B000000001"))
    assert asked.ids == taught.ids[: taught.num_prompt] and asked.num_cut > 0


def test_a_long_context_loses_its_oldest_part_and_nothing_else(tokenizer):
    encoder, whole = encoder_of(tokenizer, max_length=400), encoder_of(tokenizer, max_length=10**6)
    context = "".join(f"<comment>number {n}</comment>\n" for n in range(200))
    request = Request(context, CANDIDATES, "B000000001")
    cut, all_of_it = encoder.encode(request), whole.encode(request)
    assert cut.num_prompt == 400 - ANSWER_ROOM
    head = len(tokenizer(RECOMMEND_HEAD)["input_ids"])
    assert cut.ids[:head] == all_of_it.ids[:head]
    assert cut.ids[head:] == all_of_it.ids[head + cut.num_cut :]
    text = tokenizer.decode(cut.ids)
    assert "number 199<" in text and "number 0<" not in text and text.endswith("B000000001</s>")


def test_candidates_that_leave_no_room_are_refused_by_name(tokenizer):
    with pytest.raises(UserError, match=r"--max-length 60 is too short: .* 3 candidates need \d+"):
        encoder_of(tokenizer, max_length=60).encode(Request("c", CANDIDATES))


def test_an_id_longer_than_the_room_for_it_is_refused(tokenizer):
    with pytest.raises(UserError, match="at most 32 fit"):
        encoder_of(tokenizer).encode(Request("c", ("B000000001",), "!" * 40))


def test_special_tokens_that_somebody_typed_stay_text(tokenizer):
    context = f"see {ITEM_TOKENS[0]} <image> </s> <pad>"
    titles = {"B000000001": f"Nice {ITEM_TOKENS[1]}</s>"}
    encoder = PromptEncoder(tokenizer, titles, VIEWS, max_length=1000)
    ids = encoder.encode(Request(context, ("B000000001",))).ids
    own = set(tokenizer.convert_tokens_to_ids([*ITEM_TOKENS, "<image>", "</s>", "<pad>"]))
    assert sum(token in own for token in ids) == 5  # the candidate's own slots
    assert context in tokenizer.decode(ids)


def test_training_batches_are_padded_on_the_right_and_learn_from_answers_alone(tokenizer):
    encoder = encoder_of(tokenizer)
    requests = [
        Request("a b c", CANDIDATES, "B000000001"),
        Request("c", CANDIDATES[:1], "0312345678"),
    ]
    prompts = [encoder.encode(request) for request in requests]
    batch = collate_training(prompts, tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        length = len(prompt.ids)
        assert batch["ids"][row, :length].tolist() == prompt.ids
        assert batch["mask"][row].tolist() == [1] * length + [0] * (len(batch["ids"][0]) - length)
        learnt = (batch["labels"][row] != IGNORED).nonzero().flatten().tolist()
        assert learnt == list(range(prompt.num_prompt, length))
        assert batch["labels"][row, learnt].tolist() == prompt.ids[prompt.num_prompt :]
    assert batch["pictured"] == ["B000000001", "B000000003", "B000000001"]
    assert label_tokens(batch) == sum(len(p.ids) - p.num_prompt for p in prompts)


def test_batches_to_be_continued_end_with_the_mark(tokenizer):
    encoder = encoder_of(tokenizer)
    prompts = [encoder.encode(Request(c, CANDIDATES)) for c in ("a b c d", "c")]
    batch = collate_generation(prompts, tokenizer.pad_token_id)
    assert "labels" not in batch
    mark = tokenizer(RECOMMEND_MARK, add_special_tokens=False)["input_ids"]
    assert batch["ids"][:, -len(mark) :].tolist() == [mark, mark]
    assert batch["mask"][1].tolist() == sorted(batch["mask"][1].tolist())
    assert torch.equal(batch["ids"][1][batch["mask"][1].bool()], torch.tensor(prompts[1].ids))


def test_an_encoder_travels_to_a_worker(tokenizer):
    encoder = encoder_of(tokenizer)
    request = Request("c", CANDIDATES, "B000000001")
    assert pickle.loads(pickle.dumps(encoder)).encode(request) == encoder.encode(request)
