"""evaluate.py on adapters of both stages."""

from __future__ import annotations

import math

import pytest
import torch

from lavic.src import describe, evaluate, prompt_tuning
from lavic.src.vision.adapters import load_adapter
from lavic.src.vision.captions import prompt
from lavic.src.vision.model import ITEM_TOKENS, cls_vectors, picture_views
from shared.files import read_json, read_json_lines
from shared.images import read_rgb
from tests.harness import run_here, status_of
from tests.lavic_talks import load, nano


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run directory of a short stage 2."""
    run_dir = tmp_path_factory.mktemp("run") / "out"
    flags = [*nano().flags(run_dir), "--num_epochs", 1, "--no-evaluate-before"]
    assert run_here(prompt_tuning.main, flags).code == 0
    return run_dir


@pytest.fixture
def flags(tmp_path):
    return [
        *("--data-root", nano().root / "data", "--out", tmp_path / "results", "--workers", 0),
        *("--cache", tmp_path / "vectors", "--device", "cpu"),
    ]


def by_hand():
    """Summed loss and tokens of the good validation pictures, one at a time, all logits formed."""
    base, processor, item_ids = load(nano())
    model = load_adapter(base, nano().adapter)
    core, tokenizer = model.get_base_model().model, processor.tokenizer
    total, count = 0.0, 0
    for row in list(read_json_lines(nano().root / "data" / "item2meta_valid.jsonl"))[:4]:
        picture = read_rgb(nano().root / "data" / "valid_images" / row["image_name"])
        views = cls_vectors(model, picture_views(processor, picture))
        asked = tokenizer(prompt(row["title"], len(ITEM_TOKENS)))["input_ids"]
        said = tokenizer(row["image_description_llava_cleaned"], add_special_tokens=False)
        ids = torch.tensor(asked + said["input_ids"])
        embeds = core.language_model.embed_tokens(ids)
        first = asked.index(item_ids[0])
        embeds[first : first + len(views)] = views
        hidden = core.language_model(inputs_embeds=embeds[None]).last_hidden_state[0]
        logs = model.get_base_model().lm_head(hidden).log_softmax(-1)
        for place in range(len(asked), len(ids)):
            total -= float(logs[place - 1, ids[place]])
            count += 1
    return total, count


@torch.no_grad()
def test_a_vision_adapter_gets_its_validation_loss(flags, tmp_path):
    outcome = run_here(evaluate.main, [*flags, "--checkpoint", nano().adapter])
    assert outcome.code == 0, outcome.text
    found = read_json(tmp_path / "results" / "evaluation.json")
    total, count = by_hand()
    assert found["metrics"]["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["metrics"]["val_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["counts"] == {"samples": 4, "tokens": count, "left_out": 1}
    assert found["schema"] == 1 and found["stage"] == 1
    assert found["checkpoint"] == str(nano().adapter)
    assert found["data"] == str(nano().root / "data")
    assert "val_loss" in outcome.text


def test_a_recommender_gets_the_figures_of_its_training(flags, trained, tmp_path):
    outcome = run_here(evaluate.main, [*flags, "--checkpoint", trained])
    assert outcome.code == 0, outcome.text
    found = read_json(tmp_path / "results" / "evaluation.json")
    assert found["metrics"]["recall@1"] == status_of(trained)["result"]["after"]
    assert found["counts"]["conversations"] == 7 and found["stage"] == 2
    assert found["category"] == "all_beauty" and found["candidate_type"] == "candidates_st"
    name = "test_results_candidates_st.jsonl"
    ours, theirs = (list(read_json_lines(d / name)) for d in (tmp_path / "results", trained))
    assert ours == theirs


def test_a_recommender_on_other_candidates_and_fewer_conversations(flags, trained, tmp_path):
    extra = ["--checkpoint", trained / "trained_lora_adapter", "--limit", 3]
    outcome = run_here(evaluate.main, [*flags, *extra, "--candidate-type", "candidates_gpt_large"])
    assert outcome.code == 0, outcome.text
    found = read_json(tmp_path / "results" / "evaluation.json")
    assert found["counts"]["conversations"] == 3
    rows = list(read_json_lines(tmp_path / "results" / "test_results_candidates_gpt_large.jsonl"))
    assert len(rows) == 3 and "recommended_gpt_large" in rows[0]


def words_of(model, picture, title, count):
    """What transformers' own generate says of a picture, five slots."""
    base, processor, item_ids = load(nano())
    tokenizer, llava = processor.tokenizer, model(base)
    views = cls_vectors(llava, picture_views(processor, read_rgb(picture)))
    ids = torch.tensor(tokenizer(prompt(title, len(ITEM_TOKENS)))["input_ids"])
    plain = llava.get_base_model() if hasattr(llava, "get_base_model") else llava
    embeds = plain.model.language_model.embed_tokens(ids)
    first = ids.tolist().index(item_ids[0])
    embeds[first : first + len(views)] = views
    said = plain.generate(
        inputs_embeds=embeds[None], attention_mask=torch.ones_like(ids)[None],
        max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return " ".join(tokenizer.decode(said[0], skip_special_tokens=True).split())


@torch.no_grad()
def test_a_picture_is_described_before_and_after(tmp_path):
    picture = next(path for path in sorted(nano().images.iterdir()) if path.stat().st_size > 300)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    flags = ["--checkpoint", nano().adapter, "--title", "Desk Tag", "--max-tokens", 6]
    outcome = run_here(describe.main, [picture, bad, *flags, "--device", "cpu"])
    assert outcome.code == 0, outcome.text
    before = words_of(lambda base: base, picture, "Desk Tag", 6)
    after = words_of(lambda base: load_adapter(base, nano().adapter), picture, "Desk Tag", 6)
    assert f"{picture}\n  before  {before}\n  after   {after}\n" in outcome.text
    assert f"{bad} is passed over" in outcome.text
    assert run_here(describe.main, [bad, *flags, "--device", "cpu"]).code == 1
