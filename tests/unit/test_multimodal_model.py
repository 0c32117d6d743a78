"""The model of multimodal/: sizes, its contract, and equal numbers by every way of computing."""

import itertools
import math

import pytest
import torch
from torch import nn

from multimodal import model as models
from multimodal.model import MODALITIES, create_model

INPUTS = {"image": ("images",), "text": ("input_ids", "attention_mask"), "audio": ("audio",)}
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(MODALITIES, n)]


def batch(size: int = 2, frames: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of the nano model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 49000, (size, 12), generator=generator)
    ids[:, 7], ids[:, 8:] = 49407, 0
    return {
        "images": torch.randn(size, 3, 64, 64, generator=generator),
        "input_ids": ids,
        "attention_mask": (torch.arange(12) <= 7).expand(size, 12),
        "audio": torch.randn(size, frames, 80, generator=generator),
    }


def nano(**options) -> models.MultimodalModel:
    torch.manual_seed(0)
    return create_model("nano", **options)


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 15), ("small", 35), ("base", 80), ("large", 200)]
)
def test_sizes_have_the_documented_numbers_of_parameters(size, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in create_model(size).parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.05)


def test_any_choice_of_modalities_gives_features_of_unit_norm_and_logits():
    model, inputs = nano(num_classes=7).eval(), batch()
    for subset in SUBSETS:
        outputs = model(**{name: inputs[name] for one in subset for name in INPUTS[one]})
        assert set(outputs) == {"fused_features", "logits", *(f"{one}_features" for one in subset)}
        assert outputs["fused_features"].shape == (2, 512)
        assert outputs["logits"].shape == (2, 7)
        for one in subset:
            features = outputs[f"{one}_features"]
            assert features.shape == (2, 512)
            assert features.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_a_size_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="size is 'huge', allowed: nano, tiny, small, base, large"):
        create_model("huge")


IDS = torch.tensor([[49406, 320, 49407]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "at least one of images, input_ids and audio"),
        ({"images": torch.zeros(1, 3, 32, 32)}, r"\(1, 3, 32, 32\), expected \(B, \*\(3, 64, 64\)"),
        ({"input_ids": torch.zeros(1, 78, dtype=torch.long)}, "78 tokens, at most 77"),
        ({"audio": torch.zeros(1, 40, 64)}, r"\(1, 40, 64\), expected \(B, T, 80\)"),
        (
            {"images": torch.zeros(2, 3, 64, 64), "audio": torch.zeros(3, 40, 80)},
            "same number of samples, got images 2, audio 3",
        ),
        ({"input_ids": IDS + 1}, "run from 321 to 49408, the vocabulary from 0 to 49407"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(1, 4)},
            r"attention_mask is \(1, 4\), expected \(1, 3\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        nano()(**inputs)


def test_a_block_computes_what_torchs_own_layer_computes():
    options = models.BlockOptions()
    torch.manual_seed(0)
    ours = models.Block(models.Shape(32, 4, 1), options)
    theirs = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    state = ours.state_dict()
    parts = {"attn": "self_attn", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2",
             "ln_1": "norm1", "ln_2": "norm2"}  # fmt: skip
    theirs.load_state_dict({
        name.replace(one, other): tensor
        for name, tensor in state.items()
        for one, other in parts.items()
        if name.startswith(one)
    })  # fmt: skip
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(ours(x, None), theirs(x), atol=1e-6, rtol=1e-5)


def test_quick_gelu_is_openais_formula():
    x = torch.linspace(-3, 3, 7)
    expected = [v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]
    assert models.QuickGELU()(x).tolist() == pytest.approx(expected, abs=1e-6)


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    outputs = model(**inputs)
    sum(value.square().sum() for value in outputs.values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient(dropout):
    found = []
    for use_checkpoint in (True, False):
        model = nano(use_checkpoint=use_checkpoint, dropout=dropout)
        torch.manual_seed(1)
        found.append(gradients(model, batch()))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-5)


def same(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_padding_of_sound_has_no_influence():
    model, inputs = nano().eval(), batch(frames=22)
    padded = torch.cat([inputs["audio"], torch.randn(2, 18, 80)], dim=1)
    mask = (torch.arange(40) < 22).expand(2, 40)
    same(model(audio=padded, audio_mask=mask), model(audio=inputs["audio"]))


def test_padding_of_text_has_no_influence_and_the_mask_is_found_without_one():
    model, inputs = nano().eval(), batch()
    ids = inputs["input_ids"]
    for mask in (None, inputs["attention_mask"]):
        same(model(input_ids=ids, attention_mask=mask), model(input_ids=ids[:, :8]))


def test_an_exclamation_mark_is_a_word_though_its_id_is_0():
    model, inputs = nano().eval(), batch(1)
    features = []
    for word in (0, 5):
        inputs["input_ids"][0, 3] = word
        features.append(model.encode_text(inputs["input_ids"]))
    assert (features[0] - features[1]).abs().max() > 1e-4


def test_a_missing_modality_of_one_sample_is_as_if_it_were_never_given():
    model, inputs = nano().eval(), batch()
    given = {name: inputs[name] for name in ("images", "audio")}
    both = model(**given, modality_mask=torch.tensor([[1, 0, 0], [0, 0, 1]]))
    for row, name in enumerate(given):
        alone = model(**{name: given[name]})
        same({n: both[n][row] for n in both}, {n: alone[n][row] for n in alone})


def test_rows_without_any_token_stay_finite():
    model, inputs = nano(), batch()
    outputs = model(
        input_ids=inputs["input_ids"],
        attention_mask=torch.zeros(2, 12),
        audio=inputs["audio"],
        audio_mask=torch.zeros(2, 24),
    )
    loss = sum(value.square().sum() for value in outputs.values())
    loss.backward()
    assert all(value.isfinite().all() for value in outputs.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_temperatures_end_at_100():
    model = nano()
    assert model.logit_scale["image_text"].exp().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.logit_scale["audio_text"].fill_(9.0)
    model.clamp_temperatures()
    scales = {pair: scale.exp().item() for pair, scale in model.logit_scale.items()}
    assert scales["audio_text"] == pytest.approx(100.0, rel=1e-6)
    assert scales["image_text"] == pytest.approx(1 / 0.07)


def test_bf16_autocast_keeps_features_in_float32():
    model, inputs = nano().eval(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.encode_image(inputs["images"])
    assert features.dtype == torch.float32
    assert features.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)
