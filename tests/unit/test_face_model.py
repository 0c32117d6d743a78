import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Blip2VisionConfig, Blip2VisionModel

from face_distill.demo_data import demo
from face_distill.distill.losses import ArcFaceHead
from face_distill.distill.model import (
    FaceStudent,
    MLPWithAdapter,
    adapter_layers,
    load_student,
    load_tower,
    trainable_state,
)
from shared.errors import UserError
from shared.files import read_json, write_json
from tests.face_students import student_of

WIDTH, LAYERS, IMAGE, PATCH = 64, 4, 112, 16  # of the demo's tower


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole BLIP-2 checkpoint as on the Hub, config, index and shards, with dropout."""
    directory = tmp_path_factory.mktemp("blip2_weights")
    demo.write_tower(directory, seed=0)
    config = read_json(directory / "config.json")
    config["vision_config"]["attention_dropout"] = 0.3
    write_json(directory / "config.json", config)
    return directory


def vision_config(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / "config.json")["vision_config"]


def make_images(batch: int = 3, size: int = IMAGE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(5))


def test_the_tower_has_the_values_of_the_files_and_computes_what_transformers_computes(checkpoint):
    tower = load_tower(checkpoint)
    shards = [load_file(path) for path in checkpoint.glob("*.safetensors")]
    stored = {name: tensor for shard in shards for name, tensor in shard.items()}
    for name, value in tower.state_dict().items():
        assert torch.equal(value, stored[f"vision_model.{name}"]), name
    reference = Blip2VisionModel(Blip2VisionConfig.from_dict(vision_config(checkpoint))).eval()
    reference.load_state_dict(tower.state_dict())
    images = make_images()
    assert torch.equal(tower(images).last_hidden_state, reference(images).last_hidden_state)
    assert not any(tensor.is_meta for tensor in [*tower.parameters(), *tower.buffers()])


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_tower_of_its_own_is_read_with_or_without_the_prefix(checkpoint, tmp_path, prefix):
    state = load_tower(checkpoint).state_dict()
    half = {f"{prefix}{name}": t.to(torch.float16) for name, t in state.items()}
    save_file(half, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(vision_config(checkpoint)))
    for name, value in load_tower(tmp_path).state_dict().items():
        assert torch.equal(value, state[name].half().float())


def test_a_tower_that_lacks_one_tensor_is_refused(checkpoint, tmp_path):
    state = {f"vision_model.{k}": v for k, v in load_tower(checkpoint).state_dict().items()}
    del state["vision_model.encoder.layers.2.mlp.fc1.bias"]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(UserError, match=r"1 missing \(encoder\.layers\.2\.mlp\.fc1\.bias\)"):
        load_tower(tmp_path)


def test_a_config_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": {}}')
    with pytest.raises(UserError, match="describes 'clip', not BLIP-2"):
        load_tower(tmp_path)


def test_adapter_layers_of_the_documented_tower():
    assert adapter_layers(39, "spread:12") == [0, 3, 6, 10, 13, 17, 20, 24, 27, 31, 34, 38]
    assert adapter_layers(39, "last:3") == [36, 37, 38]
    assert adapter_layers(4, "spread:4") == [0, 1, 2, 3]
    for spec in ("spread:0", "first:2", "last:-1", "12"):
        with pytest.raises(UserError, match="adapter layers"):
            adapter_layers(4, spec)


def test_a_new_student_equals_its_frozen_tower_bit_for_bit(checkpoint):
    images = make_images()
    expected = load_tower(checkpoint)(images).last_hidden_state
    student = FaceStudent(load_tower(checkpoint), adapter_layers(LAYERS, "spread:4"))
    for mode in (True, False):
        embedding, tokens = student.train(mode)(images)
        assert torch.equal(torch.cat([embedding[:, None], tokens], 1), expected)
    assert expected.shape == (3, 1 + (IMAGE // PATCH) ** 2, WIDTH)


def test_an_adapter_adds_scale_times_up_of_gelu_of_down(checkpoint):
    mlp = student_of(checkpoint).vit.get_submodule("encoder.layers.2.mlp")
    assert isinstance(mlp, MLPWithAdapter)
    hidden, adapter = torch.randn(2, 5, WIDTH), mlp.adapter
    adapter.scale.data.fill_(0.7)
    inner = hidden @ adapter.down_proj.weight.T + adapter.down_proj.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = 0.7 * (inner @ adapter.up_proj.weight.T + adapter.up_proj.bias)
    torch.testing.assert_close(mlp(hidden) - mlp.original_mlp(hidden), expected)
    assert expected.abs().max() > 0.01


def test_only_adapters_and_head_get_gradients(checkpoint):
    student = student_of(checkpoint)
    embedding, tokens = student(make_images())
    head = student.get_submodule("head")
    loss = head(embedding, torch.tensor([0, 1, 2])) + tokens.square().mean()
    loss.backward()
    with_gradient = {n for n, p in student.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n in student.state_dict() if ".adapter." in n or "head." in n}
    assert all(p.grad.abs().max() > 0 for p in student.parameters() if p.grad is not None)


def test_the_tower_stays_in_eval_mode_and_draws_no_dropout(checkpoint):
    student = student_of(checkpoint).train()
    assert student.training
    images = make_images()
    first = student(images)[0]
    assert torch.equal(student(images)[0], first)
    assert torch.equal(student.eval()(images)[0], first)


def gradients_of(student: FaceStudent) -> dict[str, Tensor]:
    embedding, tokens = student(make_images())
    (embedding.sum() + tokens.square().mean()).backward()
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def test_checkpointing_recomputes_layers_and_gives_the_same_gradients(checkpoint, monkeypatch):
    plain, saving = student_of(checkpoint), student_of(checkpoint, checkpointing=True)
    calls = []
    layer = saving.vit.encoder.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    expected, found = gradients_of(plain), gradients_of(saving)
    assert len(calls) == 2  # once forward, once again for the backward pass
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with torch.no_grad():
        saving.eval()(make_images())
    assert len(calls) == 3


def test_images_of_another_size_are_refused_where_the_tower_says_nothing(checkpoint):
    student = student_of(checkpoint)
    small = make_images(size=48)
    student.vit(small)  # the trap: wrong positions, no error
    with pytest.raises(ValueError, match=r"must be \(B, 3, 112, 112\), got \(3, 3, 48, 48\)"):
        student(small)


def test_another_image_size_interpolates_the_positions_and_cuts_no_patch(checkpoint):
    tower = load_tower(checkpoint)
    images = make_images(size=80)
    expected = tower(images, interpolate_pos_encoding=True).last_hidden_state
    embedding, tokens = FaceStudent(tower, [0], image_size=80)(images)
    assert torch.equal(torch.cat([embedding[:, None], tokens], 1), expected)
    for size in (60, 0, -16):
        with pytest.raises(UserError, match="multiple of the tower's 16-pixel patches"):
            student_of(checkpoint, image_size=size)


def test_the_trained_state_has_the_documented_names_and_loads_without_its_head(
    checkpoint, tmp_path
):
    saved = student_of(checkpoint)
    state = trainable_state(saved)
    parts = ("scale", "down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias")
    layers = [
        f"vit.encoder.layers.{layer}.mlp.adapter.{part}" for layer in (0, 2) for part in parts
    ]
    assert sorted(state) == sorted([*layers, "head.weight"])
    assert (
        state["head.weight"].data_ptr() != saved.get_parameter("head.weight").data_ptr()
    )  # a copy
    torch.save(state, tmp_path / "s.pth")
    fresh = FaceStudent(load_tower(checkpoint), [0, 2], bottleneck=8)
    load_student(fresh, tmp_path / "s.pth")
    assert torch.equal(fresh(make_images())[0], saved(make_images())[0])


def test_load_student_refuses_other_layers_and_other_heads(checkpoint, tmp_path):
    path = tmp_path / "s.pth"
    torch.save(trainable_state(student_of(checkpoint)), path)
    other_layers = FaceStudent(load_tower(checkpoint), [1, 2], ArcFaceHead(WIDTH, 5), bottleneck=8)
    with pytest.raises(UserError, match=r"s\.pth does not fit.*5 missing.*layers\.1.*5 unexpected"):
        load_student(other_layers, path)
    other_head = FaceStudent(load_tower(checkpoint), [0, 2], ArcFaceHead(WIDTH, 7), bottleneck=8)
    with pytest.raises(UserError, match=r"head\.weight is \(5, 64\) in the file, \(7, 64\)"):
        load_student(other_head, path)
