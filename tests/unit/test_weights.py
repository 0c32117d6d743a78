import argparse
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared import weights
from shared.errors import UserError


def make_state() -> dict[str, torch.Tensor]:
    values = torch.Generator().manual_seed(0)
    return {
        "eye.weight": torch.randn(40, 30, generator=values),
        "eye.bias": torch.randn(40, generator=values),
        "mouth.weight": torch.randn(7, generator=values),
    }


def assert_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def save_sharded(directory: Path) -> dict[str, torch.Tensor]:
    """The eye in the first shard, the mouth in the second, in the layout of the Hub."""
    state = make_state()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shard_of = {name: first if name.startswith("eye") else second for name in state}
    for shard in (first, second):
        part = {name: t for name, t in state.items() if shard_of[name] == shard}
        save_file(part, directory / shard)
    index = {"metadata": {}, "weight_map": shard_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "old.pth", "w.safetensors"])
def test_read_gives_what_was_saved_in_every_format(tmp_path: Path, name: str) -> None:
    state, path = make_state(), tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name != "old.pth")
    assert_same(weights.read(path), state)
    eye = {"weight": state["eye.weight"], "bias": state["eye.bias"]}
    assert_same(weights.read(str(path), prefix="eye."), eye)


def test_read_opens_only_the_shards_that_hold_the_prefix(tmp_path: Path) -> None:
    state = save_sharded(tmp_path)
    assert_same(weights.read(tmp_path), state)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"never opened")
    eye = {"weight": state["eye.weight"], "bias": state["eye.bias"]}
    assert_same(weights.read(tmp_path, "eye."), eye)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_read_unwraps_a_state_dict_beside_other_things(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, key: make_state(), "loss": 0.5}, tmp_path / "w.pth")
    assert_same(weights.read(tmp_path / "w.pth"), make_state())


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": Payload(proof)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth holds a pickled .*could run code"):
        weights.read(tmp_path / "w.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(proof), protocol=2))
    with pytest.raises(UserError, match=r"plain\.pth"):
        weights.read(tmp_path / "plain.pth")
    assert not proof.exists()


def test_a_raw_pickle_is_refused_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path.write_bytes(pickle.dumps({"a": [1.0]}, protocol))
            with pytest.raises(UserError, match=r"not a weight file|no state dict|damaged"):
                weights.read(path)
    assert [str(warning.message) for warning in shown] == []


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "Git-LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>please log in", "web page.*download it again"),
        (b"", "is empty"),
        (b"\x00\x01 not weights at all " * 9, "not a|cut off"),
    ],
)
def test_files_that_are_no_weights_are_named_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        weights.read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_truncated_safetensors_file_is_measured(tmp_path: Path) -> None:
    save_file(make_state(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-100])
    sizes = f"{len(whole) - 100:,} of {len(whole):,} bytes"
    with pytest.raises(UserError, match=sizes):
        weights.read(tmp_path / "w.safetensors")


def save_index(directory: Path, shard: str) -> None:
    index = {"weight_map": {"w": shard, "b": shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


HALF, ONE = b"half of a file", torch.ones(1)
UNREADABLE = [  # what is read, what lies there, and what is said
    (
        "w.safetensors",
        lambda d: (d / "w.safetensors.part").write_bytes(HALF),
        r"only w\.safetensors\.part is there.*download again",
    ),
    ("w.part", lambda d: (d / "w.part").write_bytes(HALF), "has not finished"),
    (".", lambda d: (d / "w.part").write_bytes(HALF), r"has not finished \(w\.part\)"),
    (".", lambda d: (d / "notes").touch(), "holds no weights: expected one of"),
    ("w.pht", lambda d: (d / "w.pth").touch(), r"w\.pht is missing.*did you mean w\.pth"),
    ("w.pth", lambda d: torch.save([1, 2], d / "w.pth"), "holds no state dict"),
    (
        "w.pth",
        lambda d: torch.save({"args": argparse.Namespace(lr=1)}, d / "w.pth"),
        r"argparse\.Namespace.*save the plain state dict",
    ),
    (".", lambda d: save_index(d, "../elsewhere.safetensors"), "not a plain file name"),
    (
        ".",
        lambda d: (save_index(d, "a.safetensors"), save_file({"w": ONE}, d / "a.safetensors")),
        r"1 tensors that its shards lack \(b\)",
    ),
]


@pytest.mark.parametrize(("name", "prepare", "said"), UNREADABLE)
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, name, prepare, said) -> None:
    prepare(tmp_path)
    with pytest.raises(UserError, match=said):
        weights.read(tmp_path / name)


def test_a_prefix_that_no_tensor_has_is_named(tmp_path: Path) -> None:
    save_file(make_state(), tmp_path / "model.safetensors")
    assert_same(weights.read(tmp_path), make_state())
    with pytest.raises(UserError, match=r"no tensor whose name starts with 'nose\.'"):
        weights.read(tmp_path, "nose.")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the 1 shards .* \(model-00001-of-00002\.saf"):
        weights.read(tmp_path, "eye.")
    with pytest.raises(UserError, match=r"lacks 1 of the 2 shards that model\.safetensors\.index"):
        weights.read(tmp_path)
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is missing") as found:
        weights.read(shard)
    assert "did you mean" not in str(found.value)  # the other shard is no other spelling


def make_model() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(3, 2), "norm": nn.BatchNorm1d(2)})


def test_load_strict_fills_real_and_meta_models_alike() -> None:
    torch.manual_seed(1)
    source = make_model()
    state = {f"net.{name}": t for name, t in source.state_dict().items()} | {"other": torch.ones(1)}
    with torch.device("meta"):
        on_meta = make_model()
    for model in (make_model(), on_meta):
        weights.load_strict(model, state, prefix="net.")
        assert_same(model.state_dict(), source.state_dict())


def test_load_strict_shares_memory_with_the_state_on_meta_and_keeps_the_dtype() -> None:
    state = make_model().state_dict()
    state["a.bias"] = state["a.bias"].to(torch.bfloat16)
    with torch.device("meta"):
        model = make_model()
    weights.load_strict(model, state)
    assert model.state_dict()["a.weight"].data_ptr() == state["a.weight"].data_ptr()
    assert model.state_dict()["a.bias"].dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_load_strict_lists_every_kind_of_difference_and_changes_nothing() -> None:
    model = make_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = {name: t + 1 for name, t in before.items()}
    del state["norm.weight"], state["norm.bias"], state["norm.running_mean"], state["a.bias"]
    state |= {"stranger": torch.ones(1), "a.weight": torch.ones(2, 9)}
    with pytest.raises(UserError) as error:
        weights.load_strict(model, state, source="face.pth")
    message = str(error.value)
    assert message.startswith("face.pth does not fit ModuleDict: ")
    assert "4 missing (a.bias, norm.bias, norm.running_mean, …)" in message
    assert "1 unexpected (stranger)" in message
    assert "a.weight is (2, 9) in the file, (2, 3) in the model" in message
    assert_same(model.state_dict(), before)


def test_load_strict_refuses_to_leave_a_buffer_without_values() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
        model.register_buffer("positions", torch.arange(4), persistent=False)
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    with pytest.raises(ValueError, match="positions"):
        weights.load_strict(model, state)


def test_strip_wrappers_removes_what_ddp_and_compile_add() -> None:
    state = {"module._orig_mod.a.weight": torch.ones(1), "module.b._orig_mod.c": torch.ones(1)}
    assert list(weights.strip_wrappers(state)) == ["a.weight", "b.c"]
