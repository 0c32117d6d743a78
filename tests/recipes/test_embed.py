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
    root = tmp_path / "faces"
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
            down_w, down_b, up_w, up_b, scale = (
                state[f"vit.encoder.layers.{index}.mlp.adapter.{part}"]
                for part in (
                    *("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias"),
                    "scale",
                )
            )
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


def test_rows_are_those_of_a_direct_computation_in_the_order_of_the_names(
    folder, tower, checkpoint, tmp_path
):
    outcome = run(folder, checkpoint, tmp_path / "e.npy", "--batch-size", 2)
    assert outcome.code == 0, outcome.text
    rows, listed = result(tmp_path / "e.npy")
    assert listed["files"] == sorted(NAMES)
    assert rows.dtype == np.float32 and listed["shape"] == list(rows.shape) == [5, 64]
    upright, mirrored = by_hand(tower, [folder / name for name in sorted(NAMES)])
    expected = functional.normalize(upright + mirrored).numpy()
    assert np.abs(rows - expected).max() < 1e-5
    assert np.abs(rows[1:] - expected[:-1]).max() > 1e-3  # or the order would not show

    plain = run(folder, checkpoint, tmp_path / "plain.npy", "--no-flip", "--no-normalise")
    assert plain.code == 0
    rows, listed = result(tmp_path / "plain.npy")
    assert (listed["flip"], listed["normalised"]) == (False, False)
    assert np.abs(rows - upright.numpy()).max() < 1e-4


def test_pictures_of_every_form_are_read_as_training_reads_them(folder, checkpoint, tmp_path):
    upright = Image.open(folder / "z.png").convert("RGB")
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn to the right
    turned.save(folder / "z-turned.png", exif=exif)
    upright.convert("RGBA").save(folder / "z-transparent.png")
    upright.convert("L").save(folder / "z-grey.png")
    upright.convert("L").convert("RGB").save(folder / "z-grey-rgb.png")
    assert run(folder, checkpoint, tmp_path / "e.npy").code == 0
    rows, listed = result(tmp_path / "e.npy")
    row = dict(zip(listed["files"], rows, strict=True))
    assert np.allclose(row["z-turned.png"], row["z.png"], atol=1e-6)
    assert np.allclose(row["z-transparent.png"], row["z.png"], atol=1e-6)
    assert np.allclose(row["z-grey.png"], row["z-grey-rgb.png"], atol=1e-6)
    assert not np.allclose(row["z-grey.png"], row["z.png"], atol=1e-3)


