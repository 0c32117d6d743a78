import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from face_distill.distill import model as face_model
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

WIDTH, LAYERS, IMAGE, PATCH = 32, 4, 56, 14


def vision_config() -> dict[str, Any]:
    return {
        "model_type": "blip_2_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": PATCH,
        # The default of 1e-10 makes a random tower blind: every image gives the same output.
        "initializer_range": 0.02,
        "attention_dropout": 0.3,
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole BLIP-2 checkpoint as on the Hub: config, index and two shards, the tower in one."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("blip2_weights")
    tower = Blip2VisionModel(Blip2VisionConfig(**vision_config()))
    for name, parameter in tower.named_parameters():
        if "norm" in name or "bias" in name:  # fresh ones are all 0 or 1: swaps would not show
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    shards = {
        "model-00001-of-00002.safetensors": {
            "query_tokens": torch.randn(1, 4, 8),
            **{f"vision_model.{name}": t.clone() for name, t in tower.state_dict().items()},
        },
        "model-00002-of-00002.safetensors": {"language_model.weight": torch.randn(5, 5)},
    }
    for shard, state in shards.items():
        save_file(state, directory / shard)
    weight_map = {name: shard for shard, state in shards.items() for name in state}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "blip-2", "vision_config": vision_config()}
    (directory / "config.json").write_text(json.dumps(config))
    # The language model is of no use to us; its shard is never opened.
    (directory / "model-00002-of-00002.safetensors").write_bytes(b"unreadable")
    return directory


def make_images(batch: int = 3, size: int = IMAGE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(5))


def make_student(checkpoint: Path, **options: Any) -> FaceStudent:
    """A student whose adapters are no longer zero."""
    torch.manual_seed(2)
    student = FaceStudent(
        load_tower(checkpoint), [0, 2], ArcFaceHead(WIDTH, 6), bottleneck=8, **options
    )
    for name, parameter in student.named_parameters():
        if "up_proj" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return student


