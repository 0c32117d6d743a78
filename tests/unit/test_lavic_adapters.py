"""Adapters: whole or refused, whatever transformers wrote them; readable by peft itself."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

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
    load_base,
)
from shared.errors import UserError
from tests.lavic_nano import build_nano

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("nano"))


def base(paths):
    return load_base(paths.weights, CPU, torch.float32)[0]


def views():
    return torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(paths, tmp_path):
    """(the directory of an adapter that is not zero, the vectors it gives)."""
    model, processor = load_base(paths.weights, CPU, torch.float32)
    add_item_tokens(model, processor.tokenizer)
    adapted = add_adapter(model, VISION_TARGETS)
    torch.manual_seed(0)
    for parameter in adapter_parameters(adapted).values():
        nn.init.normal_(parameter, std=0.1)
    adapted.eval()
    save_adapter(adapted, processor, tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", cls_vectors(adapted, views())


def vectors(model):
    with torch.no_grad():
        return cls_vectors(model.eval(), views())


def test_a_saved_adapter_is_the_documented_files_and_loads_to_the_bit(paths, saved):
    directory, expected = saved
    names = {path.name for path in directory.iterdir()}
    assert {WEIGHTS, SETTINGS, "README.md"} <= names
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    loaded = load_adapter(base(paths), directory)
    assert torch.equal(vectors(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not torch.equal(vectors(base(paths)), expected)


def test_peft_itself_reads_it(paths, saved):
    directory, expected = saved
    assert torch.equal(vectors(PeftModel.from_pretrained(base(paths), directory)), expected)


def test_it_holds_the_adapter_alone_in_float32(saved):
    state = load_file(saved[0] / WEIGHTS)
    assert all(".lora_" in name and tensor.dtype == torch.float32 for name, tensor in state.items())
    assert len(state) == 2 * (3 * 6 + 2)
    assert json.loads((saved[0] / SETTINGS).read_text())["target_modules"] == VISION_TARGETS


def test_the_saved_processor_knows_the_item_tokens(saved):
    from transformers import AutoProcessor

    tokenizer = AutoProcessor.from_pretrained(saved[0]).tokenizer
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(ITEM_TOKENS)
    assert "<image>" in tokenizer.all_special_tokens


def renamed(directory, rename, *, targets=None):
    """Rewrite the adapter with other names, as another version would have."""
    state = load_file(directory / WEIGHTS)
    save_file({rename(name): tensor for name, tensor in state.items()}, directory / WEIGHTS)
    if targets:
        settings = json.loads((directory / SETTINGS).read_text())
        settings["target_modules"] = targets(state)
        (directory / SETTINGS).write_text(json.dumps(settings))


def old_4_55(name):
    return name.replace("vision_tower.encoder", "vision_tower.vision_model.encoder")


def old_4_4x(name):
    return old_4_55(name).replace("base_model.model.model.", "base_model.model.")


def modules_of(rename):
    def targets(state):
        names = {rename(name).partition(".lora_")[0] for name in state}
        return sorted(name.removeprefix("base_model.model.") for name in names)

    return targets


@pytest.mark.parametrize("rename", [old_4_4x, old_4_55])
def test_adapters_of_older_transformers_load_whole_projector_included(paths, saved, rename):
    directory, expected = saved
    renamed(directory, rename, targets=modules_of(rename))
    keys = load_file(directory / WEIGHTS)
    assert any(".vision_model." in key for key in keys)
    assert torch.equal(vectors(load_adapter(base(paths), directory)), expected)


def test_missing_unexpected_and_misshapen_weights_are_refused(paths, saved):
    directory = saved[0]
    state = load_file(directory / WEIGHTS)
    first, second = sorted(state)[:2]
    without = {name: tensor for name, tensor in state.items() if name != first}
    save_file(without, directory / WEIGHTS)
    with pytest.raises(UserError, match=f"1 missing .{first}"):
        load_adapter(base(paths), directory)
    other = {"base_model.model.model.other.lora_A.weight": torch.zeros(1)}
    save_file(state | other, directory / WEIGHTS)
    with pytest.raises(UserError, match=r"1 unexpected .base_model.model.model.other"):
        load_adapter(base(paths), directory)
    save_file(state | {second: torch.zeros(3, 3)}, directory / WEIGHTS)
    with pytest.raises(UserError, match=r"does not fit this model: .*size mismatch"):
        load_adapter(base(paths), directory)


def test_a_directory_that_is_no_adapter_is_named(paths, saved, tmp_path):
    with pytest.raises(UserError, match=r"adapter_config.json is missing"):
        load_adapter(base(paths), tmp_path / "nowhere")
    (saved[0] / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(base(paths), saved[0])
    (saved[0] / SETTINGS).write_text("{}")
    with pytest.raises(UserError, match=r"does not describe a LoRA adapter"):
        load_adapter(base(paths), saved[0])


def test_a_save_that_is_cut_short_leaves_the_old_adapter(paths, saved, monkeypatch):
    directory, expected = saved
    model, processor = load_base(paths.weights, CPU, torch.float32)
    adapted = add_adapter(model, VISION_TARGETS)
    monkeypatch.setattr(type(processor), "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(adapted, processor, directory)
    assert torch.equal(vectors(load_adapter(base(paths), directory)), expected)
    monkeypatch.undo()
    save_adapter(adapted, processor, directory)
    assert [path.name for path in directory.parent.iterdir()] == ["adapter"]
