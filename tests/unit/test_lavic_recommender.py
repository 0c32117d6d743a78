"""The recommender against plain transformers, and against itself in other batches."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from lavic.src.recommend import item_vectors
from lavic.src.recommend.data import Request, as_asked, read_conversations, with_answers
from lavic.src.recommend.evaluation import answer, validation_loss
from lavic.src.recommend.item_vectors import Tower
from lavic.src.recommend.model import (
    LANGUAGE_TARGETS,
    Recommender,
    drop_tower,
)
from lavic.src.recommend.prompts import (
    IGNORED,
    PromptEncoder,
    collate_generation,
    collate_training,
    label_tokens,
)
from lavic.src.vision.adapters import adapter_parameters, add_adapter, load_adapter
from lavic.src.vision.model import checkpoint_activations
from shared.distributed import World
from tests.lavic_talks import load, nano, shake

PAD = 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A recommender with random adapter weights, and its encoder and processor."""
    model, processor, item_ids = load(nano())
    tower = Tower(load_adapter(model, nano().adapter), processor)
    items = [item.id for item in nano().items]
    cache = tmp_path_factory.mktemp("cache")
    vectors = item_vectors.prepare(items, nano().images, tower, cache, World(), workers=0)
    plain = tower.model.unload()
    drop_tower(plain)
    recommender = Recommender(add_adapter(plain, LANGUAGE_TARGETS), item_ids, vectors)
    shake(recommender.model, 3)
    titles = {item.id: item.title for item in nano().items}
    encoder = PromptEncoder(processor.tokenizer, titles, vectors.views, max_length=900)
    return recommender.eval(), encoder, processor


@pytest.fixture
def recommender(parts):
    return parts[0].eval()


@pytest.fixture
def prompts(parts):
    talks = read_conversations(nano().talks("train"), "candidates_st")
    return [parts[1].encode(request) for request in with_answers(talks, 0)[:5]]


def gradients(recommender):
    found = {n: p.grad.clone() for n, p in adapter_parameters(recommender.model).items()}
    recommender.zero_grad()
    return found


def assert_equal_gradients(one, other, relative=1e-4):
    for name, gradient in one.items():
        error = (gradient - other[name]).norm() / gradient.norm().clamp(min=1e-8)
        assert error < relative, (name, float(error))


def test_the_loss_is_that_of_transformers_on_the_same_embeddings(recommender, prompts):
    """The reference: the whole model with labels, whose loss is a mean over the label tokens."""
    batch = collate_training(prompts[:1], PAD)
    reference = recommender.model.get_base_model()
    with torch.no_grad():
        expected = reference.model.language_model(
            inputs_embeds=recommender.embed(batch), attention_mask=batch["mask"]
        ).last_hidden_state
        logits = reference.lm_head(expected).float()
        loss = reference.loss_function(
            logits, batch["labels"], vocab_size=logits.shape[-1], ignore_index=IGNORED
        )
        ours = recommender(batch)
    assert float(ours) == pytest.approx(float(loss) * label_tokens(batch), rel=1e-5)


def test_pictures_stand_where_their_tokens_are(parts, recommender):
    pictured = nano().items[4].id
    prompt = parts[1].encode(Request("c", (pictured,), pictured))
    batch = collate_training([prompt], PAD)
    vectors, (count,) = recommender._vectors.of([pictured])
    embeds = recommender.embed(batch)[0]
    first = prompt.ids.index(recommender._item_ids[0])
    assert torch.equal(embeds[first : first + count], vectors)
    table = recommender.model.get_input_embeddings().weight
    others = [n for n in range(len(prompt.ids)) if not first <= n < first + count]
    assert torch.equal(embeds[others], table[torch.tensor(prompt.ids)[others]])


def test_a_batch_is_the_sum_of_its_members(recommender, prompts):
    """Loss and gradients; so neither padding nor neighbours matter."""
    exact = copy.deepcopy(recommender).double()
    whole = exact(collate_training(prompts, PAD))
    whole.backward()
    together = gradients(exact)
    singles = [exact(collate_training([prompt], PAD)) for prompt in prompts]
    sum(singles).backward()  # type: ignore[union-attr]
    assert float(whole) == pytest.approx(sum(map(float, singles)), rel=1e-6)  # summed in float32
    assert_equal_gradients(together, gradients(exact), 1e-10)


