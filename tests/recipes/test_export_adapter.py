"""A trained student exported, published and opened again."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch.nn import functional

from face_distill import demo, embed, export_adapter, exported
from face_distill.FaceDataset import decode
from face_distill.model import trainable_state
from face_distill.trained import FaceEmbedder, open_student
from shared import weights
from shared.files import read_json, write_json
from tests.face_students import BOTTLENECK, CLASSES, LAYERS, student_of, write_run
from tests.harness import ROOT, Outcome, run_here


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tower")
    demo.write_tower(directory, 0)
    return directory


@pytest.fixture
def checkpoint(tower, tmp_path) -> Path:
    return write_run(tmp_path / "checkpoints", tower)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "my_adapter"


def run(checkpoint: Path, out: Path, *extra: object) -> Outcome:
    return run_here(export_adapter.main, ["--checkpoint", checkpoint, "--out", out, *extra])


def done(*words: object) -> Path:
    outcome = run(*words)  # type: ignore[arg-type]
    assert outcome.code == 0, outcome.text
    return words[1]  # type: ignore[return-value]


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["trained parts", "whole student"])
def test_the_export_holds_the_trained_parts_bit_for_bit_and_opens_again(tower, tmp_path, out, full):
    checkpoint = write_run(tmp_path / "checkpoints", tower, full=full)
    done(checkpoint, out)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip
    expected = trainable_state(student_of(tower))
    assert same_tensors(weights.read(out), expected)
    opened, direct = open_student(tower, out), open_student(tower, checkpoint)
    assert same_tensors(opened.state_dict(), direct.state_dict())


def test_the_file_says_that_its_tensors_are_pytorchs(checkpoint, out):
    from safetensors import safe_open

    done(checkpoint, out)
    with safe_open(str(out / "model.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_without_head_leaves_the_centres_out_and_says_so(tower, checkpoint, out):
    done(checkpoint, out, "--without-head")
    expected = trainable_state(student_of(tower))
    assert expected.keys() - weights.read(out).keys() == {"head.weight"}
    assert read_json(out / "config.json")["head"] is None
    assert "head.weight" not in (out / "README.md").read_text()
    assert open_student(tower, out).image_size == 112


def test_an_exported_adapter_embeds_as_its_checkpoint_does(tower, checkpoint, out, tmp_path):
    faces = tmp_path / "faces"
    faces.mkdir()
    for number in range(2):
        Image.fromarray(noise(number)).save(faces / f"{number}.png")
    done(checkpoint, out)
    for name, source in (("a", checkpoint), ("b", out)):
        words = [faces, "--checkpoint", source, "--blip-path", tower]
        outcome = run_here(embed.main, [*words, "--out", tmp_path / f"{name}.npy"])
        assert outcome.code == 0, outcome.text
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def noise(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((112, 112), Image.Resampling.BICUBIC))


# --- config.json and the card ---------------------------------------------------------------------


def test_config_json_says_what_loading_needs_and_where_it_comes_from(checkpoint, out):
    import hashlib

    done(checkpoint, out)
    written = read_json(out / "config.json")
    assert written["adapter"] == {"layers": LAYERS, "bottleneck": BOTTLENECK}
    assert (written["embedding_dim"], written["image_size"]) == (64, 112)
    assert written["head"] == {"classes": CLASSES, "arc_scale": 16.0, "arc_margin": 0.2}
    assert written["base_model"] == {
        "name": None, "hidden_size": 64, "num_hidden_layers": 4, "image_size": 112,
        "patch_size": 16,
    }  # fmt: skip
    assert written["source"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert written["training"]["lr"] == 5e-3
    assert written["verification"] == {"pairs": "lfw.bin", "before": 0.5125, "after": 0.8375}


def test_the_input_size_of_the_run_travels_with_the_export(tower, tmp_path, out):
    done(write_run(tmp_path / "checkpoints", tower, image_size=64), out)
    assert open_student(tower, out).image_size == 64


def test_nothing_written_names_a_folder_of_this_machine(checkpoint, out, tmp_path):
    done(checkpoint, out)
    for name in ("config.json", "README.md"):
        text = (out / name).read_text()
        assert str(tmp_path) not in text and "/home/someone" not in text


def test_the_card_has_the_hubs_front_matter_settings_results_and_limits(checkpoint, out):
    done(checkpoint, out)
    card = ModelCard((out / "README.md").read_text())
    assert card.data.license == "unknown" and "face-recognition" in card.data.tags
    assert card.data.base_model is None  # a tower that nobody knows
    assert card.text.lstrip().startswith("# my_adapter")
    assert "| `lr` | 0.005 |" in card.text
    assert "`lfw.bin`: 0.5125 untrained, 0.8375 trained" in card.text
    assert "biometric" in card.text and "research only" in card.text


def test_the_documented_tower_is_named_as_the_base_model(tmp_path):
    vision = {"hidden_size": 1408, "num_hidden_layers": 39, "image_size": 224, "patch_size": 14}
    opt = {"model_type": "opt", "hidden_size": 2560, "num_hidden_layers": 32}
    write_json(tmp_path / "config.json", {"vision_config": vision, "text_config": opt})
    base = exported.base_model(tmp_path)
    assert base == {"name": "Salesforce/blip2-opt-2.7b", **vision}
    write_json(
        tmp_path / "config.json",
        {"vision_config": vision, "text_config": opt | {"hidden_size": 4096}},
    )
    assert exported.base_model(tmp_path) == {"name": None, **vision}
    content = {
        "base_model": base, "adapter": {"layers": [0], "bottleneck": 352}, "image_size": 224,
        "embedding_dim": 1408, "head": None, "training": {}, "verification": None,
    }  # fmt: skip
    card = ModelCard(exported.model_card(content, "x"))
    assert card.data.base_model == "Salesforce/blip2-opt-2.7b"
    assert card.data.to_dict()["base_model_relation"] == "adapter"


@pytest.mark.slow
def test_the_cards_python_runs_as_written(tower, checkpoint, tmp_path):
    recipe = tmp_path / "face_distill"
    recipe.mkdir()
    done(checkpoint, recipe / "my_adapter")
    shutil.copytree(tower, recipe / "blip2_weights")
    for number, name in enumerate("ab"):
        Image.fromarray(noise(number)).save(tmp_path / f"{name}.jpg")
    card = (recipe / "my_adapter" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    shown = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    faces = torch.stack([decode((tmp_path / f"{name}.jpg").read_bytes()) for name in "ab"])
    a, b = functional.normalize(
        FaceEmbedder(open_student(tower, checkpoint), torch.device("cpu"))(faces)
    )
    assert shown.stdout == f"cosine similarity {a @ b:.3f}\n"


def test_the_results_are_those_of_the_best_student_alone(checkpoint, out):
    other = checkpoint.with_name("student_adapter_face_epoch_5.pth")
    shutil.copy(checkpoint, other)
    done(other, out)
    assert read_json(out / "config.json")["verification"] is None
    assert "Not measured" in (out / "README.md").read_text()


HOSTILE = {
    "no settings": None,
    "no JSON": "{",
    "another form": '[{"settings": 1}]',
    "numbers that are none": '{"settings": {"arc_scale": NaN}, "identity": {"lr": Infinity}}',
    "markup": '{"settings": {}, "identity": {"a|b`": "x | y\\n# title", "l": [1], "n": null}}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_odd_settings_beside_the_checkpoint_do_no_harm(tower, checkpoint, out, case):
    settings = checkpoint.with_name("config.json")
    settings.unlink() if HOSTILE[case] is None else settings.write_text(HOSTILE[case])
    checkpoint.with_name("verification.json").write_text('{"before": NaN, "after": 1e999}')
    done(checkpoint, out, "--blip-path", tower)
    json.loads((out / "config.json").read_text(), parse_constant=pytest.fail)
    assert read_json(out / "config.json")["verification"] is None
    assert re.findall("^# .*", (out / "README.md").read_text(), re.M) == ["# my_adapter"]
    assert same_tensors(weights.read(out), trainable_state(student_of(tower)))


def test_without_a_tower_at_hand_the_export_says_less(checkpoint, out, tower, monkeypatch):
    checkpoint.with_name("config.json").unlink()
    outcome = run(checkpoint, out)
    assert outcome.code == 0 and "no BLIP-2 tower at hand" in outcome.text
    written = read_json(out / "config.json")
    assert written["base_model"] is None and written["image_size"] is None
    assert open_student(tower, out).image_size == 112


# --- what is there already ------------------------------------------------------------------------


def test_the_same_export_again_is_left_as_it_is(checkpoint, out):
    done(checkpoint, out)
    (out / "README.md").write_text("my own words")
    outcome = run(checkpoint, out)
    assert outcome.code == 0 and "holds this export already" in outcome.text
    assert (out / "README.md").read_text() == "my own words"


def test_another_export_is_moved_aside_with_one_line(checkpoint, out):
    done(checkpoint, out)
    before = (out / "model.safetensors").read_bytes()
    outcome = run(checkpoint, out, "--without-head")
    assert outcome.code == 0
    assert f"{out} held another export, which is now in {out}.1" in outcome.text
    assert (out.with_name("my_adapter.1") / "model.safetensors").read_bytes() == before
    assert "head.weight" not in weights.read(out)


def test_a_damaged_export_is_written_anew(checkpoint, out):
    done(checkpoint, out)
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-8])
    done(checkpoint, out)
    assert (out / "model.safetensors").read_bytes() == whole


def test_a_place_that_holds_something_else_is_refused(checkpoint, tmp_path):
    for place in (checkpoint.parent, checkpoint):
        outcome = run(checkpoint, place)
        assert outcome.code == 2
        assert "holds something else than an export" in outcome.last_line
    assert checkpoint.is_file()
    (tmp_path / "empty").mkdir()
    done(checkpoint, tmp_path / "empty")


# --- mistakes -------------------------------------------------------------------------------------


def test_the_checkpoint_a_run_resumes_from_is_refused_with_the_file_to_give(checkpoint, out):
    last = checkpoint.with_name("last.pth")
    torch.save({"position": {"step": 3}, "parts": {"student": {}}}, last)
    outcome = run(last, out)
    assert outcome.code == 2 and not out.exists()
    assert f"give {checkpoint}" in outcome.last_line


def test_a_run_directory_means_its_best_student_and_an_export_is_none(tower, checkpoint, out):
    done(checkpoint.parent, out)
    assert same_tensors(weights.read(out), trainable_state(student_of(tower)))
    outcome = run(out, out.with_name("other"))
    assert outcome.code == 2 and "is an export already" in outcome.last_line


def test_adapters_that_are_damaged_diverged_or_of_another_tower_are_refused(
    tower, checkpoint, out, tmp_path
):
    name = "vit.encoder.layers.2.mlp.adapter.scale"
    state = torch.load(checkpoint)
    torch.save({key: t for key, t in state.items() if key != name}, checkpoint)
    assert f"lacks 1 tensors of its adapters ({name}" in run(checkpoint, out).last_line
    torch.save(state | {name: torch.tensor(float("inf"))}, checkpoint)
    assert f"{name} is not finite" in run(checkpoint, out).last_line
    torch.save(state, checkpoint)
    vision = read_json(tower / "config.json")["vision_config"] | {"num_hidden_layers": 2}
    write_json(tmp_path / "config.json", vision)
    outcome = run(checkpoint, out, "--blip-path", tmp_path)
    assert outcome.code == 2 and not out.exists()
    assert "up to layer 2, the tower" in outcome.last_line


def test_a_dry_run_writes_nothing(checkpoint, out):
    assert run(checkpoint, out, "--dry-run").code == 0 and not out.exists()


def test_the_demo_exports_its_own_student(tower, tmp_path, monkeypatch):
    monkeypatch.setattr(export_adapter, "PROJECT_ROOT", tmp_path)
    outcome = run_here(export_adapter.main, ["--demo"])
    assert outcome.code == 2 and "type ./train.sh --demo first" in outcome.last_line
    write_run(tmp_path / "demo" / "runs" / "checkpoints", tower)
    shutil.copytree(tower, tmp_path / "demo" / "weights" / "blip2_weights")
    assert run_here(export_adapter.main, ["--demo"]).code == 0
    assert open_student(tower, tmp_path / "demo" / "face_adapter").image_size == 112


def test_a_checkpoint_that_would_run_code_is_refused(checkpoint, out):
    import pickle

    checkpoint.write_bytes(pickle.dumps(io.BytesIO))
    assert run(checkpoint, out).code == 2 and not out.exists()
