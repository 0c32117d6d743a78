"""shared/ddp_series/README.md shows the scripts as they are, and its commands run."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.ddp_series import multigpu_profile, multigpu_torchrun, single_gpu
from tests.harness import ROOT, environment

SERIES = ROOT / "shared" / "ddp_series"
PAGE = (SERIES / "README.md").read_text(encoding="utf-8")
# How many lines a step may add to the one before, and take from it: what a reader has to take in.
STEPS = {
    ("single_gpu.py", "multigpu.py"): 40,
    ("multigpu.py", "multigpu_torchrun.py"): 80,
    ("multigpu_torchrun.py", "multinode_torchrun.py"): 15,
    ("multigpu.py", "multigpu_profile.py"): 40,
}
ELSEWHERE = (  # starts of commands that need more than this machine has
    "torchrun --standalone --nproc_per_node=gpu ",
    "torchrun --nnodes=2 ",  # on the loopback: tests/faults/test_ddp_series_faults.py
    "sbatch ",  # with a pretended SLURM: tests/shell/test_sbatch_run_sh.py
    "cd ",
    "source ",
)


def difference(before: str, after: str) -> list[str]:
    command = ["diff", "-U1", before, after]
    told = subprocess.run(command, cwd=SERIES, capture_output=True, text=True, check=False)
    assert told.returncode == 1, told.stderr
    return told.stdout.splitlines()[2:]  # without the names, which come with dates


def blocks(language: str) -> list[list[str]]:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    return [block.splitlines() for block in found]


def commands() -> list[str]:
    lines = (re.sub(r"\s+# .*", "", line) for block in blocks("bash") for line in block)
    return [line for line in lines if line]


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs diff")
def test_the_page_shows_how_each_step_differs_from_the_one_before():
    assert blocks("diff") == [difference(before, after) for before, after in STEPS]


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs diff")
@pytest.mark.parametrize(("pair", "limit"), STEPS.items(), ids=lambda value: str(value))
def test_a_step_differs_by_few_lines(pair, limit):
    changed = [line for line in difference(*pair) if line[0] in "+-"]
    assert len(changed) <= limit, "\n".join(changed)


def fields(module) -> dict[str, object]:
    return {field.name: field.default for field in dataclasses.fields(module.Config)}


def test_flags_of_the_page_are_those_of_the_scripts():
    known = fields(single_gpu) | fields(multigpu_torchrun) | fields(multigpu_profile)
    rows = re.findall(r"^\| `--(\w+)` \| `([^`]*)` \|", PAGE, re.M)
    assert rows
    for name, default in rows:
        assert str(known.pop(name)) == default, name
    assert known.keys() == {"total_epochs", "save_every", "dry_run", "processes"}


def test_links_of_the_page_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (SERIES / link).exists(), link


def test_docstrings_and_page_agree_on_how_a_script_is_typed():
    for name in {name for pair in STEPS for name in pair} - {"multinode_torchrun.py"}:
        usage = ast.get_docstring(ast.parse((SERIES / name).read_text(encoding="utf-8"))) or ""
        typed = re.findall(r"^\s*((?:python|torchrun) .*?)(?:\s{2,}#.*)?$", usage, re.M)
        assert typed, name
        assert set(typed) <= set(commands()), name


@pytest.mark.full
@pytest.mark.limit(1200)
def test_commands_of_the_page_run_as_typed(tmp_path):
    """In a directory of links to the scripts, so that what they leave is left there."""
    for path in SERIES.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "mine.txt").write_text((SERIES / "mingpt" / "text.txt").read_text()[:8000])
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    ran, left = [], set()
    for command in commands():
        if command.startswith(ELSEWHERE):
            continue
        for old in tmp_path.glob("snapshot*.pt"):
            old.unlink()
        words = shlex.split(command)
        outcome = subprocess.run(
            words,
            cwd=tmp_path,
            env=environment(PATH=path),
            capture_output=True,
            text=True,
            check=False,
        )
        assert outcome.returncode == 0, f"{command}\n{outcome.stdout}{outcome.stderr}"
        ran.append(command)
        left |= {entry.name for entry in tmp_path.iterdir() if not entry.is_symlink()}
    assert len(ran) == 11
    assert {"checkpoint.pt", "snapshot.pt", "profile", "traces", "mingpt_run"} <= left
