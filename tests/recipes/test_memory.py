"""The memory of a step: --estimate against real steps, --fit, and what is said after a failure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
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
from shared import fit
from shared.config import parse
from shared.errors import UserError
from shared.files import read_json, read_json_lines
from shared.memory import Plan
from tests import lavic_nano, lavic_talks, multimodal_data
from tests.arcface_nano import build_inshop, write_config
from tests.harness import Outcome, run_here, start
from tests.memory_peak import Peak, peak_of_a_step
from tests.trainings import small_faces
from tests.vase_filter_nano import write_quality_set
from vasevqa.filter import model as quality
from vasevqa.filter.quality import memory_plan

MB = 10**6
Main = Callable[[list[str]], int]
Flags = list[Any]


@pytest.fixture(autouse=True)
def no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits below are those of tensors alone, as small models on the CPU have them."""
    monkeypatch.setattr("shared.memory.CUDA_CONTEXT", 0)


def agrees(plan: Plan, num_bytes: int) -> None:
    """Whether the plan is within 15 % of what the profiler saw of a step of the training itself."""
    assert plan.total == pytest.approx(num_bytes, rel=0.15)


def read(config: Any, flags: Flags) -> Any:
    """The settings that the flags mean."""
    return parse(config, [str(word) for word in flags])


def chosen(outcome: Outcome | Peak) -> list[str]:
    """The flags that --fit names."""
    found = re.search(r"--fit: .* with (--.*); to repeat it, type these flags", outcome.text)
    assert found, outcome.text
    return found[1].split(";")[0].split()


def fits(main: Main, flags: Flags, limit: int, *, rel: float | None = 0.15) -> Peak:
    """What a step of the training takes with --fit so many MB: less, and what was estimated.

    rel: how near the estimate is to it; None where it is of other batches than the first.
    """
    peak = peak_of_a_step(main, [*flags, "--fit", f"{limit}MB"])
    assert peak.num_bytes < limit * MB
    found = re.search(r"--fit: ([\d.]+) MB of", peak.text)
    assert found, peak.text
    assert rel is None or float(found[1]) * MB == pytest.approx(peak.num_bytes, rel=rel)
    return peak


def losses(run_dir: Path, tag: str) -> list[float]:
    rows = read_json_lines(run_dir / "metrics.jsonl")
    return [row[tag] for row in rows if tag in row]


def estimated(main: Main, flags: Flags) -> float:
    """Bytes by --estimate."""
    ended = run_here(main, [*flags, "--estimate"])
    found = re.search(r"in all +([\d.]+) ([MG])B", ended.text)
    assert found, ended.text
    return float(found[1]) * {"M": MB, "G": 1000 * MB}[found[2]]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> faces_demo.DemoPaths:
    return small_faces(tmp_path_factory.mktemp("faces"), NUM_PEOPLE=8, TEACHER_PEOPLE=50)


