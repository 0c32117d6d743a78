"""Stage 2: its prompts; its model against plain transformers and against itself in batches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lavic.src.recommend import evaluation, model
from lavic.src.recommend.data import Request, read_talks
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
from lavic.src.vision.adapters import adapter_parameters, add_adapter
from lavic.src.vision.model import ITEM_TOKENS
from shared.distributed import World
from shared.errors import UserError
from tests.lavic_talks import load, nano, shake

PAD = 4
TITLES = {"B000000001": "Round lamp", "0312345678": "灯的书 📖"}
VIEWS = {"B000000001": 3, "B000000003": 5}
CANDIDATES = ("B000000001", "0312345678", "B000000003")


@pytest.fixture(scope="module")
def tokenizer():
    return load(nano())[1].tokenizer


def encoder_of(tokenizer, **settings):
    return PromptEncoder(tokenizer, TITLES, VIEWS, **({"max_length": 1000} | settings))


@pytest.mark.parametrize(("slots", "first"), [("fixed5", 5), ("views", 3)])
def test_the_prompt_says_what_the_document_does(tokenizer, slots, first):
    request = Request("<submission>A lamp 灯</submission>\n", CANDIDATES, "0312345678")
    encoder = encoder_of(tokenizer, slots=slots)
    prompt = encoder.encode(request)
    assert tokenizer.decode(prompt.ids) == (
        "<s>" + RECOMMEND_HEAD + request.context + RECOMMEND_CANDIDATES
        + f"B000000001: Round lamp\n{''.join(ITEM_TOKENS[:first])}\n"
        + "0312345678: 灯的书 📖\n"  # no picture: its title alone
        + f"B000000003: No Title\n{''.join(ITEM_TOKENS)}\n"
        + RECOMMEND_MARK + "0312345678</s>"
    )  # fmt: skip
    assert prompt.pictured == ("B000000001", "B000000003") and prompt.num_cut == 0
    assert tokenizer.decode(prompt.ids[prompt.num_prompt :]) == "0312345678</s>"
    assert pickle.loads(pickle.dumps(encoder)).encode(request) == prompt  # as a worker has it


def test_a_long_context_loses_its_oldest_part_and_nothing_else(tokenizer):
    encoder, whole = encoder_of(tokenizer, max_length=400), encoder_of(tokenizer, max_length=10**6)
    context = "".join(f"<comment>number {n}</comment>\n" for n in range(200))
    request = Request(context, CANDIDATES, "B000000001")
    cut, all_of_it = encoder.encode(request), whole.encode(request)
    assert cut.num_prompt == 400 - ANSWER_ROOM
    head = len(tokenizer(RECOMMEND_HEAD)["input_ids"])
    assert cut.ids[:head] == all_of_it.ids[:head]
    assert cut.ids[head:] == all_of_it.ids[head + cut.num_cut :]
    asked = encoder.encode(Request(context, CANDIDATES))  # without an answer the same up to it
    assert asked.ids == cut.ids[: cut.num_prompt]


def test_what_does_not_fit_is_refused_by_name(tokenizer):
    with pytest.raises(UserError, match=r"--max-length 60 is too short: .* 3 candidates need \d+"):
        encoder_of(tokenizer, max_length=60).encode(Request("c", CANDIDATES))
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


def test_training_batches_learn_from_answers_alone(tokenizer):
    encoder = encoder_of(tokenizer)
    requests = [
        Request("a b c", CANDIDATES, "B000000001"),
        Request("c", CANDIDATES[:1], "0312345678"),
    ]
    prompts = [encoder.encode(request) for request in requests]
    batch = collate_training(prompts, tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        learnt = (batch["labels"][row] != IGNORED).nonzero().flatten().tolist()
        assert learnt == list(range(prompt.num_prompt, len(prompt.ids)))
        assert batch["labels"][row, learnt].tolist() == prompt.ids[prompt.num_prompt :]
    assert batch["pictured"] == ["B000000001", "B000000003", "B000000001"]
    assert label_tokens(batch) == sum(len(p.ids) - p.num_prompt for p in prompts)


# --- the model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks():
    files = {split: nano().talks(split) for split in ("train", "valid", "test")}
    return read_talks(files, "candidates_gpt_large", nano().meta, limit=None, seed=0)


@pytest.fixture(scope="module")
def built(talks, tmp_path_factory):
    """What stage 2 trains, its adapter random."""
    built = model.build(
        str(nano().model), nano().adapter, nano().images, tmp_path_factory.mktemp("cache"), talks,
        World(), workers=0, dtype=torch.float32, max_length=900, slots="fixed5",
    )  # fmt: skip
    built.recommender.model = add_adapter(built.recommender.model, model.LANGUAGE_TARGETS)
    shake(built.recommender.model, 3)
    return built


@pytest.fixture
def recommender(built):
    return built.recommender.eval()


@pytest.fixture
def prompts(built, talks):
    return [built.encoder.encode(request) for request in talks.train[:5]]


def test_the_loss_is_that_of_transformers_on_the_same_embeddings(recommender, prompts):
    """The reference: the whole model with labels, whose loss is a mean over the label tokens."""
    batch = collate_training(prompts[:1], PAD)
    with torch.no_grad():
        loss = recommender.model.get_base_model()(
            inputs_embeds=recommender.embed(batch),
            attention_mask=batch["mask"],
            labels=batch["labels"],
        ).loss
        ours = recommender(batch)
    assert float(ours) == pytest.approx(float(loss) * label_tokens(batch), rel=1e-5)


def test_pictures_stand_where_their_tokens_are(built, recommender):
    pictured = nano().items[4].id
    prompt = built.encoder.encode(Request("c", (pictured,), pictured))
    batch = collate_training([prompt], PAD)
    vectors, (count,) = built.vectors.of([pictured])
    embeds = recommender.embed(batch)[0]
    first = prompt.ids.index(built.processor.tokenizer.convert_tokens_to_ids(ITEM_TOKENS[0]))
    assert torch.equal(embeds[first : first + count], vectors)
    table = recommender.model.get_input_embeddings().weight
    others = [n for n in range(len(prompt.ids)) if not first <= n < first + count]
    assert torch.equal(embeds[others], table[torch.tensor(prompt.ids)[others]])


def test_a_batch_is_the_sum_of_its_members(recommender, prompts):
    """Loss and gradients; so neither padding nor neighbours matter."""
    exact = copy.deepcopy(recommender).double()
    trained = list(adapter_parameters(exact.model).values())
    alone = [collate_training([prompt], PAD) for prompt in prompts]
    whole = exact(collate_training(prompts, PAD))
    parts = torch.stack([exact(batch) for batch in alone]).sum()
    assert whole.item() == pytest.approx(parts.item(), rel=1e-6)  # summed in float32
    together, apart = (torch.autograd.grad(loss, trained) for loss in (whole, parts))
    for one, other in zip(together, apart, strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm()
    batches = [collate_training(some, PAD) for some in (prompts[:2], prompts[2:])]
    mean = parts.item() / sum(map(label_tokens, alone))  # every token counts once
    found = evaluation.validation_loss(recommender, batches, World())
    assert found == pytest.approx(mean, rel=1e-5)


def greedy_by_transformers(recommender, prompt, steps):
    """The reference: transformers' own generate on one prompt's embeddings."""
    batch = collate_generation([prompt], PAD)
    made = recommender.model.get_base_model().generate(
        inputs_embeds=recommender.embed(batch),
        attention_mask=batch["mask"],
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=2,
    )
    return [token for token in made[0].tolist() if token not in (2, PAD)]


def test_answers_of_a_batch_are_those_of_transformers_one_by_one(built, talks, recommender):
    requests = [
        Request("<comment>x</comment>\n" * (3 * number), request.candidates[: number + 1])
        for number, request in enumerate(talks.asked[:4])
    ]
    prompts = [built.encoder.encode(request) for request in requests]
    assert len({len(prompt.ids) for prompt in prompts}) == 4
    together = recommender.answers(collate_generation(prompts, PAD), 8, 2)
    expected = [greedy_by_transformers(recommender, prompt, 8) for prompt in prompts]
    assert together == expected
    assert len({tuple(said) for said in together}) > 1  # or the test would show little


def test_an_answer_ends_where_the_model_ends_it(recommender, prompts):
    """With the end of the text made the likeliest second token, one token is the answer."""
    batch = collate_generation(prompts[:1], PAD)
    three = recommender.answers(batch, 3, 2)[0]
    assert recommender.answers(batch, 5, three[0]) == [[]]
    assert recommender.answers(batch, 3, three[2])[0] == three[: three.index(three[2])]


def test_the_ranks_answers_come_in_the_conversations_order(built, talks, monkeypatch):
    """Rank r of two has every second conversation, from its own number on."""
    monkeypatch.setattr(evaluation.distributed, "gather_objects", lambda *_: [["a", "c"], ["b"]])
    tokenizer = built.processor.tokenizer
    found = evaluation.answer(built.recommender, talks.test[:3], [], tokenizer, World())
    assert found.responses == ["a", "b", "c"]