def test_the_tower_has_the_values_of_the_file_and_computes_what_transformers_computes(
    checkpoint: Path,
) -> None:
    from safetensors.torch import load_file
    from transformers import Blip2VisionConfig, Blip2VisionModel

    tower = load_tower(checkpoint)
    stored = load_file(checkpoint / "model-00001-of-00002.safetensors")
    for name, value in tower.state_dict().items():
        assert torch.equal(value, stored[f"vision_model.{name}"]), name
    reference = Blip2VisionModel(Blip2VisionConfig(**vision_config())).eval()
    reference.load_state_dict(tower.state_dict())
    images = make_images()
    assert torch.equal(tower(images).last_hidden_state, reference(images).last_hidden_state)
    assert not tower.training
    assert not any(tensor.is_meta for tensor in [*tower.parameters(), *tower.buffers()])
    assert not any(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_tower_of_its_own_is_read_with_or_without_the_prefix(
    checkpoint: Path, tmp_path: Path, prefix: str
) -> None:
    state = load_tower(checkpoint).state_dict()
    half = {f"{prefix}{name}": t.to(torch.float16) for name, t in state.items()}
    save_file(half, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(vision_config()))
    tower = load_tower(tmp_path)
    assert {t.dtype for t in tower.state_dict().values()} == {torch.float32}
    for name, value in tower.state_dict().items():
        assert torch.equal(value, state[name].half().float())


def test_a_tower_that_lacks_one_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    state = {f"vision_model.{k}": v for k, v in load_tower(checkpoint).state_dict().items()}
    del state["vision_model.encoder.layers.2.mlp.fc1.bias"]
    save_file(state, tmp_path / "model.safetensors")
    config = {"model_type": "blip-2", "vision_config": vision_config()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"1 missing \(encoder\.layers\.2\.mlp\.fc1\.bias\)"):
        load_tower(tmp_path)


def test_a_directory_without_a_blip2_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing.*download_weight\.py"):
        load_tower(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": {}}')
    with pytest.raises(UserError, match="describes 'clip', not BLIP-2"):
        load_tower(tmp_path)


def test_adapter_layers_of_the_documented_tower() -> None:
    assert adapter_layers(39, "spread:12") == [0, 3, 6, 10, 13, 17, 20, 24, 27, 31, 34, 38]
    assert adapter_layers(39, "last:3") == [36, 37, 38]
    assert adapter_layers(4, "spread:4") == [0, 1, 2, 3]
    assert adapter_layers(4, "spread:1") == [0]


@pytest.mark.parametrize("spec", ["spread:0", "last:5", "first:2", "spread", "last:-1", "12"])
def test_adapter_layers_that_do_not_exist_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="adapter layers"):
        adapter_layers(4, spec)


def test_a_new_student_equals_its_frozen_tower_bit_for_bit(checkpoint: Path) -> None:
    images = make_images()
    expected = load_tower(checkpoint)(images).last_hidden_state
    student = FaceStudent(load_tower(checkpoint), adapter_layers(LAYERS, "spread:4"))
    for mode in (True, False):
        embedding, tokens = student.train(mode)(images)
        assert torch.equal(embedding, expected[:, 0])
        assert torch.equal(tokens, expected[:, 1:])
    assert embedding.shape == (3, WIDTH)
    assert tokens.shape == (3, (IMAGE // PATCH) ** 2, WIDTH)


def test_an_adapter_adds_scale_times_up_of_gelu_of_down(checkpoint: Path) -> None:
    mlp = make_student(checkpoint).vit.get_submodule("encoder.layers.2.mlp")
    assert isinstance(mlp, MLPWithAdapter)
    hidden, adapter = torch.randn(2, 5, WIDTH), mlp.adapter
    inner = hidden @ adapter.down_proj.weight.T + adapter.down_proj.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = 0.1 * (inner @ adapter.up_proj.weight.T + adapter.up_proj.bias)
    torch.testing.assert_close(mlp(hidden) - mlp.original_mlp(hidden), expected)
    assert expected.abs().max() > 0.01


def test_state_dict_names_are_the_documented_ones(checkpoint: Path) -> None:
    names = make_student(checkpoint).state_dict().keys()
    adapter = {n for n in names if n.startswith("vit.encoder.layers.2.mlp.adapter.")}
    parts = {"scale", "down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias"}
    assert adapter == {f"vit.encoder.layers.2.mlp.adapter.{part}" for part in parts}
    assert "vit.encoder.layers.2.mlp.original_mlp.fc1.weight" in names
    assert "vit.encoder.layers.1.mlp.fc1.weight" in names
    assert "head.weight" in names


def test_only_adapters_and_head_get_gradients(checkpoint: Path) -> None:
    student = make_student(checkpoint)
    embedding, tokens = student(make_images())
    head = student.get_submodule("head")
    loss = head(embedding, torch.tensor([0, 1, 2])) + tokens.square().mean()
    loss.backward()
    with_gradient = {n for n, p in student.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n in student.state_dict() if ".adapter." in n or "head." in n}
    assert all(p.grad.abs().max() > 0 for p in student.parameters() if p.grad is not None)


def test_the_tower_stays_in_eval_mode_and_draws_no_dropout(checkpoint: Path) -> None:
    student = make_student(checkpoint)
    assert student.train().training
    assert not any(module.training for module in student.vit.modules())
    images = make_images()
    assert torch.equal(student(images)[0], student(images)[0])
    assert torch.equal(student.train()(images)[0], student.eval()(images)[0])


def gradients_of(student: FaceStudent) -> dict[str, Tensor]:
    embedding, tokens = student(make_images())
    (embedding.sum() + tokens.square().mean()).backward()
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def test_checkpointing_recomputes_layers_and_gives_the_same_gradients(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, saving = make_student(checkpoint), make_student(checkpoint, checkpointing=True)
    calls = []
    layer = saving.vit.encoder.layers[1]
    monkeypatch.setattr(layer, "forward", _counted(layer.forward, calls))
    expected, found = gradients_of(plain), gradients_of(saving)
    assert len(calls) == 2  # once forward, once again for the backward pass
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with torch.no_grad():
        saving.eval()(make_images())
    assert len(calls) == 3


def _counted(function: Callable[..., Tensor], calls: list[None]) -> Callable[..., Tensor]:
    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return function(*args, **kwargs)

    return counted


def test_images_of_another_size_are_refused_where_the_tower_says_nothing(checkpoint: Path) -> None:
    student = make_student(checkpoint)
    small = make_images(size=28)
    student.vit(small)  # the trap: wrong positions, no error
    with pytest.raises(ValueError, match=r"must be \(B, 3, 56, 56\), got \(3, 3, 28, 28\)"):
        student(small)


@pytest.mark.parametrize("size", [28, 84])
def test_another_image_size_interpolates_the_positions(checkpoint: Path, size: int) -> None:
    tower = load_tower(checkpoint)
    images = make_images(size=size)
    expected = tower(images, interpolate_pos_encoding=True).last_hidden_state
    embedding, tokens = FaceStudent(tower, [0], image_size=size)(images)
    assert torch.equal(torch.cat([embedding[:, None], tokens], 1), expected)


@pytest.mark.parametrize("size", [60, 0, 13, -14])
def test_an_image_size_that_cuts_patches_is_refused(checkpoint: Path, size: int) -> None:
    with pytest.raises(UserError, match="multiple of the tower's 14-pixel patches"):
        make_student(checkpoint, image_size=size)


def test_trainable_state_is_adapters_and_head_as_copies(checkpoint: Path) -> None:
    student = make_student(checkpoint)
    state = trainable_state(student)
    assert len(state) == 2 * 5 + 1
    assert state["head.weight"].data_ptr() != student.get_parameter("head.weight").data_ptr()
    assert not any(type(tensor) is not Tensor or tensor.requires_grad for tensor in state.values())
    full_size = sum(t.numel() for t in student.state_dict().values())
    assert sum(t.numel() for t in state.values()) < full_size / 10


def test_load_student_without_a_head_passes_over_the_heads_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    saved = make_student(checkpoint)
    torch.save(trainable_state(saved), tmp_path / "s.pth")
    fresh = FaceStudent(load_tower(checkpoint), [0, 2], bottleneck=8)
    load_student(fresh, tmp_path / "s.pth")
    assert torch.equal(fresh(make_images())[0], saved(make_images())[0])


def test_load_student_refuses_other_layers_other_heads_and_missing_names(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s.pth"
    torch.save(trainable_state(make_student(checkpoint)), path)
    other_layers = FaceStudent(load_tower(checkpoint), [1, 2], ArcFaceHead(WIDTH, 6), bottleneck=8)
    with pytest.raises(UserError, match=r"s\.pth does not fit.*5 missing.*layers\.1.*5 unexpected"):
        load_student(other_layers, path)
    other_head = FaceStudent(load_tower(checkpoint), [0, 2], ArcFaceHead(WIDTH, 7), bottleneck=8)
    with pytest.raises(UserError, match=r"head\.weight is \(6, 32\) in the file, \(7, 32\)"):
        load_student(other_head, path)
    full = make_student(checkpoint).state_dict()
    del full["vit.post_layernorm.bias"]
    torch.save(full, path)
    with pytest.raises(UserError, match=r"1 missing \(vit\.post_layernorm\.bias\)"):
        load_student(make_student(checkpoint), path)


def test_the_model_module_does_not_import_transformers_at_import() -> None:
    source = Path(face_model.__file__).read_text()
    top_level = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert not any("transformers" in line for line in top_level)
