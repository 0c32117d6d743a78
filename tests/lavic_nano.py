"""The lavic demo at nano size: its formats and checkpoint, of a model that has learnt nothing."""

import multiprocessing
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lavic.demo_data import demo, lessons, sight
from shared.launch import launch
from tests.harness import PROBE, free_port

NUM_VALID = 6


def build_nano(root: Path) -> demo.DemoPaths:
    """A copy of the one that a process makes: the language model is random."""
    shutil.copytree(_made().name, root, dirs_exist_ok=True)
    return demo.DemoPaths(root)


@cache
def _made() -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory(prefix="lavic-nano-")
    with pytest.MonkeyPatch.context() as patch:
        for module, sizes in UNTAUGHT.items():
            for name, value in sizes.items():
                patch.setattr(module, name, value)
        paths = demo.build(Path(made.name))
    lines = paths.val_data.read_text(encoding="utf-8").splitlines(keepends=True)
    paths.val_data.write_text("".join(lines[:NUM_VALID]), encoding="utf-8")
    return made


def _draw(model: Any, _make: object) -> None:
    """Weights of unit gain: what stands at the pictures' places changes what is said."""
    core = model.model.language_model
    for weight in (p for p in (*core.parameters(), model.lm_head.weight) if p.dim() == 2):
        torch.nn.init.normal_(weight, 0, weight.shape[1] ** -0.5)


UNTAUGHT: dict[Any, dict[str, Any]] = {lessons: {"teach": _draw}, sight: {"STEPS": 0}}


def flags_of(paths: demo.DemoPaths, run_dir: Path) -> list[object]:
    """Flags of a stage 1 of 20 samples, 4 a step, 2 epochs, on the CPU."""
    return [
        "--model_name", paths.weights,
        "--train_data", paths.train_data, "--train_images_dir", paths.train_images,
        "--val_data", paths.val_data, "--val_images_dir", paths.valid_images,
        "--max_samples", 20, "--batch_size", 4, "--num_epochs", 2, "--lr", 1e-3,
        "--num_workers", 0, "--log_every", 1, "--output_dir", run_dir,
    ]  # fmt: skip


def in_two_processes(main: Any, words: list[object]) -> list[int | None]:
    """The exit codes of the two ranks of a run: forks of this process, as torchrun starts them."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks = [fork.Process(target=_be_rank, args=(rank, port, main, words)) for rank in range(2)]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(100)
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.exitcode for rank in ranks]


def _be_rank(rank: int, port: int, main: Any, words: list[object]) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        os.environ[name] = str(value)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    sys.argv = [str(PROBE), *map(str, words)]
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    launch(main)
