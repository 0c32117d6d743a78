"""Stage 1's samples and loss: labels by hand, the value against transformers' own, and equalities.

Each shortcut (prompts' start kept, logits for labels alone) is compared with the plain way; batches
with their samples one by one; padding on the left with padding on the right.
"""

import copy
import io

import pytest
import torch
from PIL import Image
from torch import nn

from lavic.src.catalogue import Sample, read_samples
from lavic.src.vision import caption_loss
from lavic.src.vision import captions as reading
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
from lavic.src.vision.model import (
    ITEM_TOKENS,
    VISION_TARGETS,
    add_item_tokens,
    checkpoint_activations,
    core_of,
    load_base,
)
from tests.lavic_nano import build_nano

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def loaded(paths):
    """(a model whose adapter is not zero, dropout off; its processor; the item tokens' ids)."""
    base, processor = load_base(paths.weights, CPU, torch.float32)
    ids = add_item_tokens(base, processor.tokenizer)
    model = add_adapter(base, VISION_TARGETS)
    torch.manual_seed(0)
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.05)
    return model.eval(), processor, ids


@pytest.fixture(scope="module")
def samples(paths):
    """Pictures of 5, 3 and 4 views with texts of different lengths."""
    found = read_samples(paths.train_data, paths.train_images).usable
    words = ["", " It is nice.", " It is nice and a sign for a desk.", ""]
    titles = ["Modern Desk Tag", "桌牌", "Compact Wall Sign with a longer title than most", "x"]
    chosen = [found[index] for index in (0, 2, 6, 10)]
    return [
        Sample(title, sample.image_path, sample.description + more)
        for sample, title, more in zip(chosen, titles, words, strict=True)
    ]


def exercises(loaded, samples, slots="fixed5", max_length=2048):
    data = Captions(samples, loaded[1], slots, max_length)
    return [data[index] for index in range(len(data))]


def batches(loaded, rows, size):
    tokenizer = loaded[1].tokenizer
    return Collate(size, tokenizer.pad_token_id, fixed_tokens(tokenizer))(rows).batches


def loss_and_gradients(loaded, several, start=None):
    model, _, ids = loaded
    trained = list(adapter_parameters(model).values())
    total = torch.stack([caption_nll(model, batch, ids, start) for batch in several]).sum()
    return total.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(total, trained)])


def assert_equal(one, other, rel=1e-5):
    assert one[0].item() == pytest.approx(other[0].item(), rel=max(rel, 1e-6))  # summed in float32
    assert (one[1] - other[1]).norm() <= rel * other[1].norm()
    assert other[1].norm() > 0


# --- what a sample becomes ----------------------------------------------------------


def test_the_prompt_is_the_originals_with_as_many_item_tokens_as_asked():
    text = prompt("Desk Tag", 3)
    assert text.startswith("You are a helpful assistant.\nGiven an Amazon product's title")
    assert text.endswith(
        "This product's title is: Desk Tag\n<ItemImageEmb1><ItemImageEmb2><ItemImageEmb3>"
        "\n\nAssistant:"
    )


def test_what_is_to_be_said_is_the_description_and_nothing_else(loaded, samples):
    tokenizer = loaded[1].tokenizer
    for sample, row in zip(samples, exercises(loaded, samples), strict=True):
        assert isinstance(row, Exercise)
        asked = tokenizer(prompt(sample.title, 5))["input_ids"]
        assert row.tokens[: row.answer].tolist() == asked
        assert tokenizer.decode(row.tokens[row.answer :]) == sample.description
        assert row.tokens[row.head] == loaded[2][0] and row.tokens[-1] != tokenizer.eos_token_id


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
    assert batch.num_views.tolist() == [len(row.views) for row in rows]


def test_slots_are_five_or_as_many_as_views(loaded, samples):
    items = torch.tensor(loaded[2])
    for slots in ("fixed5", "views"):
        for row in exercises(loaded, samples, slots):
            count = int(torch.isin(row.tokens, items).sum())
            assert count == (5 if slots == "fixed5" else len(row.views))


def test_a_long_description_is_cut_and_a_long_prompt_left_out(loaded, samples):
    whole = exercises(loaded, samples[:1])[0]
    cut = exercises(loaded, samples[:1], max_length=whole.answer + 2)[0]
    assert torch.equal(cut.tokens, whole.tokens[: whole.answer + 2])
    (left,) = exercises(loaded, samples[:1], max_length=whole.answer)
    assert isinstance(left, LeftOut)
    assert (
        left.reason
        == f"the prompt alone has {whole.answer} of the --max_length {whole.answer} tokens"
    )


def test_item_tokens_written_into_a_title_or_description_do_nothing(loaded, samples):
    sly = Sample(f"Tag {ITEM_TOKENS[0]}", samples[0].image_path, f"A{ITEM_TOKENS[2]} sign.")
    (row,) = exercises(loaded, [sly])
    assert int(torch.isin(row.tokens, torch.tensor(loaded[2])).sum()) == 5
    assert loaded[1].tokenizer.decode(row.tokens[row.answer :]) == "A sign."


