"""Stage 1's samples and loss: labels by hand, the value against transformers' own, equalities."""

import io

import pytest
import torch
from PIL import Image

from lavic.src.catalogue import Sample
from lavic.src.vision import caption_loss
from lavic.src.vision.adapters import adapter_parameters, add_adapter
from lavic.src.vision.caption_loss import FixedStart, caption_nll, embed, why_not_reusable
from lavic.src.vision.captions import (
    NO_LABEL,
    Captions,
    Collate,
    Exercise,
    LeftOut,
    fixed_tokens,
    prompt,
)
from lavic.src.vision.model import ITEM_TOKENS, VISION_TARGETS, core_of
from tests.lavic_talks import load, nano, shake


@pytest.fixture(scope="module")
def loaded():
    """(a model whose adapter is not zero, dropout off; its processor; the item tokens' ids)."""
    base, processor, ids = load(nano())
    model = add_adapter(base, VISION_TARGETS)
    shake(model, 0)
    return model.eval(), processor, ids


@pytest.fixture(scope="module")
def samples():
    """Pictures of 5, 3, 4 and 5 views with texts of different lengths."""
    words = ["", " It is nice.", " It is nice and a sign for a desk.", ""]
    titles = ["Modern Desk Tag", "桌牌", "Compact Wall Sign with a longer title than most", "x"]
    items = [nano().items[index] for index in (2, 3, 5, 7)]
    return [
        Sample(title, nano().images / f"{item.id}_0.jpg", item.look.description + more)
        for item, title, more in zip(items, titles, words, strict=True)
    ]


def exercises(loaded, samples, slots="fixed5", max_length=2048):
    data = Captions(samples, loaded[1], slots, max_length)
    return [data[index] for index in range(len(data))]


def batches(loaded, rows, size):
    tokenizer = loaded[1].tokenizer
    return Collate(size, tokenizer.pad_token_id, fixed_tokens(tokenizer))(rows).batches


def loss_and_gradients(loaded, several, start=None):
    model, _, ids = loaded
    return with_gradients(model, sum(caption_nll(model, batch, ids, start) for batch in several))


def with_gradients(model, total):
    trained = list(adapter_parameters(model).values())
    gradients = torch.autograd.grad(total, trained)
    return total.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def assert_equal(one, other):
    assert one[0].item() == pytest.approx(other[0].item(), rel=1e-5)
    assert (one[1] - other[1]).norm() <= 1e-5 * other[1].norm()
    assert other[1].norm() > 0


# --- what a sample becomes ------------------------------------------------------------------------


def test_a_sample_becomes_the_originals_prompt_and_its_description(loaded, samples):
    text = prompt("Desk Tag", 3)
    assert text.startswith("You are a helpful assistant.\nGiven an Amazon product's title")
    assert text.endswith(
        "This product's title is: Desk Tag\n<ItemImageEmb1><ItemImageEmb2><ItemImageEmb3>"
        "\n\nAssistant:"
    )
    tokenizer = loaded[1].tokenizer
    for sample, row in zip(samples, exercises(loaded, samples), strict=True):
        asked = tokenizer(prompt(sample.title, 5))["input_ids"]
        assert row.tokens[: row.answer].tolist() == asked
        assert tokenizer.decode(row.tokens[row.answer :]) == sample.description
        assert row.tokens[row.head] == loaded[2][0] and row.tokens[-1] != tokenizer.eos_token_id
    items = torch.tensor(loaded[2])
    for row in exercises(loaded, samples, "views"):
        assert int(torch.isin(row.tokens, items).sum()) == len(row.views)


def test_labels_are_those_of_the_true_lengths_in_a_batch_of_different_ones(loaded, samples):
    rows = exercises(loaded, samples)
    (batch,) = batches(loaded, rows, 4)
    lengths = [len(row.tokens) for row in rows]
    assert len(set(lengths)) > 2
    for number, row in enumerate(rows):
        labels = batch.labels[number]
        places = (labels != NO_LABEL).nonzero().flatten().tolist()
        assert places == list(range(row.answer, lengths[number]))
        assert labels[places].tolist() == row.tokens[row.answer :].tolist()
        assert batch.mask[number].sum() == lengths[number]
    assert batch.num_labels == sum(len(row.tokens) - row.answer for row in rows)
    assert batch.num_views.tolist() == [len(row.views) for row in rows] == [5, 3, 4, 5]


def test_a_long_description_is_cut_and_a_long_prompt_left_out(loaded, samples):
    whole = exercises(loaded, samples[:1])[0]
    cut = exercises(loaded, samples[:1], max_length=whole.answer + 2)[0]
    assert torch.equal(cut.tokens, whole.tokens[: whole.answer + 2])
    (left,) = exercises(loaded, samples[:1], max_length=whole.answer)
    alone = f"the prompt alone has {whole.answer} of the --max_length {whole.answer} tokens"
    assert isinstance(left, LeftOut) and left.reason == alone


