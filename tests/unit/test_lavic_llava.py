"""The model room: item tokens, views, CLS vectors; and checkpoints that are not whole."""

import json
import shutil

import pytest
import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from lavic.src.knowledge_distillation import Config, memory_values
from lavic.src.vision import memory
from lavic.src.vision.adapters import adapter_parameters, add_adapter
from lavic.src.vision.model import (
    ITEM_TOKENS,
    VISION_TARGETS,
    add_item_tokens,
    cls_vectors,
    core_of,
    filled_slots,
    load_base,
    picture_views,
    place_vectors,
)
from shared.errors import UserError
from tests.lavic_nano import build_nano

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def loaded(paths):
    return load_base(paths.weights, CPU, torch.float32)


@pytest.fixture(scope="module")
def adapted(paths):
    """A model whose adapter is not zero, dropout off."""
    model = add_adapter(load_base(paths.weights, CPU, torch.float32)[0], VISION_TARGETS)
    torch.manual_seed(0)
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def picture(height, width):
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
    return (noise * 255).to(torch.uint8)


def test_the_base_is_frozen_and_in_eval(loaded):
    model, _ = loaded
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_item_tokens_are_added_and_the_table_keeps_its_rows(paths):
    model, processor = load_base(paths.weights, CPU, torch.float32)
    tokenizer, rows = processor.tokenizer, model.get_input_embeddings().weight.shape[0]
    before, image = len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")
    ids = add_item_tokens(model, tokenizer)
    assert ids == list(range(before, before + 5)) == add_item_tokens(model, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == rows > len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<image>") == image
    assert "<image>" in tokenizer.all_special_tokens
    assert tokenizer("".join(ITEM_TOKENS), add_special_tokens=False)["input_ids"] == ids


def test_the_table_grows_when_it_lacks_rows_and_stays_frozen(paths):
    model, processor = load_base(paths.weights, CPU, torch.float32)
    model.resize_token_embeddings(len(processor.tokenizer) + 2)
    old = model.get_input_embeddings().weight.detach().clone()
    ids = add_item_tokens(model, processor.tokenizer)
    table = model.get_input_embeddings().weight
    assert table.shape[0] == len(processor.tokenizer) == ids[-1] + 1
    assert torch.equal(table[: len(old)], old) and not table.requires_grad


@pytest.mark.parametrize(("size", "count"), [((96, 96), 5), ((48, 80), 3), ((60, 180), 4)])
def test_a_picture_has_its_real_views_alone(loaded, size, count):
    processor = loaded[1]
    views = picture_views(processor, picture(*size))
    pins = processor.image_processor.image_grid_pinpoints
    assert len(views) == count == image_size_to_num_patches(list(size), pins, 48)
    assert views.shape == (count, 3, 48, 48)
    assert all(view.abs().sum() > 0 for view in views)
    beside = processor.image_processor([picture(*size), picture(96, 96)], return_tensors="pt")
    assert torch.equal(beside["pixel_values"][0][:count], views)
    assert (
        beside["pixel_values"][0][count:] == 0
    ).all()  # what a batch would have been filled with


def test_cls_vectors_are_those_of_the_whole_tower(adapted, loaded):
    views = picture_views(loaded[1], picture(90, 110))
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


def test_vectors_are_placed_row_after_row_and_carry_gradients():
    embeds = torch.zeros(2, 3, 2, dtype=torch.float64)
    filled = torch.tensor([[False, True, False], [True, False, True]])
    vectors = torch.tensor([[1.0, 2], [3, 4], [5, 6]], requires_grad=True)
    placed = place_vectors(embeds, filled, vectors)
    assert placed.tolist() == [[[0, 0], [1, 2], [0, 0]], [[3, 4], [0, 0], [5, 6]]]
    assert placed.dtype == torch.float64
    (placed.sum() * 2).backward()
    assert vectors.grad is not None and (vectors.grad == 2).all()


def test_the_adapter_lies_on_every_linear_of_tower_and_projector_alone(adapted):
    core = core_of(adapted)
    expected = {
        f"model.{part}.{name}".removesuffix(".base_layer")
        for part in ("vision_tower", "multi_modal_projector")
        for name, module in getattr(core, part).named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    names = {name.partition(".lora_")[0] for name in adapter_parameters(adapted)}
    assert {name.removeprefix("base_model.model.") for name in names} == expected
    assert len(expected) == 3 * 6 + 2


@pytest.mark.slow
def test_the_real_models_adapter_has_the_documented_size():
    from transformers import LlavaNextForConditionalGeneration

    settings = memory.configuration("llava-hf/llava-v1.6-mistral-7b-hf")
    with torch.device("meta"):
        base = LlavaNextForConditionalGeneration(settings).requires_grad_(False).half()
        model = add_adapter(base, VISION_TARGETS)
    adapter = adapter_parameters(model)
    assert len(adapter) == 2 * 146
    assert sum(p.numel() for p in adapter.values()) == 3_645_440
    assert sum(p.nbytes for p in adapter.values()) == 14_581_760  # the 14 MB
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == 7_566_747_648
    assert sum(p.nbytes for p in frozen) == 15_133_495_296


@pytest.mark.slow
def test_the_memory_plan_explains_the_documented_20_gb():
    plan = memory.plan(**memory_values(Config(gradient_checkpointing="on")))
    rows = {what: size for what, size, _ in plan.rows}
    assert rows["weights"] == pytest.approx(15_133_495_296 + 14_581_760, abs=100_000)  # buffers
    assert rows["optimizer"] == 2 * 14_581_760
    assert plan.total < 20e9
    free = memory.plan(**memory_values(Config(gradient_checkpointing="off")))
    assert free.total - plan.total > 3e9
    assert "in all" in memory.text(memory_values(Config()), 1)


def copy(paths, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(paths.weights, directory)
    return directory


def test_fault_33_a_checkpoint_that_is_not_whole_is_refused_by_the_file(paths, tmp_path):
    directory = copy(paths, tmp_path)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        load_base(directory, CPU, torch.float32)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"is a Git-LFS pointer"):
        load_base(directory, CPU, torch.float32)
    weights.rename(directory / "model.safetensors.incomplete")
    with pytest.raises(UserError, match=r"has not finished"):
        load_base(directory, CPU, torch.float32)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_base(directory, CPU, torch.float32)


def test_fault_33_weights_that_lack_a_part_are_refused_not_filled_at_random(paths, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = copy(paths, tmp_path)
    state = load_file(directory / "model.safetensors")
    gone = next(name for name in state if "multi_modal_projector.linear_1.weight" in name)
    del state[gone]
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .*linear_1"):
        load_base(directory, CPU, torch.float32)


def test_a_model_of_another_kind_is_refused(paths, tmp_path):
    directory = copy(paths, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(UserError, match=r"holds a llava model, expected llava_next"):
        load_base(directory, CPU, torch.float32)
