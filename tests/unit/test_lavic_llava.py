"""LLaVA-NeXT and its adapters: item tokens, views, CLS vectors; whole files or a refusal."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from lavic.src.recommend.model import LANGUAGE_TARGETS
from lavic.src.vision import memory
from lavic.src.vision.adapters import (
    SETTINGS,
    WEIGHTS,
    adapter_parameters,
    add_adapter,
    load_adapter,
    save_adapter,
)
from lavic.src.vision.model import (
    ITEM_TOKENS,
    VISION_TARGETS,
    add_item_tokens,
    cls_vectors,
    core_of,
    filled_slots,
    load_base,
    picture_views,
)
from shared.errors import UserError
from tests.lavic_talks import load, nano, shake

CPU = torch.device("cpu")


def base():
    return load_base(nano().model, CPU, torch.float32)[0]


@pytest.fixture(scope="module")
def processor():
    return load_base(nano().model, CPU, torch.float32)[1]


@pytest.fixture(scope="module")
def adapted():
    """A model whose adapter is not zero: the one that nano().adapter was saved from."""
    model = add_adapter(base(), VISION_TARGETS)
    shake(model, 0)
    return model.eval()


def picture(height, width):
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
    return (noise * 255).to(torch.uint8)


def vectors(model):
    views = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return cls_vectors(model.eval(), views)


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacks", [False, True])
def test_item_tokens_are_added_and_the_table_grows_where_it_lacks_rows_alone(lacks):
    model, processor = load_base(nano().model, CPU, torch.float32)
    tokenizer = processor.tokenizer
    before, image = len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")
    if lacks:
        model.resize_token_embeddings(before + 2)
    old = model.get_input_embeddings().weight.detach().clone()
    ids = add_item_tokens(model, tokenizer)
    assert ids == list(range(before, before + 5)) == add_item_tokens(model, tokenizer)
    table = model.get_input_embeddings().weight
    assert len(table) == (before + 5 if lacks else len(old)) and torch.equal(table[: len(old)], old)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer.convert_tokens_to_ids("<image>") == image
    assert "<image>" in tokenizer.all_special_tokens
    assert tokenizer("".join(ITEM_TOKENS), add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize(("size", "count"), [((96, 96), 5), ((48, 80), 3), ((60, 180), 4)])
def test_a_picture_has_its_real_views_alone(processor, size, count):
    views = picture_views(processor, picture(*size))
    pins = processor.image_processor.image_grid_pinpoints
    assert len(views) == count == image_size_to_num_patches(list(size), pins, 48)
    beside = processor.image_processor([picture(*size), picture(96, 96)], return_tensors="pt")
    assert torch.equal(beside["pixel_values"][0][:count], views)
    assert (beside["pixel_values"][0][count:] == 0).all()  # what would fill a batch up


def test_cls_vectors_are_those_of_the_whole_tower(adapted, processor):
    views = picture_views(processor, picture(90, 110))
    core = core_of(adapted)
    whole = core.multi_modal_projector(core.vision_tower(views).last_hidden_state[:, 0])
    quick = cls_vectors(adapted, views)
    torch.testing.assert_close(quick, whole, rtol=1e-5, atol=1e-5)
    trained = list(adapter_parameters(adapted).values())
    expected = torch.autograd.grad(whole.square().sum(), trained)
    given = torch.autograd.grad(quick.square().sum(), trained)
    for one, other in zip(given, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


def test_slots_are_filled_in_order_as_far_as_there_are_views():
    ids = torch.tensor([[7, 90, 91, 92, 93, 94, 8], [90, 91, 92, 93, 94, 9, 9]])
    filled = filled_slots(ids, [90, 91, 92, 93, 94], [3, 5])
    assert filled.int().tolist() == [[0, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]
    two = filled_slots(torch.tensor([[90, 91, 5, 90, 91]]), [90, 91], torch.tensor([1, 2]))
    assert two.int().tolist() == [[1, 0, 0, 1, 1]]
    assert not filled_slots(torch.tensor([[1, 2, 89, 95]]), [90, 91, 92, 93, 94], [5]).any()


def test_fault_33_a_checkpoint_that_is_not_whole_is_refused_by_the_file(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(nano().model, directory)
    weights, config = directory / "model.safetensors", directory / "config.json"

    def refused(message):
        with pytest.raises(UserError, match=message):
            load_base(directory, CPU, torch.float32)

    state = load_file(weights)
    gone = next(name for name in state if "multi_modal_projector.linear_1.weight" in name)
    less = {name: tensor for name, tensor in state.items() if name != gone}
    save_file(less, weights, {"format": "pt"})
    refused(r"lacks 1 weights .*linear_1")  # and is not filled at random
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(r"model\.safetensors is truncated")
    shutil.copy(nano().model / weights.name, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llava"}))
    refused(r"holds a llava model, expected llava_next")
    config.unlink()
    refused(r"config\.json is missing")


# --- its adapters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "parts", "count"),
    [
        (VISION_TARGETS, ("vision_tower", "multi_modal_projector"), 3 * 6 + 2),
        (LANGUAGE_TARGETS, ("language_model",), 2 * 7),
    ],
)
def test_an_adapter_is_on_every_linear_of_its_parts_alone(targets, parts, count):
    model = add_adapter(base(), targets)
    expected = {
        f"model.{part}.{name}".removesuffix(".base_layer")
        for part in parts
        for name, module in getattr(core_of(model), part).named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    names = {name.partition(".lora_")[0] for name in adapter_parameters(model)}
    assert {name.removeprefix("base_model.model.") for name in names} == expected
    assert len(expected) == count
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * count and all(".lora_" in name for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "modules", "numbers"),
    [(VISION_TARGETS, 146, 3_645_440), (LANGUAGE_TARGETS, 7 * 32, 20_971_520)],
)
def test_the_real_models_adapters_have_the_documented_sizes(targets, modules, numbers):
    """On a model without values; the first, in float32, is the document's 14 MB."""
    settings = memory.configuration("llava-hf/llava-v1.6-mistral-7b-hf")
    with torch.device("meta"):
        base = LlavaNextForConditionalGeneration(settings).requires_grad_(False).half()
        model = add_adapter(base, targets)
    adapter = adapter_parameters(model)
    assert len(adapter) == 2 * modules
    assert sum(p.numel() for p in adapter.values()) == numbers
    assert sum(p.nbytes for p in adapter.values()) == 4 * numbers
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == 7_566_747_648
    assert sum(p.nbytes for p in frozen) == 15_133_495_296