def test_the_pages_five_lines_compare_two_faces(checkpoint, tmp_path, monkeypatch, capsys):
    for number in (1, 2):
        (tmp_path / "faces" / "anna").mkdir(parents=True, exist_ok=True)
        write_face(tmp_path / "faces" / "anna" / f"{number}.jpg", number)
    assert run(tmp_path / "faces", checkpoint, tmp_path / "embeddings.npy").code == 0
    page = (ROOT / "face_distill" / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    one, two = np.load("embeddings.npy").astype(np.float64)
    assert float(capsys.readouterr().out) == pytest.approx(2 - 2 * one @ two, abs=1e-5)


def test_the_end_names_the_nearest_other_image(folder, checkpoint, tmp_path):
    shutil.copy(folder / "z.png", folder / "twin.png")
    outcome = run(folder, checkpoint, tmp_path / "e.npy")
    assert "nearest to twin.png: z.png (cosine 1.000)" in outcome.text
    assert f"6 x 64 embeddings in {tmp_path}/e.npy" in outcome.last_line
    assert "WARNING" not in outcome.text


def test_broken_images_are_named_and_left_out(folder, checkpoint, tmp_path):
    assert run(folder, checkpoint, tmp_path / "whole.npy").code == 0
    (folder / "a b" / "1.jpg").write_bytes(b"")
    (folder / "b.png").write_bytes(b"<html>not found</html>")
    (folder / "z.jpeg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    outcome = run(folder, checkpoint, tmp_path / "e.npy", "--workers", 0)
    assert outcome.code == 0
    rows, listed = result(tmp_path / "e.npy")
    assert listed["files"] == sorted(NAMES)
    assert [entry["file"] for entry in listed["skipped"]] == ["a b/1.jpg", "b.png", "z.jpeg"]
    reasons = [entry["reason"] for entry in listed["skipped"]]
    assert reasons[:2] == [
        "the file is empty",
        "no picture: it begins with '<html>not found</html>'",
    ]
    assert outcome.text.count("skipped b.png: no picture: it begins with '<html>") == 1
    assert "3 images skipped" in outcome.last_line
    assert np.allclose(rows, np.load(tmp_path / "whole.npy"), atol=1e-6)


def test_many_broken_images_are_counted_in_the_log_and_named_in_the_file(
    folder, checkpoint, tmp_path
):
    for number in range(12):
        write_face(folder / f"more{number}.png", number)
        (folder / f"broken{number:02d}.jpg").write_bytes(b"")
    outcome = run(folder, checkpoint, tmp_path / "e.npy")
    assert outcome.code == 0
    assert len(result(tmp_path / "e.npy")[1]["skipped"]) == 12
    assert outcome.text.count("the file is empty") == 10 and "skipped 2 more" in outcome.text


def test_a_folder_of_mostly_broken_images_is_refused_and_the_old_result_stays(
    folder, checkpoint, tmp_path
):
    out = tmp_path / "e.npy"
    assert run(folder, checkpoint, out).code == 0
    before = out.read_bytes(), out.with_suffix(".json").read_bytes()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(b"x")
    outcome = run(folder, checkpoint, out)
    assert outcome.code == 2
    assert f"6 of 11 images in {folder} could not be read" in outcome.last_line
    assert (out.read_bytes(), out.with_suffix(".json").read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "e.npy", "faces"]


def test_images_of_other_sizes_are_resized_and_one_line_says_how_many(folder, checkpoint, tmp_path):
    write_face(folder / "big.png", 0, side=300)
    outcome = run(folder, checkpoint, tmp_path / "e.npy")
    assert outcome.code == 0
    assert outcome.text.count("1 of 6 images were no aligned crops of 112 x 112") == 1
    rows, listed = result(tmp_path / "e.npy")
    assert listed["resized"] == 1
    big, same = (rows[listed["files"].index(name)] for name in ("big.png", "z.png"))
    assert big @ same > 0.99


def test_another_input_size_of_the_run_is_kept(folder, tower, tmp_path):
    checkpoint = write_run(tmp_path / "run64", tower, image_size=64)
    assert run(folder, checkpoint, tmp_path / "e.npy").code == 0
    student = student_of(tower, image_size=64).eval()
    assert student.image_size == 64
    pixels = [Image.open(folder / n).convert("RGB").resize((64, 64), 3) for n in sorted(NAMES)]
    levels = (np.stack([np.asarray(p) for p in pixels]) / 255 - CLIP_MEAN) / CLIP_STD
    images = torch.from_numpy(levels).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = functional.normalize(student(images)[0] + student(images.flip(-1))[0]).numpy()
    cosines = (np.load(tmp_path / "e.npy") * expected).sum(1)
    assert cosines.min() > 0.9999


def test_a_json_file_of_another_kind_is_never_replaced(folder, checkpoint, tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {}}')
    outcome = run(folder, checkpoint, tmp_path / "config.npy")
    assert outcome.code == 2 and "is something else" in outcome.last_line
    assert read_json(tmp_path / "config.json") == {"settings": {}}
    for _ in range(2):  # its own may be
        assert run(folder, checkpoint, tmp_path / "new" / "e.npy").code == 0


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
    shutil.copytree(tower, tmp_path / "demo" / "weights" / "blip2_weights")
    assert run_here(embed.main, [folder, "--demo"]).code == 0
    assert result(tmp_path / "demo" / "embeddings.npy")[0].shape == (5, 64)
