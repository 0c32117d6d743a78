"""--estimate: against the memory of real steps, without data, and after memory has failed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arcface import memory as arcface_memory
from arcface.inshop_retrieval.config import read_config
from arcface.inshop_retrieval.recipe import Overrides, without_data
from arcface.run_scripts import run_arcface
from face_distill import memory as faces_memory
from face_distill import train_distill
from face_distill.demo_data import demo as faces_demo
from lavic.src import knowledge_distillation, prompt_tuning
from lavic.src.recommend import memory as tuning_memory
from lavic.src.recommend.model import Recommender
from lavic.src.vision import caption_loss
from lavic.src.vision import memory as distillation_memory
from multimodal import run_training
from multimodal.training import memory as multimodal_memory
from shared.config import parse
from shared.memory import CUDA_CONTEXT, Plan
from tests import multimodal_data
from tests.arcface_nano import build_inshop, write_config
from tests.harness import ROOT, run_here
from tests.lavic_nano import build_nano, flags_of
from tests.lavic_talks import nano
from tests.memory_peak import peak_of_a_step
from tests.trainings import small_faces
from tests.vase_filter_nano import write_quality_set
from vasevqa.filter import model as quality
from vasevqa.filter.quality import memory_plan

Flags = list[Any]


def agrees(plan: Plan, main: Callable[..., int], flags: Flags) -> None:
    """Whether the plan is within 15 % of what the profiler saw of a step of the training itself."""
    assert plan.total - CUDA_CONTEXT == pytest.approx(peak_of_a_step(main, flags), rel=0.15)


def read(config: Any, flags: Flags) -> Any:
    """The settings that the flags mean."""
    return parse(config, [str(word) for word in flags])


# --- face_distill ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> faces_demo.DemoPaths:
    return small_faces(tmp_path_factory.mktemp("faces"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["--gradient-checkpointing"], ["--amp", "bf16"], ["--micro-batch", 4]]
)
def test_face_distill_is_estimated_within_15_percent(faces, tmp_path, more):
    flags = [
        "--blip-path", faces.weights, "--data-root", faces.data_root, "--workers", 0,
        "--teacher-feat-dir", faces.teacher, "--batch-size", 16, "--num-classes", 5,
        "--adapter-layers", "spread:2", "--run-dir", tmp_path / "run", *more,
    ]  # fmt: skip
    cfg = read(train_distill.Config, flags)
    agrees(faces_memory.plan(cfg, 1), train_distill.main, flags)


# --- lavic ----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """The last batch that a training has computed with."""

    batch: Any = None


def watched(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int) -> Seen:
    """Note argument `number` of the calls of module.name."""
    seen, original = Seen(), getattr(module, name)

    def noting(*args: Any) -> Any:
        seen.batch = args[number]
        return original(*args)

    monkeypatch.setattr(module, name, noting)
    return seen


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    return build_nano(tmp_path_factory.mktemp("products"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--gradient_checkpointing", "off"],
        ["--gradient_checkpointing", "on", "--no-reuse-prompt"],
        ["--gradient_checkpointing", "off", "--amp", "bf16"],
        ["--gradient_checkpointing", "on", "--dtype", "bfloat16"],
    ],
)
def test_lavics_first_stage_is_estimated_within_15_percent(products, tmp_path, more, monkeypatch):
    flags = [*flags_of(products, tmp_path / "out"), "--dtype", "float32", *more]
    seen = watched(monkeypatch, caption_loss, "caption_nll", 1)
    measured = peak_of_a_step(knowledge_distillation.main, flags)
    cfg = read(knowledge_distillation.Config, flags)
    values = knowledge_distillation.memory_values(cfg)
    plan = distillation_memory.plan(**values, batch=seen.batch)
    assert plan.total - CUDA_CONTEXT == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--gradient_checkpointing", "off", "--batch_size", 2, "--grad_accum", 2],
        ["--gradient_checkpointing", "on"],
        ["--gradient_checkpointing", "off", "--dtype", "bfloat16"],
    ],
)
def test_lavics_second_stage_is_estimated_within_15_percent(tmp_path, more, monkeypatch):
    flags = [*nano().flags(tmp_path / "out", tmp_path / "vectors"), "--no-evaluate-before"]
    flags += ["--dtype", "float32", *more]
    seen = watched(monkeypatch, Recommender, "forward", 1)
    measured = peak_of_a_step(prompt_tuning.main, flags)
    cfg = read(prompt_tuning.Config, flags)
    plan = tuning_memory.plan(**prompt_tuning.memory_values(cfg), batch=seen.batch)
    assert plan.total - CUDA_CONTEXT == pytest.approx(measured, rel=0.15)


# --- vasevqa's quality classifier, multimodal, arcface --------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--amp", "bf16"]])
def test_the_quality_classifier_is_estimated_within_15_percent(tmp_path, more):
    flags = [
        "--data_dir", write_quality_set(tmp_path / "images"), "--output_dir", tmp_path / "out",
        "--arch", "resnet18", "--batch_size", 16, "--image_size", 160, "--workers", 0,
        "--pretrained", "none", "--device", "cpu", *more,
    ]  # fmt: skip
    cfg = read(quality.Config, flags)
    plan = memory_plan(cfg.arch, cfg.image_size, cfg.batch_size, 1, cfg.run.amp)
    agrees(plan, quality.main, flags)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return multimodal_data.build(tmp_path_factory.mktemp("pairs")).data_root


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--datasets", "coco", "--no-use-amp", "--no-use-checkpoint"],
        ["--datasets", "coco", "--amp", "bf16", "--use-checkpoint"],
        ["--datasets", "clotho", "--amp", "bf16", "--no-use-checkpoint"],
        ["--datasets", "clotho", "--no-use-amp", "--loss", "sigmoid"],
    ],
)
def test_multimodal_is_estimated_within_15_percent(pairs, tmp_path, more):
    flags = [
        "--data-root", pairs, "--output-dir", tmp_path / "out", "--model-size", "nano",
        "--init", "random",
        "--batch-size", 8, "--gradient-accumulation-steps", 2, "--clip-seconds", 1,
        "--stage-epochs", "0/0/1", "--workers", 0, *more,
    ]  # fmt: skip
    cfg = read(run_training.Config, flags)
    cfg = replace(cfg, use_amp=cfg.use_amp and "--no-use-amp" not in more)
    agrees(multimodal_memory.plan(run_training.step_of(cfg), 1), run_training.main, flags)


def arcface_recipe(config, options):
    return without_data(read_config(config), Overrides(options), config.parent).recipe


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("model.head.sample_rate=0.5",)])
def test_arcface_is_estimated_within_15_percent(tmp_path, more):
    config = write_config(tmp_path / "nano.py")
    text = config.read_text().replace("batch_size=6", "batch_size=12")
    config.write_text(text.replace("scale=36", "scale=136").replace("size=32", "size=128"))
    recipe = arcface_recipe(config, more)
    flags = ["--config", config, "--data-root", build_inshop(tmp_path / "inshop")]
    flags += ["--work-dir", tmp_path / "work", *(["--cfg-options", *more] if more else [])]
    agrees(arcface_memory.plan(recipe, "off", 1), run_arcface.main, flags)


def test_a_sampled_head_keeps_the_moments_of_all_classes(tmp_path):
    options = ("model.head.num_classes=40000", "model.head.sample_rate=0.1")
    config = write_config(tmp_path / "nano.py")
    plans = {
        processes: arcface_memory.plan(arcface_recipe(config, options), "off", processes)
        for processes in (1, 4)
    }
    rows = {what: size for what, size, _ in plans[1].rows}
    encoder, centres = 4 * 11_176_512, 4 * 512 * 40_000
    assert rows["weights"] == pytest.approx(encoder + centres, rel=0.01)
    assert rows["optimizer"] == pytest.approx(encoder + centres, rel=0.01)  # SGD's momentum
    assert rows["activations"] > 2 * centres / 10  # the drawn rows are copies
    shared = {what: size for what, size, _ in plans[4].rows}
    assert shared["weights"] == pytest.approx(encoder + centres / 4, rel=0.01)
    assert shared["DDP"] == encoder  # whose centres stay outside DDP


# --- without data, and after a failure ------------------------------------------------------------


def row(text: str, name: str) -> float:
    found = re.search(rf"^  {re.escape(name)} +([0-9.]+) GB", text, re.M)
    assert found, text
    return float(found[1])


@pytest.mark.slow
def test_face_distill_needs_no_file_for_an_estimate(tmp_path):
    ended = run_here(
        train_distill.main,
        ["--estimate", "--batch-size", 4, "--blip-path", tmp_path, "--data-root", tmp_path],
    )
    assert ended.code == 0, ended.text
    assert "face_distill: 4 images a process of 224 x 224" in ended.text
    head, adapters = 12_000 * 1408, 11_922_444
    assert row(ended.text, "weights") == pytest.approx(
        4e-9 * (985.95e6 + head + adapters), abs=0.01
    )
    assert row(ended.text, "optimizer") == pytest.approx(8e-9 * (head + adapters), abs=0.01)
    assert "what helps most: --micro-batch 1 (saves " in ended.text
    assert ended.text.count("(saves ") == 3


def test_a_tower_of_other_patches_gets_no_advice_that_it_cannot_follow(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower = {"model_type": "blip_2_vision_model", "num_attention_heads": 2, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(tower | {"image_size": 960, "patch_size": 96}))
    words = [
        "--estimate",
        "--batch-size",
        512,
        "--blip-path",
        tmp_path,
        "--adapter-layers",
        "last:1",
    ]
    ended = run_here(train_distill.main, words)
    assert ended.code == 0 and "(saves " in ended.text
    assert "--image-size 112" not in ended.text and "--batch-size 256" in ended.text


def test_arcface_needs_no_data_for_an_estimate():
    options = ["--cfg-options", "train_dataloader.batch_size=2"]
    ended = run_here(run_arcface.main, ["--estimate", *options])
    assert ended.code == 0, ended.text
    assert "arcface: 2 pictures a process of 448 x 448, amp off" in ended.text
    assert row(ended.text, "weights") == pytest.approx(0.13, abs=0.01)  # 23.5 M, 3,997 x 2048
    assert "what helps most: " in ended.text


def test_after_an_out_of_memory_error_the_run_says_what_helps(faces, tmp_path, monkeypatch):
    def train(_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_distill, "train", train)
    monkeypatch.setattr(train_distill, "_check_files", lambda _: None)
    words = ["--blip-path", faces.weights, "--batch-size", 512, "--adapter-layers", "spread:2"]
    ended = run_here(train_distill.main, [*words, "--run-dir", tmp_path / "run"])
    assert ended.code == 1
    assert "face_distill: 512 images a process" in ended.text
    advice = ended.text[ended.text.index("what helps most") :]
    assert advice.index("--micro-batch 128") < advice.index("--batch-size 256")
    assert re.search(r"what helps most: --\S+ \S* ?\(saves ", ended.text)
    assert "OutOfMemoryError" in ended.last_line


def test_arcface_out_of_memory_names_the_setting_that_arcface_has(tmp_path, monkeypatch):
    def train(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(run_arcface, "train", train)
    words = [
        "--init",
        "random",
        "--data-root",
        build_inshop(tmp_path),
        "--run-dir",
        tmp_path / "run",
    ]
    ended = run_here(run_arcface.main, words)
    assert ended.code == 1
    assert "lower train_dataloader.batch_size by --cfg-options" in ended.last_line
    assert "--batch-size" not in ended.text


def test_every_script_that_estimates_explains_a_lack_of_memory_too():
    scripts = (
        *("face_distill/train_distill.py", "arcface/run_scripts/run_arcface.py"),
        *("lavic/src/knowledge_distillation.py", "lavic/src/prompt_tuning.py"),
        *("vasevqa/filter/model.py", "multimodal/run_training.py"),
    )
    for script in scripts:
        text = (ROOT / script).read_text()
        assert re.search(r"explained_out_of_memory\((lambda|estimate)", text), script
