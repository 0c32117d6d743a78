"""The built-in demo of the model half: questions about drawn vases, and a tiny Qwen2.5-VL.

    <root>/data/video_training_dataset.json, grpo_video_dataset.json, questions.json
    <root>/data/vases/<UUID>_<view>_ac001001.jpg
    <root>/weights/tiny-qwen2.5-vl/          a checkpoint in the real layout
    <root>/runs/                             what training writes

No vase of questions.json is trained on. Generator and seed stay as they are: training is tuned to
the data, never the data to the training.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shared.build_once import build_once
from shared.files import write_atomic, write_json

log = logging.getLogger(__name__)

VERSION = 2  # of what is drawn, written and taught; another number rebuilds
NUM_TRAIN, NUM_GRPO, NUM_TEST = 60, 12, 40  # vases
NUM_PICTURED = 600  # vases that the tiny model has learnt to see from
SIZE = 112  # pixels a side: sixteen tokens
_TRAIN, _GRPO, _TEST, _PICTURED = range(4)  # one stream of vases each
_PROMPT = Path(__file__).resolve().parents[1] / "model" / "prompt.txt"


class DemoPaths(NamedTuple):
    """Where a finished demo lies."""

    root: Path
    data: Path  # the questions and their pictures
    train: Path  # rows for SFT
    grpo: Path  # rows for GRPO
    questions: Path  # rows to evaluate with, about vases that nothing was trained on
    pictures: Path
    model: Path  # the tiny Qwen2.5-VL
    runs: Path  # what training writes
    merged: Path  # what merging writes


def paths_below(root: Path) -> DemoPaths:
    """The places of a demo below `root`."""
    data, runs = root / "data", root / "runs"
    return DemoPaths(
        *(root, data, data / "video_training_dataset.json", data / "grpo_video_dataset.json"),
        *(data / "questions.json", data / "vases", root / "weights" / "tiny-qwen2.5-vl"),
        *(runs, runs / "checkpoint-merged"),
    )


def build(root: Path, seed: int = 0) -> DemoPaths:
    """The demo below `root`, made now unless it is there, of this version and seed."""
    paths = paths_below(Path(root))
    parts = [paths.train, paths.grpo, paths.questions, paths.pictures, paths.model]
    made = {"version": VERSION, "seed": seed}
    build_once(paths.root / "demo.json", made, parts, lambda: _build(paths, seed))
    return paths


def _build(paths: DemoPaths, seed: int) -> None:
    log.info("making the demo in %s: vases, questions, a tiny Qwen2.5-VL", paths.root)
    paths.pictures.mkdir(parents=True, exist_ok=True)
    _write_rows(paths, seed)
    _write_model(paths.model, seed)


def flags(script: str, paths: DemoPaths) -> list[str]:
    """What `./sft.sh --demo` and `./grpo.sh --demo` type for the user."""
    small = {
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "torch_dtype": "float32",
        "max_length": 512,
        "split_dataset_ratio": 0,
        "gradient_accumulation_steps": 1,
        "logging_steps": 5,
        "save_steps": 1000,
        "gradient_checkpointing": "false",
    }
    own: dict[str, Any] = {
        "sft": {
            "model": paths.model,
            "dataset": paths.train,
            "output_dir": paths.runs / "7B",
            "num_train_epochs": 3,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "use_logits_to_keep": "true",
        },
        "grpo": {
            "model": paths.merged,
            "dataset": paths.grpo,
            "output_dir": paths.runs / "GRPO",
            "num_train_epochs": 2,
            "per_device_train_batch_size": 32,
            "num_generations": 8,
            "max_completion_length": 12,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "system": "You are a helpful assistant.",  # as in fine-tuning
        },
    }[script]
    return [word for name, value in {**small, **own}.items() for word in (f"--{name}", str(value))]


def texts() -> list[str]:
    """What the tiny model's tokenizer learns its words from."""
    from vasevqa.demo_data import questions
    from vasevqa.demo_data.vases import make_vases

    asked = list(questions.QUESTIONS.values())
    vases = make_vases(300, seed=0)
    answers = [answer for vase in vases for answer in vase.attributes.values()]
    described = [text for lesson in questions.lessons(vases, seed=0) for text in lesson[:2]]
    frame = "system user assistant You are a helpful assistant. <think></think><answer></answer>"
    prompt = _PROMPT.read_text(encoding="utf-8")
    return [*asked * 3, *answers, *described, frame, prompt] * 2


def _write_rows(paths: DemoPaths, seed: int) -> None:
    from vasevqa.demo_data.questions import make_rows, with_solutions

    for path, stream, count in (
        (paths.train, _TRAIN, NUM_TRAIN),
        (paths.grpo, _GRPO, NUM_GRPO),
        (paths.questions, _TEST, NUM_TEST),
    ):
        vases = _vases(count, stream, seed)
        rows = list(make_rows(vases, Path(paths.pictures.name), seed=stream + 10 * seed))
        _draw(rows, vases, paths.data)
        write_json(path, with_solutions(rows) if stream == _GRPO else rows, durable=False)


def _draw(rows: Sequence[dict[str, Any]], vases: Sequence[Any], directory: Path) -> None:
    from vasevqa.demo_data.vases import VIEWS, render, to_jpeg

    wanted = {name for row in rows for name in row["images"]}
    for vase in vases:
        for view in VIEWS:
            path = Path("vases") / vase.file_name(view)
            if str(path) in wanted:
                content = to_jpeg(render(vase, view, size=SIZE))
                write_atomic(directory / path, _writer(content), durable=False)


def _writer(content: bytes) -> Any:
    return lambda stream: (stream.write(content), None)[1]


def _write_model(directory: Path, seed: int) -> None:
    from vasevqa.demo_data import qwen
    from vasevqa.demo_data.questions import lessons
    from vasevqa.demo_data.vases import VIEWS, render

    rng = random.Random(f"views {seed}")
    vases = _vases(NUM_PICTURED, _PICTURED, seed)
    pictures = [render(vase, rng.choice(VIEWS), size=SIZE) for vase in vases]
    model, processor = qwen.build(directory, texts(), seed)
    loss = qwen.teach(model, processor, list(lessons(vases, seed)), pictures, seed)
    log.info("the tiny model has learnt to see, loss %.2f", loss)
    model.save_pretrained(directory)


def _vases(count: int, stream: int, seed: int) -> list[Any]:
    from vasevqa.demo_data.vases import make_vases

    return make_vases(count, seed=10 * seed + stream + 1000)