def test_item_tokens_written_into_a_title_or_description_do_nothing(loaded, samples):
    sly = Sample(f"Tag {ITEM_TOKENS[0]}", samples[0].image_path, f"A{ITEM_TOKENS[2]} sign.")
    (row,) = exercises(loaded, [sly])
    assert int(torch.isin(row.tokens, torch.tensor(loaded[2])).sum()) == 5
    assert loaded[1].tokenizer.decode(row.tokens[row.answer :]) == "A sign."


def test_fault_26_27_pictures_that_are_none_are_left_out_with_their_reason(
    loaded, samples, tmp_path
):
    bomb = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(bomb, "PNG")
    contents = {"cut.jpg": samples[0].image_path.read_bytes()[:200], "bomb.png": bomb.getvalue()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    Image.new("CMYK", (1, 1)).save(tmp_path / "one.jpg")  # unusual, but a picture
    names = [*contents, "missing.jpg", "one.jpg"]
    more = [Sample("t", tmp_path / name, "A sign.") for name in names]
    rows = exercises(loaded, [samples[0], *more, samples[1]])
    step = Collate(3, loaded[1].tokenizer.pad_token_id, [])(rows)
    assert [left.name for left in step.left_out] == [str(tmp_path / name) for name in names[:3]]
    assert all(left.reason for left in step.left_out)
    assert len(step.batches) == 1 and step.num_used == 3
    nothing = Collate(2, 0, [])([row for row in rows if isinstance(row, LeftOut)])
    assert nothing.batches == [] and nothing.num_labels == 0


# --- the loss -------------------------------------------------------------------------------------


def by_transformers(loaded, batch):
    """The whole model's own loss, a mean over the labels, of logits at every place."""
    model, _, ids = loaded
    embeds = embed(model, batch, ids)
    whole = model.get_base_model()(
        inputs_embeds=embeds, attention_mask=batch.mask, labels=batch.labels
    )
    return whole.loss * batch.num_labels


def test_loss_and_gradients_are_transformers_own_whoever_shares_the_batch(loaded, samples):
    model, _, ids = loaded
    rows = exercises(loaded, samples)
    (batch,) = batches(loaded, rows, 4)
    theirs = with_gradients(model, by_transformers(loaded, batch))
    assert_equal(loss_and_gradients(loaded, [batch]), theirs)
    for number, row in enumerate(rows):
        (alone,) = batches(loaded, [row], 1)
        labels = torch.full_like(batch.labels, NO_LABEL)
        labels[number] = batch.labels[number]
        with torch.no_grad():
            beside = caption_nll(model, batch._replace(labels=labels), ids, None)
            assert beside.item() == pytest.approx(by_transformers(loaded, alone).item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("worth_a_pass", [1, 48])
def test_the_prompts_kept_start_changes_neither_loss_nor_gradients(
    loaded, samples, size, worth_a_pass, monkeypatch
):
    monkeypatch.setattr(caption_loss, "_WORTH_A_PASS", worth_a_pass)
    start = FixedStart(loaded[0], fixed_tokens(loaded[1].tokenizer))
    several = batches(loaded, exercises(loaded, samples), size)
    plain = loss_and_gradients(loaded, several)
    assert_equal(loss_and_gradients(loaded, several, start), plain)
    assert_equal(loss_and_gradients(loaded, several, start), plain)  # it is not used up


def test_a_prompt_that_begins_otherwise_is_noticed_and_run_as_a_whole(loaded, samples):
    """As where a tokenizer joins the title's first characters with the prompt's last ones."""
    fixed = fixed_tokens(loaded[1].tokenizer)
    whole = loaded[1].tokenizer(prompt("Modern", 5))["input_ids"]
    assert whole[: len(fixed)] == fixed and len(fixed) > 60
    first, second = exercises(loaded, samples[:2])
    assert batches(loaded, [first, second], 2)[0].has_fixed
    without_one = torch.cat([first.tokens[:1], first.tokens[2:]])
    odd = Exercise(without_one, first.head - 1, first.answer - 1, first.views)
    several = batches(loaded, [odd, second], 2)
    assert not several[0].has_fixed
    found = loss_and_gradients(loaded, several, FixedStart(loaded[0], fixed))
    assert_equal(found, loss_and_gradients(loaded, several))


def test_a_language_model_that_learns_or_slides_is_no_ground_for_a_kept_start(loaded, monkeypatch):
    language = core_of(loaded[0]).language_model
    assert why_not_reusable(language) is None
    for where, name, value, reason in (
        (language, "training", True, "not frozen and in eval"),
        (language.norm.weight, "requires_grad", True, "not frozen and in eval"),
        (language.config, "sliding_window", 128, "sliding window"),
        (language.config, "rope_parameters", {"rope_type": "dynamic"}, "dynamic rotations"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            with pytest.raises(ValueError, match=reason):
                FixedStart(loaded[0], fixed_tokens(loaded[1].tokenizer))