@pytest.fixture
def saved(tmp_path):
    """The directory of an adapter that is not zero."""
    return shutil.copytree(nano().adapter, tmp_path / "adapter")


def test_a_saved_adapter_is_the_documented_files_and_loads_to_the_bit(adapted, saved):
    names = {path.name for path in saved.iterdir()}
    assert {WEIGHTS, SETTINGS, "README.md", "processor_config.json", "tokenizer.json"} <= names
    state = load_file(saved / WEIGHTS)
    assert all(".lora_" in name and tensor.dtype == torch.float32 for name, tensor in state.items())
    assert len(state) == 2 * (3 * 6 + 2)
    loaded = load_adapter(base(), saved)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(vectors(loaded), vectors(adapted))
    assert torch.equal(vectors(PeftModel.from_pretrained(base(), saved)), vectors(adapted))
    assert not torch.equal(vectors(base()), vectors(adapted))
    tokenizer = AutoProcessor.from_pretrained(saved).tokenizer
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(ITEM_TOKENS)
    assert "<image>" in tokenizer.all_special_tokens


def old_4_55(name):
    return name.replace("vision_tower.encoder", "vision_tower.vision_model.encoder")


def old_4_4x(name):
    return old_4_55(name).replace("base_model.model.model.", "base_model.model.")


@pytest.mark.parametrize("rename", [old_4_4x, old_4_55])
def test_adapters_of_older_transformers_load_whole_projector_included(adapted, saved, rename):
    state = {rename(name): tensor for name, tensor in load_file(saved / WEIGHTS).items()}
    assert any(".vision_model." in name for name in state)
    save_file(state, saved / WEIGHTS)
    modules = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in state}
    settings = json.loads((saved / SETTINGS).read_text())
    (saved / SETTINGS).write_text(json.dumps(settings | {"target_modules": sorted(modules)}))
    assert torch.equal(vectors(load_adapter(base(), saved)), vectors(adapted))


def test_an_adapter_that_is_not_whole_is_refused_by_what_is_wrong(saved):
    def refused(message):
        with pytest.raises(UserError, match=message):
            load_adapter(base(), saved)

    state = load_file(saved / WEIGHTS)
    first, second = sorted(state)[:2]
    without = {name: tensor for name, tensor in state.items() if name != first}
    save_file(without, saved / WEIGHTS)
    refused(f"1 missing .{first}")
    other = {"base_model.model.model.other.lora_A.weight": torch.zeros(1)}
    save_file(state | other, saved / WEIGHTS)
    refused(r"1 unexpected .base_model.model.model.other")
    save_file(state | {second: torch.zeros(3, 3)}, saved / WEIGHTS)
    refused("does not fit this model: .*size mismatch")
    (saved / WEIGHTS).unlink()
    refused(r"adapter_model\.safetensors is missing")
    (saved / SETTINGS).write_text("{}")
    refused("does not describe a LoRA adapter")
    (saved / SETTINGS).unlink()
    refused(r"adapter_config\.json is missing")


def test_a_save_that_is_cut_short_leaves_the_old_adapter(adapted, saved, monkeypatch):
    model, processor, _ = load(nano())
    other = add_adapter(model, VISION_TARGETS)
    monkeypatch.setattr(type(processor), "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(other, processor, saved)
    assert torch.equal(vectors(load_adapter(base(), saved)), vectors(adapted))
    monkeypatch.undo()
    save_adapter(other, processor, saved)
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]
