"""evaluate.py on adapters of both stages, describe.py; and --load_in_4bit and --device_map.

The language model in NF4 is that of bitsandbytes' CPU back end, where it is installed.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

import shared.memory
from lavic.src import describe, evaluate, knowledge_distillation, prompt_tuning
from lavic.src.recommend import memory as of_tuning
from lavic.src.vision import memory as of_distillation
from lavic.src.vision.adapters import load_adapter
from lavic.src.vision.captions import prompt
from lavic.src.vision.model import ITEM_TOKENS, cls_vectors, load_base, picture_views
from shared.files import read_json, read_json_lines
from shared.images import read_rgb
from tests.harness import losses, run_here, status_of
from tests.lavic_nano import build_nano, flags_of
from tests.lavic_talks import load, nano

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


@pytest.fixture
def flags(tmp_path):
    return [
        *("--data-root", nano().root / "data", "--out", tmp_path / "results", "--workers", 0),
        *("--cache", tmp_path / "vectors", "--device", "cpu"),
    ]


def seen(base, model, processor, picture, title):
    """(embeddings of the question about a picture, of five slots; the place behind it)."""
    views = cls_vectors(model, picture_views(processor, read_rgb(picture)))
    asked = processor.tokenizer(prompt(title, len(ITEM_TOKENS)))["input_ids"]
    embeds = base.model.language_model.embed_tokens(torch.tensor(asked))
    first = asked.index(processor.tokenizer.convert_tokens_to_ids(ITEM_TOKENS[0]))
    embeds[first : first + len(views)] = views
    return embeds, len(asked)


def by_hand():
    """Summed loss and tokens of the good validation pictures, one at a time, all logits formed."""
    base, processor, _ = load(nano())
    model = load_adapter(base, nano().adapter)
    total, count = 0.0, 0
    for row in list(read_json_lines(nano().root / "data" / "item2meta_valid.jsonl"))[:4]:
        picture = nano().root / "data" / "valid_images" / row["image_name"]
        embeds, start = seen(base, model, processor, picture, row["title"])
        text = row["image_description_llava_cleaned"]
        said = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        core = base.model.language_model
        whole = torch.cat([embeds, core.embed_tokens(said)])
        hidden = core(inputs_embeds=whole[None]).last_hidden_state[0]
        logs = base.lm_head(hidden).log_softmax(-1)[start - 1 : -1]
        total -= float(logs.gather(1, said[:, None]).sum())
        count += len(said)
    return total, count


@torch.no_grad()
def test_a_vision_adapter_gets_its_validation_loss(flags, tmp_path):
    outcome = run_here(evaluate.main, [*flags, "--checkpoint", nano().adapter])
    assert outcome.code == 0, outcome.text
    total, count = by_hand()
    found = read_json(tmp_path / "results" / "evaluation.json")
    assert found["metrics"] == {
        "val_loss": pytest.approx(total / count, rel=1e-5),
        "val_perplexity": pytest.approx(math.exp(total / count), rel=1e-4),
    }
    assert found["counts"] == {"samples": 4, "tokens": count, "left_out": 1}
    assert (found["schema"], found["stage"]) == (1, 1)
    assert found["checkpoint"] == str(nano().adapter)
    assert found["data"] == str(nano().root / "data")
    assert "val_loss" in outcome.text


FOUR_BIT, SPREAD = ["--load_in_4bit"], ["--device_map", "auto"]


@pytest.mark.parametrize(
    ("device", "packed", "more"),
    [
        ("cpu", [], SPREAD),
        pytest.param("cpu", FOUR_BIT, [], marks=needs_bitsandbytes),
        pytest.param("cuda", [], SPREAD, marks=[pytest.mark.gpu, needs_gpu]),
        pytest.param("cuda", FOUR_BIT, [], marks=[pytest.mark.gpu, needs_gpu, needs_bitsandbytes]),
    ],
)
def test_a_recommender_gets_the_figures_of_its_training(flags, tmp_path, device, packed, more):
    trained, results = tmp_path / "out", tmp_path / "results"
    flags += [*packed, "--device", device]
    words = [*nano().flags(trained, tmp_path / "vectors"), *packed, "--device", device]
    outcome = run_here(prompt_tuning.main, [*words, "--no-evaluate-before"])
    assert outcome.code == 0, outcome.text
    found = losses(trained, "train_loss")
    assert found[max(found)] < found[1]
    words = [*flags, "--checkpoint", trained, "--batch-size", 3, *more]
    outcome = run_here(evaluate.main, words)
    assert outcome.code == 0, outcome.text
    found = read_json(results / "evaluation.json")
    assert found["metrics"]["recall@1"] == status_of(trained)["result"]["after"]
    assert found["counts"]["conversations"] == 7 and found["stage"] == 2
    assert found["category"] == "all_beauty" and found["candidate_type"] == "candidates_st"
    name = "test_results_candidates_st.jsonl"
    ours, theirs = (list(read_json_lines(place / name)) for place in (results, trained))
    assert ours == theirs

    extra = ["--checkpoint", trained / "trained_lora_adapter", "--limit", 3]
    outcome = run_here(evaluate.main, [*flags, *extra, "--candidate-type", "candidates_gpt_large"])
    assert outcome.code == 0, outcome.text
    assert read_json(results / "evaluation.json")["counts"]["conversations"] == 3
    rows = list(read_json_lines(results / "test_results_candidates_gpt_large.jsonl"))
    assert len(rows) == 3 and "recommended_gpt_large" in rows[0]


def words_of(picture, title, count, *, adapted):
    """What transformers' own generate says of a picture."""
    base, processor, _ = load(nano())
    model = load_adapter(base, nano().adapter) if adapted else base
    embeds, start = seen(base, model, processor, picture, title)
    said = base.generate(
        inputs_embeds=embeds[None], attention_mask=torch.ones(1, start, dtype=torch.long),
        max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return " ".join(processor.tokenizer.decode(said[0], skip_special_tokens=True).split())


@torch.no_grad()
def test_a_picture_is_described_before_and_after(tmp_path):
    picture = next(path for path in sorted(nano().images.iterdir()) if path.stat().st_size > 300)
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    flags = ["--checkpoint", nano().adapter, "--title", "Desk Tag", "--max-tokens", 6]
    outcome = run_here(describe.main, [picture, bad, *flags, "--device", "cpu"])
    assert outcome.code == 0, outcome.text
    before, after = (words_of(picture, "Desk Tag", 6, adapted=adapted) for adapted in (False, True))
    assert f"{picture}\n  before  {before}\n  after   {after}\n" in outcome.text
    assert f"{bad} is passed over" in outcome.text
    assert run_here(describe.main, [bad, *flags, "--device", "cpu"]).code == 1


# --- a smaller language model, and one on several GPUs --------------------------------------------


def test_without_the_package_every_script_says_how_to_have_it(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest),
    )
    picture = next(path for path in nano().images.iterdir() if path.stat().st_size > 300)
    for main, flags in (
        (knowledge_distillation.main, flags_of(build_nano(tmp_path / "nano"), tmp_path / "one")),
        (prompt_tuning.main, nano().flags(tmp_path / "two")),
        (evaluate.main, ["--checkpoint", nano().adapter, "--data-root", nano().root / "data"]),
        (describe.main, [picture, "--checkpoint", nano().adapter]),
    ):
        outcome = run_here(main, [*flags, "--load_in_4bit"])
        assert outcome.code == 3, outcome.text
        assert outcome.last_line.endswith("-m pip install bitsandbytes")
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()


