"""The memory that the recipes' pages name is what --estimate says today."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.harness import run_here
from tests.pages import RECIPES, ROOT, tables, text_of

pytestmark = pytest.mark.slow

FACES, GARMENTS = "face_distill.train_distill", "arcface.run_scripts.run_arcface"
STAGE_1, STAGE_2 = "lavic.src.knowledge_distillation", "lavic.src.prompt_tuning"
POTS, SWIFT, THREE = "vasevqa.filter.model", "vasevqa.model.train", "multimodal.run_training"
LESS, VIT = "--gradient-checkpointing", "config/arcface/vit-b16-arcface_8xb32_inshop.py"
# Of each page the figures in their order: module and flags.
FIGURES = {
    "face_distill": (
        *(f"{FACES} --nproc 1", f"{FACES} --nproc 1 {LESS}"),
        *(f"{FACES} --nproc 4", f"{FACES} --nproc 4 --amp bf16", f"{FACES} --nproc 4 {LESS}"),
    ),
    "lavic": (
        *(f"{STAGE_1} {LESS} on", f"{STAGE_1} {LESS} off"),
        *(f"{STAGE_2} {LESS} on", f"{STAGE_2} {LESS} off"),
    ),
    "vasevqa": (POTS, f"{SWIFT} sft", f"{SWIFT} grpo"),
    "multimodal": tuple(f"{THREE} --model-size {s}" for s in ("tiny", "small", "base", "large")),
    "arcface": (
        *(GARMENTS, f"{GARMENTS} --amp bf16"),
        f"{GARMENTS} --amp fp16 --cfg-options train_dataloader.batch_size=64",
        f"{GARMENTS} --config {VIT}",
    ),
}
CHEAP = {"face_distill": 4, "lavic": 0, "vasevqa": 1, "multimodal": 0, "arcface": 0}


def stated(recipe: str) -> list[float]:
    """The page's figures, in GB: a column of sums, or a row of them."""
    found = []
    for table in tables(text_of(f"{recipe}/README.md")):
        for row in table.records:
            for column, cell in row.items():
                is_sum = column in ("In all", "Estimated at batch 8") or row.get("What") == "in all"
                if is_sum and (number := re.fullmatch(r"(\d+\.\d) GB", cell)):
                    found.append(float(number[1]))
    return found


def settings_of(script: Path) -> list[str]:
    """The words that a shell script of vasevqa passes on."""
    (block,) = re.findall(r"^arguments=\(\n(.*?)^\)", script.read_text("utf-8"), re.M | re.S)
    return [word for line in block.splitlines() for word in shlex.split(line, comments=True)]


def estimated(command: str) -> float:
    """What the program says with --estimate, in GB."""
    module, *words = command.split()
    if module == SWIFT:
        words += [*settings_of(ROOT / "vasevqa" / "model" / f"{words[0]}.sh"), "---"]
    ended = run_here(importlib.import_module(module).main, [*words, "--estimate"])
    assert ended.code == 0, ended.text
    found = re.search(r"in all +([\d.]+) GB", ended.text)
    assert found, ended.text
    return float(found[1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_figure_has_its_command(recipe: str):
    assert len(stated(recipe)) == len(FIGURES[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_page_says_what_the_estimate_says(recipe: str, monkeypatch: pytest.MonkeyPatch):
    # the advice takes more steps, and is tested elsewhere
    monkeypatch.setattr("face_distill.memory._smaller", lambda *_: {})
    cheap = CHEAP[recipe]
    assert estimated(FIGURES[recipe][cheap]) == pytest.approx(stated(recipe)[cheap], abs=0.06)


@pytest.mark.full
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_page_says_it_in_every_row(recipe: str):
    for command, figure in zip(FIGURES[recipe], stated(recipe), strict=True):
        assert estimated(command) == pytest.approx(figure, abs=0.06), command