def test_a_title_that_joins_the_prompts_last_token_is_noticed(loaded, samples):
    fixed = fixed_tokens(loaded[1].tokenizer)
    whole = loaded[1].tokenizer(prompt("Modern", 5))["input_ids"]
    assert whole[: len(fixed)] == fixed and len(fixed) > 60
    rows = exercises(loaded, samples[:2])
    odd = rows[0]._replace(tokens=torch.cat([rows[0].tokens[:1], rows[0].tokens[2:]]))
    assert batches(loaded, rows, 2)[0].has_fixed
    assert not batches(loaded, [odd, rows[1]], 2)[0].has_fixed


def bad_pictures(folder):
    """File names and what is wrong with them."""
    whole = io.BytesIO()
    Image.new("RGB", (60, 60), "red").save(whole, "JPEG")
    bomb = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(bomb, "PNG")
    contents = {
        "cut.jpg": whole.getvalue()[:200],
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html>404</html>",
        "bomb.png": bomb.getvalue(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [*contents, "missing.jpg"]


def test_fault_26_27_pictures_that_are_none_are_left_out_with_their_reason(
    loaded, samples, tmp_path
):
    names = bad_pictures(tmp_path)
    bad = [Sample("t", tmp_path / name, "A sign.") for name in names]
    rows = exercises(loaded, [samples[0], *bad, samples[1]])
    step = Collate(2, loaded[1].tokenizer.pad_token_id, [])(rows)
    assert [left.name for left in step.left_out] == [str(tmp_path / name) for name in names]
    assert all(left.reason for left in step.left_out)
    assert len(step.batches) == 1 and step.batches[0].num_views.tolist() == [5, 3]
    nothing = Collate(2, 0, [])([row for row in rows if isinstance(row, LeftOut)])
    assert nothing.batches == [] and nothing.num_labels == 0


def test_fault_28_pictures_in_unusual_modes_and_of_one_pixel_are_read(loaded, tmp_path):
    made = {"CMYK": "a.jpg", "LA": "b.png", "P": "c.png", "I;16": "d.png", "RGBA": "e.png"}
    for mode, name in made.items():
        Image.new(mode, (60, 60)).save(tmp_path / name)
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    bad = [Sample("t", tmp_path / name, "A sign.") for name in [*made.values(), "one.png"]]
    rows = exercises(loaded, bad)
    assert all(isinstance(row, Exercise) for row in rows)
    assert [row.views.shape[1:] for row in rows] == [(3, 48, 48)] * 6


# --- the loss ---------------------------------------------------------------------


def test_the_loss_is_transformers_own(loaded, samples):
    model, _, ids = loaded
    for row in exercises(loaded, samples):
        (batch,) = batches(loaded, [row], 1)
        with torch.no_grad():
            ours = caption_nll(model, batch, ids, None)
            theirs = model.get_base_model()(
                inputs_embeds=embed(model, batch, ids),
                attention_mask=batch.mask,
                labels=batch.labels,
            ).loss
        assert ours.item() == pytest.approx(theirs.item() * batch.num_labels, rel=1e-5)


def test_unfilled_slots_keep_their_own_embedding_and_filled_ones_the_views(loaded, samples):
    model, _, ids = loaded
    (row,) = exercises(loaded, samples[1:2])
    assert len(row.views) == 3
    (batch,) = batches(loaded, [row], 1)
    table = core_of(model).language_model.embed_tokens.weight
    with torch.no_grad():
        found = embed(model, batch, ids)[0, row.head : row.head + 5]
        core = core_of(model)
        cls = core.vision_tower(row.views).last_hidden_state[:, 0]
        torch.testing.assert_close(found[:3], core.multi_modal_projector(cls))
    assert torch.equal(found[3:], table[ids[3:]])


def test_four_samples_together_are_the_sum_of_the_four(loaded, samples):
    rows = [row._replace(views=row.views.double()) for row in exercises(loaded, samples)]
    exact = (copy.deepcopy(loaded[0]).double(), *loaded[1:])
    together, *parts = (loss_and_gradients(exact, batches(exact, rows, n)) for n in (4, 3, 2, 1))
    for part in parts:
        assert_equal(part, together, rel=1e-10)


def test_a_samples_loss_does_not_depend_on_its_neighbours(loaded, samples):
    rows = exercises(loaded, samples)
    model, _, ids = loaded
    for neighbours in (rows[1:2], rows[2:4], rows[1:4]):
        (batch,) = batches(loaded, [rows[0], *neighbours], 4)
        labels = batch.labels.clone()
        labels[1:] = NO_LABEL
        (alone,) = batches(loaded, [rows[0]], 1)
        with torch.no_grad():
            beside = caption_nll(model, batch._replace(labels=labels), ids, None)
            expected = caption_nll(model, alone, ids, None)
        assert beside.item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_on_the_left_would_change_nothing(loaded, samples):
    model, _, ids = loaded
    (batch,) = batches(loaded, exercises(loaded, samples), 4)
    lengths = batch.mask.sum(1).tolist()
    longest = batch.tokens.shape[1]
    left = batch._replace(
        **{
            name: torch.stack(
                [row.roll(longest - n) for row, n in zip(part, lengths, strict=True)]
            )
            for name, part in (
                ("tokens", batch.tokens), ("mask", batch.mask), ("labels", batch.labels),
            )
        }
    )  # fmt: skip
    positions = (left.mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        hidden = (
            core_of(model)
            .language_model(
                inputs_embeds=embed(model, left, ids),
                attention_mask=left.mask,
                position_ids=positions,
                use_cache=False,
            )
            .last_hidden_state
        )
        logits = model.get_base_model().lm_head(hidden)[:, :-1].flatten(0, 1)
        theirs = nn.functional.cross_entropy(logits, left.labels[:, 1:].flatten(), reduction="sum")
        ours = caption_nll(model, batch, ids, None)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("worth_a_pass", [1, 48])
def test_the_prompts_kept_start_changes_neither_loss_nor_gradients(
    loaded, samples, size, worth_a_pass, monkeypatch
):
    monkeypatch.setattr(caption_loss, "_WORTH_A_PASS", worth_a_pass)
    model, processor, _ = loaded
    start = FixedStart(model, fixed_tokens(processor.tokenizer))
    several = batches(loaded, exercises(loaded, samples), size)
    plain = loss_and_gradients(loaded, several)
    assert_equal(loss_and_gradients(loaded, several, start), plain)
    assert_equal(loss_and_gradients(loaded, several, start), plain)  # it is not used up


def test_a_prompt_that_begins_otherwise_is_run_as_a_whole(loaded, samples):
    model, processor, _ = loaded
    start = FixedStart(model, fixed_tokens(processor.tokenizer))
    rows = exercises(loaded, samples[:2])
    odd = [rows[0]._replace(tokens=torch.cat([rows[0].tokens[:1], rows[0].tokens[2:]]),
                            head=rows[0].head - 1, answer=rows[0].answer - 1), rows[1]]  # fmt: skip
    several = batches(loaded, odd, 2)
    assert_equal(loss_and_gradients(loaded, several, start), loss_and_gradients(loaded, several))


def test_logits_for_the_labels_alone_are_those_of_every_place(loaded, samples):
    model, _, ids = loaded
    (batch,) = batches(loaded, exercises(loaded, samples), 4)
    hidden = (
        core_of(model)
        .language_model(
            inputs_embeds=embed(model, batch, ids), attention_mask=batch.mask, use_cache=False
        )
        .last_hidden_state
    )
    logits = model.get_base_model().lm_head(hidden)[:, :-1].flatten(0, 1)
    every = nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum")
    trained = list(adapter_parameters(model).values())
    gradients = torch.cat([g.flatten() for g in torch.autograd.grad(every, trained)])
    assert_equal(loss_and_gradients(loaded, [batch]), (every.detach(), gradients), rel=2e-6)


def test_a_language_model_that_learns_or_slides_is_no_ground_for_a_kept_start(loaded):
    model, processor, _ = loaded
    language = core_of(model).language_model
    assert why_not_reusable(language) is None
    language.train()
    with pytest.raises(ValueError, match="not frozen and in eval"):
        FixedStart(model, fixed_tokens(processor.tokenizer))
    language.eval()
    language.norm.weight.requires_grad_(True)
    assert "not frozen" in (why_not_reusable(language) or "")
    language.norm.weight.requires_grad_(False)
    language.config.sliding_window = 128
    assert "sliding window" in (why_not_reusable(language) or "")
    language.config.sliding_window = None
    before = language.config.rope_parameters
    language.config.rope_parameters = {"rope_type": "dynamic"}
    assert "dynamic rotations" in (why_not_reusable(language) or "")
    language.config.rope_parameters = before


def test_a_tower_that_keeps_no_activations_has_the_same_gradients(paths, samples):
    results = []
    for keeps_none in (False, True):
        base, processor = load_base(paths.weights, CPU, torch.float32)
        ids = add_item_tokens(base, processor.tokenizer)
        torch.manual_seed(0)
        model = add_adapter(base, VISION_TARGETS, dropout=0.1)
        for parameter in adapter_parameters(model).values():
            nn.init.normal_(parameter, std=0.05)
        if keeps_none:
            checkpoint_activations(core_of(model).vision_tower)
        core_of(model).vision_tower.train()
        here = (model, processor, ids)
        torch.manual_seed(1)  # of the dropout
        results.append(loss_and_gradients(here, batches(here, exercises(here, samples), 4)))
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all("vision_tower" in name or "multi_modal_projector" in name for name in names)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    tower = results[1][1][: results[1][1].numel() // 2]
    assert (tower != 0).any()


def test_a_sample_is_read_anew_each_time(loaded, samples, monkeypatch):
    """It is a function of its files alone: nothing of an earlier reading is left."""
    twice = [exercises(loaded, [samples[0]])[0] for _ in range(2)]
    assert torch.equal(twice[0].views, twice[1].views)
    monkeypatch.setattr(reading, "read_rgb", lambda _: (_ for _ in ()).throw(ValueError("gone")))
    (left,) = exercises(loaded, samples[:1])
    assert left == LeftOut(str(samples[0].image_path), "gone")
