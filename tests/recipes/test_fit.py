"""--fit: the step that is chosen stays below the limit, and is the step of the whole batch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arcface.run_scripts import run_arcface
from face_distill import train_distill
from face_distill.demo_data import demo as faces_demo
from lavic.src import knowledge_distillation, prompt_tuning
from multimodal import run_training
from shared import fit
from shared.config import parse
from shared.errors import UserError
from shared.files import read_json, read_json_lines
from tests import lavic_nano, lavic_talks, multimodal_data
from tests.arcface_nano import build_inshop, write_config
from tests.harness import Outcome, run_here, start
from tests.memory_peak import peak_of_a_step
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


def chosen(outcome: Outcome) -> list[str]:
    """The flags that --fit names."""
    found = re.search(r"--fit: .* with (--.*); to repeat it, type these flags", outcome.text)
    assert found, outcome.text
    return found[1].split(";")[0].split()


def losses(run_dir: Path, tag: str) -> list[float]:
    rows = read_json_lines(run_dir / "metrics.jsonl")
    return [row[tag] for row in rows if tag in row]


def estimated(main: Main, flags: Flags) -> float:
    """Bytes by --estimate."""
    ended = run_here(main, [*flags, "--estimate"])
    found = re.search(r"in all +([\d.]+) ([MG])B", ended.text)
    assert found, ended.text
    return float(found[1]) * {"M": MB, "G": 1000 * MB}[found[2]]


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * 10**9),
        ("8GiB", 8 * 2**30),
        ("900MB", 900 * MB),
        ("1.5 gb", 1_500 * MB),
        ("1TB", 10**12),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert fit.size_of(text) == size


@pytest.mark.parametrize(
    "text", ["12", "GB", "0GB", "-1GB", "12XB", "1e3GB", "nan GB", "", "12GBs"]
)
def test_what_is_no_size_is_refused_with_what_is(text: str) -> None:
    ended = run_here(train_distill.main, ["--fit", text, "--dry-run"])
    assert ended.code == 2, ended.text
    assert ended.last_line.startswith("--fit ") or "--fit" in ended.last_line
    assert "--fit 12GB, --fit 8GiB, --fit 900MB" in ended.last_line


# --- face_distill ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faces_demo.DemoPaths]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faces_demo, "NUM_PEOPLE", 8)
        patch.setattr(faces_demo, "TEACHER_PEOPLE", 50)
        patch.setattr(faces_demo, "PICTURES_EACH", 4)
        patch.setattr(faces_demo, "PEOPLE_A_FOLD", 2)
        patch.setattr(faces_demo, "PICTURES_OF_STRANGER", 4)
        patch.setattr(faces_demo, "PAIRS_A_FOLD", 4)
        yield faces_demo.build(tmp_path_factory.mktemp("faces"))


@pytest.fixture
def face_flags(faces: faces_demo.DemoPaths, tmp_path: Path) -> Flags:
    return [
        "--blip-path", faces.weights, "--data-root", faces.data_root, "--workers", 0,
        "--teacher-feat-dir", faces.teacher, "--batch-size", 16, "--num-classes", 8,
        "--adapter-layers", "spread:2", "--epochs", 1, "--log-every", 1,
        "--run-dir", tmp_path / "run",
    ]  # fmt: skip


def test_faces_are_computed_in_pieces_that_fit_and_give_the_same_losses(
    face_flags: Flags, tmp_path: Path
) -> None:
    fitted = [*face_flags, "--epochs", 2, "--fit", "9MB"]
    assert estimated(train_distill.main, face_flags) > 9 * MB
    assert peak_of_a_step(train_distill.main, fitted) < 9 * MB
    ended = run_here(train_distill.main, [*fitted, "--resume", "never"])
    assert ended.code == 0, ended.text
    flags = chosen(ended)
    assert flags == ["--micro-batch", "4"]
    again = [*face_flags, "--epochs", 2, "--run-dir", tmp_path / "again", *flags]
    assert run_here(train_distill.main, again).code == 0
    found = losses(tmp_path / "run", "Loss/Total")
    assert len(found) == 4 and found == losses(tmp_path / "again", "Loss/Total")


def test_a_resumed_run_may_fit_another_memory(face_flags: Flags, tmp_path: Path) -> None:
    assert run_here(train_distill.main, [*face_flags, "--fit", "9MB"]).code == 0
    more = ["--resume", tmp_path / "run", "--epochs", 2, "--fit", "6MB"]
    ended = run_here(train_distill.main, more)
    assert ended.code == 0, ended.text
    assert chosen(ended) == ["--micro-batch", "2"]
    kept = run_here(train_distill.main, ["--resume", tmp_path / "run", "--print-config"])
    assert (json.loads(kept.text)["fit"], json.loads(kept.text)["micro_batch"]) == (None, 2)


def test_what_is_typed_stays(face_flags: Flags) -> None:
    typed = [*face_flags, "--dry-run", "--fit", "10MB", "--micro-batch", 16]
    assert chosen(run_here(train_distill.main, typed)) == ["--gradient-checkpointing"]


def test_where_nothing_fits_the_smallest_is_named_and_what_else_helps(
    face_flags: Flags, tmp_path: Path
) -> None:
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


def test_alone_it_takes_what_the_smallest_gpu_has_free(
    face_flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit.device, "present_gpus", lambda: 2)
    monkeypatch.setattr(fit.device, "free_memory", lambda: [20 * MB, 9 * MB])
    ended = run_here(train_distill.main, [*face_flags, "--dry-run", "--nproc", 1, "--fit"])
    assert chosen(ended) == ["--micro-batch", "4"], ended.text
    monkeypatch.setenv("RANK", "0")  # of torchrun, whose other processes take some meanwhile
    with pytest.raises(UserError, match="type a size, for example --fit 12GB"):
        fit.first(parse(train_distill.Config, ["--fit"]), [], "")


# --- lavic ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lavic_nano.build_nano(tmp_path_factory.mktemp("products"))


def test_lavics_first_stage_accumulates_what_fits(products: Any, tmp_path: Path) -> None:
    flags = [*lavic_nano.flags_of(products, tmp_path / "run"), "--grad_accum", 2]
    fitted = [*flags, "--fit", "20MB"]  # the step of 8 pictures at once takes 25
    assert peak_of_a_step(knowledge_distillation.main, fitted) < 20 * MB
    ended = run_here(knowledge_distillation.main, [*fitted, "--dry-run"])
    assert chosen(ended) == ["--micro-batch", "2", "--gradient-checkpointing", "off"]


def test_lavics_second_stage_accumulates_what_fits(tmp_path: Path) -> None:
    flags = [*lavic_talks.nano().flags(tmp_path / "run", tmp_path / "vectors")]
    flags += ["--no-evaluate-before", "--max_length", 512, "--fit", "18MB"]  # at once: 20
    assert peak_of_a_step(prompt_tuning.main, flags) < 18 * MB
    ended = run_here(prompt_tuning.main, [*flags, "--dry-run"])
    assert chosen(ended) == ["--micro-batch", "1", "--gradient-checkpointing", "off"]


# --- multimodal -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multimodal_data.build(tmp_path_factory.mktemp("pairs")).data_root


def test_multimodal_computes_chunks_that_fit(pairs: Path, tmp_path: Path) -> None:
    flags = [
        "--data-root", pairs, "--output-dir", tmp_path / "out", "--model-size", "nano",
        "--init", "random", "--datasets", "coco", "--stage-epochs", "0/0/1", "--epochs", 1,
        "--workers", 0, "--batch-size", 8, "--gradient-accumulation-steps", 2, "--fit", "55MB",
    ]  # fmt: skip
    in_chunks = [*flags, "--no-use-checkpoint"]  # at once: 64
    assert peak_of_a_step(run_training.main, in_chunks) < 55 * MB
    ended = run_here(run_training.main, [*in_chunks, "--dry-run"])
    assert chosen(ended) == ["--micro-batch", "4"]
    # either costs a forward pass: checkpointing of the whole comes first
    assert chosen(run_here(run_training.main, [*flags, "--dry-run"])) == ["--micro-batch", "16"]


# --- arcface and the quality classifier: batch norm ties a batch together -------------------------


def test_arcface_takes_checkpointing_alone_and_says_so(tmp_path: Path) -> None:
    config = write_config(tmp_path / "nano.py")
    text = config.read_text().replace("batch_size=6", "batch_size=12")
    config.write_text(text.replace("scale=36", "scale=136").replace("size=32", "size=128"))
    flags = ["--config", config, "--data-root", build_inshop(tmp_path / "inshop")]
    flags += ["--init", "random", "--work-dir", tmp_path / "work", "--fit", "215MB"]  # plain: 224
    assert peak_of_a_step(run_arcface.main, flags) < 215 * MB
    ended = run_here(run_arcface.main, [*flags, "--dry-run"])
    assert chosen(ended) == ["--gradient-checkpointing"]
    assert "a batch is computed at once, since batch norm ties its pictures" in ended.text
    assert run_here(run_arcface.main, [*flags, "--fit", "100MB"]).code == 2


@pytest.fixture
def quality_flags(tmp_path: Path) -> Flags:
    return [
        "--data_dir", write_quality_set(tmp_path / "images"), "--output_dir", tmp_path / "out",
        "--batch_size", 16, "--workers", 0, "--pretrained", "none", "--device", "cpu",
        "--resume", "never", "--num_epochs", 1, "--log-every", 1,
    ]  # fmt: skip


def test_the_classifier_takes_checkpointing_alone_and_says_so(quality_flags: Flags) -> None:
    flags = [*quality_flags, "--arch", "resnet18", "--image_size", 160]
    flags += ["--fit", "345MB"]  # plain: 357
    assert peak_of_a_step(quality.main, flags) < 345 * MB
    ended = run_here(quality.main, [*flags, "--dry-run"])
    assert chosen(ended) == ["--gradient-checkpointing"]
    assert "a batch is computed at once, since batch norm ties its pictures" in ended.text


@pytest.mark.slow
@pytest.mark.serial
def test_every_process_takes_the_launchers_choice_and_the_same_steps(
    quality_flags: Flags, tmp_path: Path
) -> None:
    small = [
        *quality_flags,
        "--arch",
        "resnet10",
        "--image_size",
        192,
        "--nproc",
        2,
        "--num_epochs",
        2,
    ]
    plans = [memory_plan("resnet10", 192, 8, 2, again=again).total for again in (False, True)]
    limit = (sum(plans) / 2 + 600 * MB) / (1 - fit.SPARE)  # in processes of its own: CUDA's share
    fitted = ["--fit", f"{limit / MB:.1f}MB", "--run-dir", tmp_path / "fitted"]
    for more in (fitted, ["--run-dir", tmp_path / "plain"]):
        with start([quality.__file__, *small, *more]) as running:
            ended = running.finish()
        assert ended.code == 0, ended.text
        if more is fitted:
            assert chosen(ended) == ["--gradient-checkpointing"]
            assert ended.text.count("--fit: ") == 1
    assert read_json(tmp_path / "fitted" / "config.json")["settings"]["gradient_checkpointing"]
    found, plain = (losses(tmp_path / name, "loss") for name in ("fitted", "plain"))
    assert len(found) > 1 and found == pytest.approx(plain, rel=1e-6)
