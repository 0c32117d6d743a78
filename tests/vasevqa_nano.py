"""A tiny Qwen2.5-VL, a few vases with questions, and runs of vasevqa/model's scripts on them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.files import read_json_lines
from tests.harness import ROOT, Outcome, Running, start
from vasevqa.demo_data import demo, questions, qwen
from vasevqa.demo_data.vases import make_vases, render, to_jpeg

SCRIPTS = ROOT / "vasevqa" / "model"
SIZE = 112
# what a run of seconds needs on any machine
SMALL = {
    **{"torch_dtype": "float32", "gradient_accumulation_steps": 1, "max_length": 512},
    **{"dataloader_num_workers": 0, "dataset_num_proc": 1, "split_dataset_ratio": 0},
    **{"logging_steps": 1, "gradient_checkpointing": "false", "per_device_train_batch_size": 4},
}


class Nano:
    """Where model, rows and runs are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = root / "tiny-qwen2.5-vl"
        self.train = root / "train.json"  # 24 rows, their pictures beside the file
        self.grpo = root / "grpo.json"  # four rows
        self.plugin = root / "mine.py"  # a user's, of one bare function

    def flags(self, script: str, run_dir: str = "", **changes: Any) -> list[object]:
        """Flags of ./sft.sh and ./grpo.sh for this model and these rows."""
        own: dict[str, Any] = {
            "sft": {"model": self.model, "dataset": self.train, "output_dir": self.root / "7B"},
            "grpo": {
                "model": self.root / "checkpoint-merged",
                "dataset": self.grpo,
                "output_dir": self.root / "GRPO",
                "num_generations": 4,
                "max_completion_length": 12,
            },
        }[script]
        if run_dir:
            own["output_dir"] = self.root / run_dir
        flags = SMALL | own | changes
        return [word for name, value in flags.items() for word in (f"--{name}", value)]

    @contextmanager
    def running(self, script: str, *words: object, **env: str) -> Iterator[Running]:
        """A run of vasevqa/model/<script>.sh, typed in the root of the data."""
        variables = {
            **{"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            **{"MODELSCOPE_CACHE": str(self.root / "modelscope"), **env},
        }
        with start(words, program=[SCRIPTS / f"{script}.sh"], **variables) as running:
            yield running

    def run(self, script: str, *words: object, **env: str) -> Outcome:
        """The same, to its end."""
        with self.running(script, *words, **env) as running:
            outcome = running.finish(timeout=300)
            assert running.leaves_nothing(), outcome.text[-2000:]
            return outcome


def build(root: Path) -> Nano:
    """Model, rows and plugin below `root`; the model has been taught for a few steps."""
    nano = Nano(root)
    pictures = root / "vases"
    pictures.mkdir(parents=True)
    vases = make_vases(8, seed=7)
    rows = list(questions.make_rows(vases, Path("vases"), seed=7, each=3))
    for row in rows:
        name = Path(row["images"][0]).name
        vase = next(vase for vase in vases if name.startswith(vase.id))
        view = int(re.findall(r"_(\d)_", name)[0])
        (pictures / name).write_bytes(to_jpeg(render(vase, view, size=SIZE)))
    nano.train.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    answered = [dict(row) for row in rows[:4]]  # GRPO with the assistant's answer alone
    nano.grpo.write_text(json.dumps(answered), encoding="utf-8")
    nano.plugin.write_text(
        "def letters(responses, references):\n"
        "    return [len(set(a) & set(b)) / len(set(b)) for a, b in zip(responses, references)]\n"
    )
    model, processor = qwen.build(nano.model, demo.texts(), seed=0)
    seen = [render(vase, 1, size=SIZE) for vase in vases]
    lessons = [
        (questions.QUESTIONS[name], answer, number)
        for number, vase in enumerate(vases)
        for name, answer in vase.attributes.items()
    ]
    qwen.teach(model, processor, lessons, seen, seed=0, steps=40)
    model.save_pretrained(nano.model)
    return nano


def logged(run_dir: Path, name: str) -> dict[int, float]:
    """{step: value} of one number in swift's logging.jsonl; a resumed step's last value counts."""
    found = {}
    for line in read_json_lines(run_dir / "logging.jsonl"):
        if name in line:
            found[int(str(line["global_step/max_steps"]).split("/")[0])] = float(line[name])
    return found
