"""A trained student out of its files."""

import json
from pathlib import Path

import pytest
import torch

from face_distill.demo_data import demo
from face_distill.distill import student_files
from face_distill.distill.model import (
    FaceEmbedder,
    FaceStudent,
    adapter_shape,
    open_student,
    trainable_state,
)
from shared.errors import UserError
from shared.files import write_json
from tests.face_students import BEST, LAYERS, student_of, write_run


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tower")
    demo.write_tower(directory, 0)
    return directory


@pytest.fixture
def faces() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (3, 3, 112, 112), dtype=torch.uint8, generator=generator)


NAME = "vit.encoder.layers.{}.mlp.adapter.down_proj.weight"


@pytest.mark.parametrize(
    "state",
    [
        {"vit.post_layernorm.weight": torch.zeros(4)},
        {NAME.format(1): torch.tensor(1.0)},
        {NAME.format(1): torch.zeros(2, 4), NAME.format(2): torch.zeros(3, 4)},
    ],
    ids=["no adapter", "no matrix", "two widths"],
)
def test_a_state_without_regular_adapters_is_refused_by_the_name_of_its_file(state):
    with pytest.raises(UserError, match=r"some\.pth holds no face adapters"):
        adapter_shape(state, Path("some.pth"))


@pytest.mark.parametrize("full", [False, True], ids=["trained parts", "whole student"])
def test_an_opened_student_is_the_saved_one_frozen_and_without_its_head(
    tower, tmp_path, full, faces
):
    path = write_run(tmp_path, tower, full=full)
    opened, saved = open_student(tower, path), student_of(tower).eval()
    assert opened.head is None and not opened.training
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    own = opened.state_dict()
    assert own and all(torch.equal(own[n], t) for n, t in saved.state_dict().items() if n in own)
    assert saved.state_dict().keys() - own.keys() == {"head.weight"}


def test_bf16_stays_near_float32_and_comes_back_as_float32(tower, tmp_path, faces):
    path = write_run(tmp_path, tower)
    exact = FaceEmbedder(open_student(tower, path), torch.device("cpu"))(faces)
    rough = FaceEmbedder(open_student(tower, path), torch.device("cpu"), "bf16")(faces)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert torch.nn.functional.cosine_similarity(rough, exact).min() > 0.999


def test_the_input_has_the_side_of_the_run_unless_another_is_given(tower, tmp_path, faces):
    path = write_run(tmp_path, tower, image_size=64)
    assert open_student(tower, path).image_size == 64
    assert open_student(tower, path, image_size=80).image_size == 80
    assert open_student(tower, write_run(tmp_path / "own", tower)).image_size == 112
    assert FaceEmbedder(open_student(tower, path), torch.device("cpu"))(faces).shape == (3, 64)


@pytest.mark.parametrize("size", ["112", -16, True])
def test_a_side_that_is_no_number_is_refused(tower, tmp_path, size):
    path = write_run(tmp_path, tower)
    write_json(tmp_path / "config.json", {"settings": {"image_size": size}})
    with pytest.raises(UserError, match=r"image_size .*expected a number"):
        open_student(tower, path)


def test_a_tower_with_fewer_layers_is_refused(tower, tmp_path):
    path = write_run(tmp_path, tower)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo.TOWER, "num_hidden_layers", 2)
        demo.write_tower(tmp_path / "short", 0)
    with pytest.raises(UserError, match=r"adapter in layer 2, the tower in .*short has 2: give"):
        open_student(tmp_path / "short", path)


def test_the_checkpoint_a_run_resumes_from_is_refused_with_the_file_to_give(tower, tmp_path):
    torch.save({"position": {}, "parts": {"optimizer": {}}}, tmp_path / "last.pth")
    with pytest.raises(UserError, match=rf"resumes from .*give {tmp_path}/{BEST}"):
        open_student(tower, tmp_path / "last.pth")


def test_wrapped_names_are_read_as_plain_ones(tower, tmp_path):
    state = {f"module._orig_mod.{n}": t for n, t in trainable_state(student_of(tower)).items()}
    torch.save(state, tmp_path / "wrapped.pth")
    tensors = student_files.read_trained(tmp_path / "wrapped.pth")
    assert adapter_shape(tensors, tmp_path).layers == LAYERS
    assert isinstance(open_student(tower, tmp_path / "wrapped.pth"), FaceStudent)


# --- which files are meant ------------------------------------------------------------------------


def test_a_run_directory_means_its_best_student_and_an_export_itself(tmp_path):
    run, export = tmp_path / "run", tmp_path / "export"
    for path in (run / BEST, run / "last.pth", export / "model.safetensors"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert student_files.checkpoint_at(run) == run / BEST
    assert student_files.checkpoint_at(export) == export
    assert student_files.checkpoint_at(run / "last.pth") == run / "last.pth"
    with pytest.raises(UserError, match="holds no trained student"):
        student_files.checkpoint_at(tmp_path)
    with pytest.raises(UserError, match=r"did you mean best_student_adapter_face\.pth"):
        student_files.checkpoint_at(run / "best_student_adapter.pth")


def test_the_tower_is_the_typed_one_or_the_runs_or_the_default(tmp_path):
    places = {name: tmp_path / name for name in ("typed", "stored", "default", "gone")}
    for name in ("typed", "stored", "default"):
        places[name].mkdir()
        (places[name] / "config.json").write_text("{}")
    checkpoint = tmp_path / BEST

    def found(typed: str | None, stored: str) -> Path:
        text = json.dumps({"settings": {"blip_path": str(places[stored])}})
        (tmp_path / "config.json").write_text(text)
        typed_path = places[typed] if typed else None
        return student_files.tower_of(checkpoint, typed_path, places["default"])

    assert found("typed", "stored") == places["typed"]
    assert found(None, "stored") == places["stored"]
    assert found(None, "gone") == places["default"]
    with pytest.raises(UserError, match=r"no BLIP-2 tower: .*gone/config\.json missing"):
        found("gone", "stored")
