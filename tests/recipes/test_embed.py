"""A folder of faces through embed.py: rows, their order, and what users keep in folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import Blip2VisionModel

from face_distill import embed
from face_distill.demo_data import demo
from face_distill.distill.images import CLIP_MEAN, CLIP_STD
from face_distill.distill.model import trainable_state
from shared.files import read_json, write_json
from tests.face_students import LAYERS, student_of, write_run
from tests.harness import ROOT, Outcome, run_here

NAMES = ["z.png", "a b/2.jpg", "a b/10.jpg", "张三/脸 1.PNG", "张三/deep/er/x.bmp"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tower")
    demo.write_tower(directory, 0)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tower, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), tower)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five aligned faces of different looks."""
    return write_faces(tmp_path / "faces")


def write_faces(root: Path) -> Path:
    for seed, name in enumerate(NAMES):
        write_face(root / name, seed)
    return root


def write_face(path: Path, seed: int, side: int = 112) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path)


def run(folder: Path, checkpoint: Path, out: Path, *extra: object) -> Outcome:
    return run_here(embed.main, [folder, "--checkpoint", checkpoint, "--out", out, *extra])


def result(out: Path) -> tuple[np.ndarray, dict]:
    return np.load(out), read_json(out.with_suffix(".json"))


def test_an_adapter_that_an_earlier_version_exported_embeds_as_its_checkpoint(
    tower, checkpoint, folder, tmp_path
):
    adapter = tmp_path / "face_adapter"
    adapter.mkdir()
    save_file(trainable_state(student_of(tower)), adapter / "model.safetensors")
    facts = {"schema": 1, "kind": "face_adapter", "embedding_dim": 64, "image_size": 112}
    write_json(adapter / "config.json", facts)
    for name, student in (("a", checkpoint), ("b", adapter)):
        outcome = run(folder, student, tmp_path / f"{name}.npy", "--blip-path", tower)
        assert outcome.code == 0, outcome.text
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def by_hand(tower: Path, files: list[Path]) -> tuple[Tensor, Tensor]:
    """Class tokens of files and of their mirror images, from the library's own tower with hooks."""
    vit = Blip2VisionModel.from_pretrained(tower, key_mapping={r"^vision_model\.": ""}).eval()
    state = student_of(tower).state_dict()

    def add(index: int):
        def hook(_mlp: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            parts = (
                "down_proj.weight",
                "down_proj.bias",
                "up_proj.weight",
                "up_proj.bias",
                "scale",
            )
            name = f"vit.encoder.layers.{index}.mlp.adapter"
            down_w, down_b, up_w, up_b, scale = (state[f"{name}.{part}"] for part in parts)
            inner = functional.gelu(inputs[0] @ down_w.T + down_b)
            return output + scale * (inner @ up_w.T + up_b)

        return hook

    for index in LAYERS:
        vit.encoder.layers[index].mlp.register_forward_hook(add(index))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])
    levels = (pixels / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    with torch.no_grad():
        images = torch.from_numpy(levels).float().permute(0, 3, 1, 2)
        return vit(images).last_hidden_state[:, 0], vit(images.flip(-1)).last_hidden_state[:, 0]


@pytest.fixture(scope="module")
def gallery(checkpoint, tmp_path_factory) -> tuple[Outcome, dict[str, np.ndarray], dict, Path]:
    """All that users keep in a folder, half of it broken: what a run says, its rows, its .json."""
    root = write_faces(tmp_path_factory.mktemp("gallery") / "faces")
    upright = Image.open(root / "z.png").convert("RGB")
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn to the right
    turned.save(root / "z-turned.png", exif=exif)
    upright.convert("RGBA").save(root / "z-transparent.png")
    upright.convert("L").save(root / "z-grey.png")
    upright.convert("L").convert("RGB").save(root / "z-grey-rgb.png")
    shutil.copy(root / "z.png", root / "0 twin.png")
    write_face(root / "big.png", 0, side=300)
    (root / "b.png").write_bytes(b"<html>not found</html>")
    for number in range(10):
        (root / f"broken{number}.jpg").write_bytes(b"")
    out = root.parent / "e.npy"
    outcome = run(root, checkpoint, out, "--batch-size", 2)
    assert outcome.code == 0, outcome.text
    rows, listed = result(out)
    return outcome, dict(zip(listed["files"], rows, strict=True)), listed, root


def test_rows_are_those_of_a_direct_computation_in_the_order_of_the_names(
    gallery, folder, tower, checkpoint, tmp_path
):
    _, row, listed, root = gallery
    assert listed["files"] == sorted(listed["files"]) and listed["shape"] == [11, 64]
    upright, mirrored = by_hand(tower, [root / name for name in NAMES])
    expected = functional.normalize(upright + mirrored).numpy()
    found = np.stack([row[name] for name in NAMES])
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found[1:] - expected[:-1]).max() > 1e-3  # or the order would not show

    plain = run(folder, checkpoint, tmp_path / "e.npy", "--no-flip", "--no-normalise")
    assert plain.code == 0, plain.text
    rows, listed = result(tmp_path / "e.npy")
    assert (listed["flip"], listed["normalised"]) == (False, False)
    order = [NAMES.index(name) for name in listed["files"]]
    assert np.abs(rows - upright.numpy()[order]).max() < 1e-4


