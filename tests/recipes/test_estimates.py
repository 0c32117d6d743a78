"""--estimate of face_distill and arcface: from settings alone; again after memory failed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arcface import memory as arcface_memory
from arcface.encoders import build_encoder
from arcface.run_scripts import run_arcface
from face_distill import memory, train_distill
from face_distill.distill.model import FaceStudent
from face_distill.train_distill import Config
from tests.harness import ROOT, run_here
from tests.unit.test_estimate import bytes_kept_on_the_cpu

TOWER = {
    "model_type": "blip_2_vision_model",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 14,
}


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """Settings with a tiny tower's config.json, and no weights, faces or features anywhere."""
    (tmp_path / "config.json").write_text(json.dumps(TOWER))
    return replace(Config(), blip_path=tmp_path, batch_size=6, adapter_layers="spread:2")


def row(plan: str, name: str) -> float:
    found = re.search(rf"^  {re.escape(name)} +([0-9.]+) GB", plan, re.M)
    assert found, plan
    return float(found[1])


def bytes_of(plan, name: str) -> int:
    return next(size for what, size, _ in plan.rows if what == name)


def student_on_the_cpu(cfg: Config) -> FaceStudent:
    from transformers import Blip2VisionConfig, Blip2VisionModel

    tower = Blip2VisionModel(Blip2VisionConfig.from_dict(TOWER)).requires_grad_(False).eval()
    return FaceStudent(tower, [0, 3], checkpointing=cfg.gradient_checkpointing)


def test_face_distill_reckons_what_a_real_pass_keeps(cfg):
    plan = memory.reckon(cfg, processes=2)
    student = student_on_the_cpu(cfg)
    images = torch.randn(3, 3, 42, 42)
    assert bytes_of(plan, "for the backward pass") == bytes_kept_on_the_cpu(
        student,
        images,
    )
    weights = sum(p.numel() for p in student.parameters()) * 4
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad) * 4
    assert bytes_of(plan, "weights") - weights <= 8 * 1000  # buffers beside the parameters
    assert bytes_of(plan, "adapters' training") == 4 * trained  # gradient, its DDP copy, 2 moments


def test_face_distill_checkpointing_keeps_less(cfg):
    less = memory.reckon(replace(cfg, gradient_checkpointing=True), 1)
    assert less.total < memory.reckon(cfg, 1).total


def test_face_distill_needs_no_file_for_an_estimate(tmp_path):
    ended = run_here(
        train_distill.main,
        ["--estimate", "--batch-size", 4, "--blip-path", tmp_path, "--data-root", tmp_path],
    )
    assert ended.code == 0, ended.text
    assert "face_distill: 4 images a process of 224 x 224" in ended.text
    assert row(ended.text, "weights") == pytest.approx(3.99, abs=0.01)  # ViT-g of BLIP-2
    assert "what helps most: --gradient-checkpointing (saves " in ended.text
    assert ended.text.count("(saves ") == 3


def test_after_an_out_of_memory_error_the_run_says_what_helps(cfg, tmp_path, monkeypatch):
    def train(_: Config) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_distill, "train", train)
    monkeypatch.setattr(train_distill, "_check_files", lambda _: None)
    words = ["--blip-path", cfg.blip_path, "--batch-size", 512, "--adapter-layers", "spread:2"]
    ended = run_here(train_distill.main, [*words, "--run-dir", tmp_path / "run"])
    assert ended.code == 1
    assert "face_distill: 512 images a process" in ended.text
    assert re.search(r"what helps most: --\S+ \S* ?\(saves ", ended.text)
    assert "OutOfMemoryError" in ended.last_line


@pytest.mark.parametrize("config", ["resnet18-arcface_demo.py"])
def test_arcface_reckons_what_a_real_pass_keeps(config, tmp_path):
    recipe = arcface_memory.recipe_of(f"config/arcface/{config}", (), tmp_path)
    plan = arcface_memory.reckon(recipe, "off", 1, tmp_path)
    encoder = build_encoder(recipe.encoder, "random", tmp_path).train()
    images = torch.randn(recipe.train.batch_size, 3, 64, 64)
    assert bytes_of(plan, "for the backward pass") == bytes_kept_on_the_cpu(encoder, images)
    parameters = sum(p.numel() for p in encoder.parameters()) * 4
    assert bytes_of(plan, "its gradients") == parameters
    assert bytes_of(plan, "its AdamW") == 2 * parameters


def test_arcface_needs_no_data_for_an_estimate():
    options = ["--cfg-options", "train_dataloader.batch_size=2"]
    ended = run_here(run_arcface.main, ["--estimate", *options])
    assert ended.code == 0, ended.text
    assert "arcface: 2 pictures a process of 448 x 448, amp off" in ended.text
    assert row(ended.text, "encoder") == pytest.approx(0.09, abs=0.01)  # 23.5 M parameters
    assert "what helps most: " in ended.text


def test_arcface_out_of_memory_names_the_setting_that_arcface_has(tmp_path, monkeypatch):
    def train(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("arcface.training.train", train)
    monkeypatch.setattr("arcface.run_settings.check_data", lambda _: [])
    words = ["--init", "random", "--data-root", tmp_path, "--run-dir", tmp_path / "run"]
    ended = run_here(run_arcface.main, words)
    assert ended.code == 1
    assert "lower train_dataloader.batch_size by --cfg-options" in ended.last_line
    assert "--batch-size" not in ended.text


def test_every_script_that_estimates_explains_a_lack_of_memory_too():
    scripts = (
        *("face_distill/train_distill.py", "arcface/run_scripts/run_arcface.py"),
        *("lavic/src/knowledge_distillation.py", "lavic/src/prompt_tuning.py"),
        *("vasevqa/filter/model.py", "multimodal/training.py"),
    )
    for script in scripts:
        assert "explained_out_of_memory(lambda" in (ROOT / script).read_text() or (
            "explained_out_of_memory(reckon)" in (ROOT / script).read_text()
        ), script