def test_activations_computed_again_give_the_same_gradients(parts, prompts):
    recommender = parts[0]
    batch = collate_training(prompts[:2], PAD)
    recommender.train()
    torch.manual_seed(0)
    recommender(batch).backward()
    plain = gradients(recommender)
    language = recommender.model.get_base_model().model.language_model
    checkpoint_activations(language)
    torch.manual_seed(0)
    recommender(batch).backward()
    language.gradient_checkpointing_disable()
    assert_equal_gradients(plain, gradients(recommender), 1e-6)


def test_only_the_language_model_learns(recommender, prompts):
    recommender(collate_training(prompts[:1], PAD)).backward()
    trained = {n for n, p in recommender.named_parameters() if p.grad is not None}
    assert trained and all(
        ".language_model.layers." in name and "lora_" in name for name in trained
    )
    assert len(trained) == 2 * 7 * 2  # A and B on seven Linears of two layers
    recommender.zero_grad()


def test_the_real_models_adapter_is_that_of_the_published_recipe():
    """7 Linears of 32 layers at rank 8, counted on a model without weights."""
    config = LlavaNextConfig(
        text_config=AutoConfig.for_model(
            "mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, vocab_size=32064, head_dim=128,
        )
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
        wrapped = add_adapter(model, LANGUAGE_TARGETS)
    parameters = adapter_parameters(wrapped)
    assert len(parameters) == 2 * 7 * 32
    assert sum(p.numel() for p in parameters.values()) == 20_971_520


def greedy_by_transformers(recommender, prompt, steps):
    """The reference: transformers' own generate on one prompt's embeddings."""
    base = recommender.model.get_base_model()
    batch = collate_generation([prompt], PAD)
    made = base.generate(
        inputs_embeds=recommender.embed(batch),
        attention_mask=batch["mask"],
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=2,
    )
    return [token for token in made[0].tolist() if token not in (2, PAD)]


def test_answers_of_a_batch_are_those_of_transformers_one_by_one(parts, recommender):
    talks = read_conversations(nano().talks("test"), "candidates_gpt_large")
    requests = [
        Request("<comment>x</comment>\n" * (3 * number), request.candidates[: number + 1])
        for number, request in enumerate(as_asked(talks)[:4])
    ]
    prompts = [parts[1].encode(request) for request in requests]
    assert len({len(prompt.ids) for prompt in prompts}) == 4
    together = recommender.answers(collate_generation(prompts, PAD), 8, 2)
    expected = [greedy_by_transformers(recommender, prompt, 8) for prompt in prompts]
    assert together == expected
    assert len({tuple(said) for said in together}) > 1  # or the test would show little


def test_an_answer_ends_where_the_model_ends_it(parts, recommender, prompts):
    """With the end of the text made the likeliest second token, one token is the answer."""
    prompt = prompts[0]
    first = recommender.answers(collate_generation([prompt], PAD), 1, 2)[0]
    batch = collate_generation([prompt], PAD)
    assert recommender.answers(batch, 5, first[0]) == [[]]
    three = recommender.answers(batch, 3, 2)[0]
    cut = recommender.answers(batch, 3, three[2])[0]
    assert cut == three[: three.index(three[2])]


def test_the_validation_loss_counts_every_token_once(parts, recommender, prompts):
    batches = [collate_training(prompts[:2], PAD), collate_training(prompts[2:], PAD)]
    loss = validation_loss(recommender, batches, World())
    with torch.no_grad():
        singles = [(recommender(b), label_tokens(b)) for b in
                   (collate_training([prompt], PAD) for prompt in prompts)]  # fmt: skip
    expected = float(sum(s for s, _ in singles)) / sum(n for _, n in singles)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(loss) and loss > 0


def test_every_conversation_gets_its_own_answer_in_order(parts, recommender):
    _, encoder, processor = parts
    talks = read_conversations(nano().talks("test"), "candidates_gpt_large")
    prompts = [encoder.encode(request) for request in as_asked(talks)]

    def in_batches(size):
        starts = range(0, len(prompts), size)
        return iter([collate_generation(prompts[s : s + size], PAD) for s in starts])

    outcomes = [
        answer(recommender, talks, in_batches(size), processor.tokenizer, World())
        for size in (1, 3)
    ]
    assert outcomes[0].responses == outcomes[1].responses and len(talks) == 7