@pytest.fixture
def face_flags(faces: faces_demo.DemoPaths, tmp_path: Path) -> Flags:
    return [
        "--blip-path", faces.weights, "--data-root", faces.data_root, "--workers", 0,
        "--teacher-feat-dir", faces.teacher, "--batch-size", 16, "--num-classes", 8,
        "--adapter-layers", "spread:2", "--epochs", 1, "--log-every", 1,
        "--run-dir", tmp_path / "run",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lavic_nano.build_nano(tmp_path_factory.mktemp("products"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multimodal_data.build(tmp_path_factory.mktemp("pairs")).data_root


def large_arcface(directory: Path) -> Flags:
    """Flags of a step whose activations are more than its weights."""
    config = write_config(directory / "nano.py")
    text = config.read_text().replace("batch_size=6", "batch_size=12")
    config.write_text(text.replace("scale=36", "scale=136").replace("size=32", "size=128"))
    data = build_inshop(directory / "inshop")
    return ["--config", config, "--data-root", data, "--work-dir", directory / "work"]


@pytest.fixture
def quality_flags(tmp_path: Path) -> Flags:
    return [
        "--data_dir", write_quality_set(tmp_path / "images"), "--output_dir", tmp_path / "out",
        "--batch_size", 16, "--workers", 0, "--pretrained", "none", "--device", "cpu",
        "--resume", "never", "--num_epochs", 2, "--log-every", 1,
    ]  # fmt: skip


# --- an estimate beside the memory of a real step -------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["--amp", "bf16"], pytest.param(["--gradient-checkpointing"], marks=pytest.mark.full)]
)
def test_face_distill_is_estimated_within_15_percent(face_flags, more):
    flags = [*face_flags, "--epochs", 2, *more]
    plan = faces_memory.plan(read(train_distill.Config, flags), 1)
    agrees(plan, peak_of_a_step(train_distill.main, flags).num_bytes)


def last_batch(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int) -> Flags:
    """Argument `number` of the last call of module.name, in a list."""
    seen, original = [None], getattr(module, name)

    def noting(*args: Any) -> Any:
        seen[0] = args[number]
        return original(*args)

    monkeypatch.setattr(module, name, noting)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--gradient_checkpointing", "off"],
        ["--gradient_checkpointing", "on", "--dtype", "bfloat16"],
        pytest.param(
            ["--gradient_checkpointing", "off", "--no-reuse-prompt", "--amp", "bf16"],
            marks=pytest.mark.full,
        ),
    ],
)
def test_lavics_first_stage_is_estimated_within_15_percent(products, tmp_path, more, monkeypatch):
    flags = [*lavic_nano.flags_of(products, tmp_path / "out"), "--dtype", "float32", *more]
    seen = last_batch(monkeypatch, caption_loss, "caption_nll", 1)
    measured = peak_of_a_step(knowledge_distillation.main, flags).num_bytes
    values = knowledge_distillation.memory_values(read(knowledge_distillation.Config, flags))
    agrees(distillation_memory.plan(**values, batch=seen[0]), measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--gradient_checkpointing", "on"],
        pytest.param(
            ["--gradient_checkpointing", "off", "--dtype", "bfloat16", "--batch_size", 2],
            marks=pytest.mark.full,
        ),
    ],
)
def test_lavics_second_stage_is_estimated_within_15_percent(tmp_path, more, monkeypatch):
    flags = [*lavic_talks.nano().flags(tmp_path / "out", tmp_path / "vectors")]
    flags += ["--no-evaluate-before", "--dtype", "float32", *more]
    seen = last_batch(monkeypatch, Recommender, "forward", 1)
    measured = peak_of_a_step(prompt_tuning.main, flags).num_bytes
    values = prompt_tuning.memory_values(read(prompt_tuning.Config, flags))
    agrees(tuning_memory.plan(**values, batch=seen[0]), measured)