@needs_bitsandbytes
@pytest.mark.parametrize("device", DEVICES)
def test_stage_1_trains_beside_a_packed_language_model(tmp_path, device):
    base, _ = load_base(nano().model, torch.device(device), torch.float32, four_bit=True)
    packed = {n: part for n, part in base.named_modules() if type(part).__name__ == "Linear4bit"}
    assert len(packed) == 2 * 7 and all("language_model.layers" in name for name in packed)
    assert {part.weight.quant_state.quant_type for part in packed.values()} == {"nf4"}
    flags = flags_of(build_nano(tmp_path / "nano"), tmp_path / "whole")
    flags += ["--lora_dropout", 0, "--lr", 5e-3, "--device", device]
    assert run_here(knowledge_distillation.main, [*flags, "--num_epochs", 1]).code == 0
    words = [*flags, "--num_epochs", 4, "--load_in_4bit", "--output_dir", tmp_path / "packed"]
    outcome = run_here(knowledge_distillation.main, words)
    assert outcome.code == 0, outcome.text
    whole, found = (losses(tmp_path / name, "train_loss") for name in ("whole", "packed"))
    assert found[1] != whole[1] and found[1] == pytest.approx(whole[1], rel=0.1)
    assert found[20] < found[1]


STAGES = {of_distillation: knowledge_distillation, of_tuning: prompt_tuning}


@pytest.mark.parametrize("module", STAGES, ids=["1", "2"])
def test_the_estimates_count_four_bits_and_a_scale_a_64_for_each_packed_weight(module):
    script, base = STAGES[module], load(nano())[0]
    values = script.memory_values(script.Config()) | {"model_name": str(nano().model)}
    whole, packed = (module.plan(**(values | {"load_in_4bit": on})) for on in (False, True))
    layers = base.model.language_model.layers.parameters()
    weights = sum(parameter.numel() for parameter in layers if parameter.dim() == 2)
    saved = whole.rows[0][1] - packed.rows[0][1]
    assert saved == pytest.approx(weights * (2 - 0.5 - 1 / 64), rel=1e-3)
    assert whole.rows[0][2] == packed.rows[0][2]  # the number of weights


@pytest.mark.full
@pytest.mark.parametrize(("module", "gigabytes"), [(of_distillation, 6.6), (of_tuning, 6.5)])
def test_the_real_model_in_four_bits_takes_what_the_page_says(module, gigabytes):
    script = STAGES[module]
    values = script.memory_values(script.Config(gradient_checkpointing="on", load_in_4bit=True))
    assert module.plan(**values).total == pytest.approx(gigabytes * 1e9, abs=0.06e9)


def test_the_estimate_of_an_evaluation_spreads_the_weights(monkeypatch):
    def weights(*extra):
        flags = ["--checkpoint", nano().adapter, "--estimate", "--batch-size", 1]
        outcome = run_here(evaluate.main, [*flags, *extra])
        assert outcome.code == 0, outcome.text
        (line,) = (line for line in outcome.text.splitlines() if line.startswith("  weights"))
        return float(line.split()[1])

    whole = weights()
    monkeypatch.setattr(shared.memory, "devices", lambda: [("card", 8 * 10**9)] * 2)
    assert weights("--device_map", "auto") == pytest.approx(whole / 2, abs=0.11)
    assert weights() == whole
    assert weights("--load_in_4bit") < whole
