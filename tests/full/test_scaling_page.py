"""The memory that shared/docs/scaling.md names is what --estimate says."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.harness import ROOT, environment

pytestmark = [pytest.mark.full, pytest.mark.limit(300)]

FACES, GARMENTS = "face_distill/train_distill.py", "arcface/run_scripts/run_arcface.py"
STAGE_1, STAGE_2 = "lavic/src/knowledge_distillation.py", "lavic/src/prompt_tuning.py"
COMMANDS = (  # one for each row of the table, in its order
    [FACES, "--nproc", "1"],
    [FACES, "--nproc", "4"],
    [FACES, "--nproc", "4", "--amp", "bf16"],
    [FACES, "--nproc", "4", "--gradient-checkpointing"],
    [STAGE_1, "--gradient-checkpointing", "on"],
    [STAGE_1, "--gradient-checkpointing", "off"],
    [STAGE_2, "--gradient-checkpointing", "on"],
    [STAGE_2, "--gradient-checkpointing", "off"],
    ["vasevqa/model/sft.sh"],
    ["vasevqa/model/grpo.sh"],
    ["multimodal/run_training.py"],
    [GARMENTS],
    [GARMENTS, "--amp", "bf16"],
)


def named() -> list[str]:
    """The last column of the page's table of memory, in GB."""
    page = (ROOT / "shared/docs/scaling.md").read_text(encoding="utf-8")
    return re.findall(r"^\|.*\| (\d+\.\d) GB \|$", page, re.M)


def test_every_row_has_its_command():
    assert len(named()) == len(COMMANDS)


@pytest.mark.parametrize("row", range(len(COMMANDS)), ids=lambda row: " ".join(COMMANDS[row]))
def test_the_page_says_what_estimate_says(row: int):
    script, *flags = COMMANDS[row]
    python = [] if script.endswith(".sh") else [sys.executable]
    told = subprocess.run(
        [*python, ROOT / script, *flags, "--estimate"],
        env=environment(PYTHON=sys.executable, HF_HUB_OFFLINE="1"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"in all +([\d.]+) GB", told.stdout)
    assert found, told.stdout + told.stderr
    assert float(found[1]) == pytest.approx(float(named()[row]), abs=0.06)  # one decimal