@pytest.mark.slow
def test_the_quality_classifier_is_estimated_within_15_percent(quality_flags):
    flags = [*quality_flags, "--arch", "resnet18", "--image_size", 160, "--amp", "bf16"]
    plan = memory_plan("resnet18", 160, 16, 1, "bf16")
    agrees(plan, peak_of_a_step(quality.main, flags).num_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(
            ["--datasets", "coco", "--amp", "bf16", "--use-checkpoint"], marks=pytest.mark.full
        ),
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
    plan = multimodal_memory.plan(run_training.step_of(cfg), 1)
    agrees(plan, peak_of_a_step(run_training.main, flags).num_bytes)


def arcface_recipe(config, options):
    return without_data(read_config(config), Overrides(options), config.parent).recipe


@pytest.mark.slow
def test_arcface_with_a_sampled_head_is_estimated_within_15_percent(tmp_path):
    flags, sampled = large_arcface(tmp_path), "model.head.sample_rate=0.5"
    plan = arcface_memory.plan(arcface_recipe(flags[1], (sampled,)), "off", 1)
    agrees(plan, peak_of_a_step(run_arcface.main, [*flags, "--cfg-options", sampled]).num_bytes)


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


@pytest.mark.full  # test_readme_memory.py has the sum of its table
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


def test_every_script_that_estimates_explains_a_lack_of_memory_too():
    mains = (train_distill, run_arcface, knowledge_distillation, prompt_tuning, quality)
    for module in (*mains, run_training):
        text = Path(module.__file__).read_text()
        assert re.search(r"explained_out_of_memory\((lambda|estimate)", text), module


# --- --fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GB", 12 * 10**9), ("8GiB", 8 * 2**30), ("1.5 gb", 1_500 * MB), ("1TB", 10**12)],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert fit.size_of(text) == size


@pytest.mark.parametrize("text", ["12", "0GB", "12XB", "1e3GB", ""])
def test_what_is_no_size_is_refused_with_what_is(text: str) -> None:
    ended = run_here(train_distill.main, ["--fit", text, "--dry-run"])
    assert ended.code == 2, ended.text
    assert "--fit 12GB, --fit 8GiB, --fit 900MB" in ended.last_line


def test_faces_are_computed_in_pieces_that_fit_and_give_the_same_losses(face_flags, tmp_path):
    assert estimated(train_distill.main, face_flags) > 9 * MB
    assert chosen(fits(train_distill.main, face_flags, 9)) == ["--micro-batch", "4"]
    ended = run_here(train_distill.main, [*face_flags, "--fit", "9MB", "--resume", "never"])
    assert ended.code == 0, ended.text
    pieces = [*face_flags, "--run-dir", tmp_path / "again", *chosen(ended)]
    assert run_here(train_distill.main, pieces).code == 0
    found = losses(tmp_path / "run", "Loss/Total")
    assert len(found) == 2 and found == losses(tmp_path / "again", "Loss/Total")


def test_a_resumed_run_may_fit_another_memory(face_flags, tmp_path):
    assert run_here(train_distill.main, [*face_flags, "--micro-batch", 4]).code == 0
    more = ["--resume", tmp_path / "run", "--epochs", 2, "--fit", "6MB"]
    ended = run_here(train_distill.main, more)
    assert ended.code == 0, ended.text
    assert chosen(ended) == ["--micro-batch", "2"]
    kept = run_here(train_distill.main, ["--resume", tmp_path / "run", "--print-config"])
    assert (json.loads(kept.text)["fit"], json.loads(kept.text)["micro_batch"]) == (None, 2)


def test_what_is_typed_stays(face_flags: Flags) -> None:
    typed = [*face_flags, "--dry-run", "--fit", "10MB", "--micro-batch", 16]
    assert chosen(run_here(train_distill.main, typed)) == ["--gradient-checkpointing"]


def test_where_nothing_fits_the_smallest_is_named_and_what_else_helps(face_flags, tmp_path):
    ended = run_here(train_distill.main, [*face_flags, "--fit", "3MB"])
    assert ended.code == 2
    smallest = r"the smallest is 4.\d+ MB, with --gradient-checkpointing --micro-batch 1"
    assert re.search(smallest, ended.last_line), ended.text
    assert "--amp auto, --image-size" in ended.last_line
    assert not (tmp_path / "run").exists()


def test_bf16_is_chosen_only_where_amp_auto_is_typed(face_flags: Flags) -> None:
    words = [*face_flags, "--dry-run", "--fit", "12MB", "--micro-batch", 16]
    ended = run_here(train_distill.main, [*words, "--amp", "auto"])
    assert chosen(ended) == ["--amp", "bf16"]
    assert chosen(run_here(train_distill.main, words)) == ["--gradient-checkpointing"]


def test_without_a_gpu_a_size_has_to_be_typed(face_flags: Flags) -> None:
    ended = run_here(train_distill.main, [*face_flags, "--fit", "--device", "cpu"])
    assert ended.code == 2
    assert "type a size, for example --fit 12GB" in ended.last_line


def test_alone_it_takes_what_the_smallest_gpu_has_free(face_flags, monkeypatch):
    monkeypatch.setattr(fit.device, "present_gpus", lambda: 2)
    monkeypatch.setattr(fit.device, "free_memory", lambda: [20 * MB, 9 * MB])
    ended = run_here(train_distill.main, [*face_flags, "--dry-run", "--nproc", 1, "--fit"])
    assert chosen(ended) == ["--micro-batch", "4"], ended.text
    monkeypatch.setenv("RANK", "0")  # of torchrun, whose other processes take some meanwhile
    with pytest.raises(UserError, match="type a size, for example --fit 12GB"):
        fit.first(parse(train_distill.Config, ["--fit"]), [], "")


def test_lavics_first_stage_accumulates_what_fits(products: Any, tmp_path: Path) -> None:
    flags = [*lavic_nano.flags_of(products, tmp_path / "run"), "--grad_accum", 2]
    peak = fits(knowledge_distillation.main, flags, 20, rel=None)  # of 8 pictures at once: 25
    assert chosen(peak) == ["--micro-batch", "2", "--gradient-checkpointing", "off"]


def test_lavics_second_stage_accumulates_what_fits(tmp_path: Path) -> None:
    flags = [*lavic_talks.nano().flags(tmp_path / "run", tmp_path / "vectors")]
    flags += ["--no-evaluate-before", "--max_length", 512]
    peak = fits(prompt_tuning.main, flags, 18, rel=None)  # at once: 20
    assert chosen(peak) == ["--micro-batch", "1", "--gradient-checkpointing", "off"]


def test_multimodal_computes_chunks_that_fit(pairs: Path, tmp_path: Path) -> None:
    flags = [
        "--data-root", pairs, "--output-dir", tmp_path / "out", "--model-size", "nano",
        "--init", "random", "--datasets", "coco", "--stage-epochs", "0/0/1", "--epochs", 1,
        "--workers", 0, "--batch-size", 8, "--gradient-accumulation-steps", 2,
    ]  # fmt: skip
    in_chunks = fits(run_training.main, [*flags, "--no-use-checkpoint"], 55)  # at once: 64
    assert chosen(in_chunks) == ["--micro-batch", "4"]
    # either costs a forward pass: checkpointing of the whole comes first
    ended = run_here(run_training.main, [*flags, "--fit", "55MB", "--dry-run"])
    assert chosen(ended) == ["--micro-batch", "16"]


def test_arcface_takes_checkpointing_alone_and_says_so(tmp_path: Path) -> None:
    """Batch norm ties a batch together."""
    flags = [*large_arcface(tmp_path), "--init", "random"]
    peak = fits(run_arcface.main, flags, 215)  # plain: 224
    assert chosen(peak) == ["--gradient-checkpointing"]
    assert "a batch is computed at once, since batch norm ties its pictures" in peak.text
    assert run_here(run_arcface.main, [*flags, "--fit", "100MB"]).code == 2


@pytest.mark.slow
@pytest.mark.serial
def test_every_process_takes_the_launchers_choice(quality_flags, tmp_path):
    plans = [memory_plan("resnet10", 192, 8, 2, again=again).total for again in (False, True)]
    limit = (sum(plans) / 2 + 600 * MB) / (1 - fit.SPARE)  # in processes of its own: CUDA's share
    words = [
        "--arch",
        "resnet10",
        "--image_size",
        192,
        "--nproc",
        2,
        "--fit",
        f"{limit / MB:.1f}MB",
    ]
    with start(
        [quality.__file__, *quality_flags, *words, "--run-dir", tmp_path / "run"]
    ) as running:
        ended = running.finish()
    assert ended.code == 0, ended.text
    assert chosen(ended) == ["--gradient-checkpointing"]
    assert ended.text.count("--fit: ") == 1
    assert read_json(tmp_path / "run" / "config.json")["settings"]["gradient_checkpointing"]
    assert len(losses(tmp_path / "run", "loss")) > 1