def test_pictures_of_every_form_are_read_as_training_reads_them(gallery):
    outcome, row, listed, _ = gallery
    assert np.allclose(row["z-turned.png"], row["z.png"], atol=1e-6)
    assert np.allclose(row["z-transparent.png"], row["z.png"], atol=1e-6)
    assert np.allclose(row["z-grey.png"], row["z-grey-rgb.png"], atol=1e-6)
    assert not np.allclose(row["z-grey.png"], row["z.png"], atol=1e-3)
    assert outcome.text.count("1 of 11 images were no aligned crops of 112 x 112") == 1
    assert listed["resized"] == 1
    assert row["big.png"] @ row["z.png"] > 0.99


def test_broken_images_are_named_and_left_out(gallery):
    """A half of them may be; the log names ten, the file all."""
    outcome, _, listed, root = gallery
    skipped = [(entry["file"], entry["reason"]) for entry in listed["skipped"]]
    assert skipped[0] == ("b.png", "no picture: it begins with '<html>not found</html>'")
    assert skipped[1:] == [(f"broken{number}.jpg", "the file is empty") for number in range(10)]
    assert outcome.text.count("skipped b.png: no picture: it begins with '<html>") == 1
    assert outcome.text.count("the file is empty") == 9 and "skipped 1 more" in outcome.text
    assert f"11 x 64 embeddings in {root.parent}/e.npy" in outcome.last_line
    assert "11 images skipped" in outcome.last_line
    assert "nearest to 0 twin.png: z" in outcome.text and "(cosine 1.000)" in outcome.text


def test_the_pages_five_lines_compare_two_faces(checkpoint, tmp_path, monkeypatch, capsys):
    for number in (1, 2):
        write_face(tmp_path / "faces" / "anna" / f"{number}.jpg", number)
    assert run(tmp_path / "faces", checkpoint, tmp_path / "embeddings.npy").code == 0
    page = (ROOT / "face_distill" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    one, two = np.load("embeddings.npy").astype(np.float64)
    assert float(capsys.readouterr().out) == pytest.approx(2 - 2 * one @ two, abs=1e-5)


def test_a_folder_of_mostly_broken_images_is_refused_and_the_old_result_stays(
    folder, checkpoint, tmp_path
):
    out = tmp_path / "e.npy"
    out.write_bytes(b"of an earlier run")
    out.with_suffix(".json").write_text('{"files": []}')
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(b"x")
    outcome = run(folder, checkpoint, out)
    assert outcome.code == 2
    assert f"6 of 11 images in {folder} could not be read" in outcome.last_line
    assert out.read_bytes() == b"of an earlier run"
    assert out.with_suffix(".json").read_text() == '{"files": []}'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "e.npy", "faces"]


def test_a_json_file_of_another_kind_is_never_replaced(folder, checkpoint, tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {}}')
    outcome = run(folder, checkpoint, tmp_path / "config.npy")
    assert outcome.code == 2 and "is something else" in outcome.last_line
    assert read_json(tmp_path / "config.json") == {"settings": {}}


def test_a_diverged_student_is_refused(folder, tower, checkpoint, tmp_path):
    state = torch.load(checkpoint)
    state["vit.encoder.layers.0.mlp.adapter.scale"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    outcome = run(folder, tmp_path / "nan.pth", tmp_path / "e.npy", "--blip-path", tower)
    assert outcome.code == 2 and "not finite" in outcome.last_line
    assert not (tmp_path / "e.npy").exists()


def test_the_demo_uses_its_own_student_and_tower(folder, tower, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "PROJECT_ROOT", tmp_path)
    outcome = run_here(embed.main, [folder, "--demo"])
    assert outcome.code == 2 and "type ./train.sh --demo first" in outcome.last_line
    write_run(tmp_path / "demo" / "runs" / "checkpoints", tower)
    (tmp_path / "demo" / "weights").mkdir()
    (tmp_path / "demo" / "weights" / "blip2_weights").symlink_to(tower)
    assert run_here(embed.main, [folder, "--demo"]).code == 0
    assert result(tmp_path / "demo" / "embeddings.npy")[0].shape == (5, 64)
