"""shared/ddp_series/README.md tells what the scripts are, and its commands run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pages
from tests.harness import ROOT, environment

SERIES = ROOT / "shared" / "ddp_series"
PAGE = (SERIES / "README.md").read_text(encoding="utf-8")
BEFORE = {  # what each script is compared with
    "multigpu.py": "single_gpu.py",
    "multigpu_torchrun.py": "multigpu.py",
    "multinode_torchrun.py": "multigpu_torchrun.py",
    "multigpu_profile.py": "multigpu.py",
}
ELSEWHERE = (  # starts of commands that need more than this machine has
    "torchrun --standalone --nproc_per_node=gpu ",
    "torchrun --nnodes=2 ",  # on the loopback: tests/faults/test_ddp_series_faults.py
    "sbatch ",  # with a pretended SLURM: tests/shell/test_sbatch_run_sh.py
    "cd ",
    "source ",
)


def commands() -> list[str]:
    return pages.commands(PAGE)


def changed(before: str, after: str) -> str:
    """How many lines `diff` takes away and adds: "-15 +41"; the table of the page has it."""
    told = subprocess.run(
        ["diff", before, after], cwd=SERIES, capture_output=True, text=True, check=False
    )
    assert told.returncode == 1, told.stderr
    marks = [line[0] for line in told.stdout.splitlines()]
    return f"-{marks.count('<')} +{marks.count('>')}"


def test_the_page_says_how_long_each_script_is_and_what_it_adds():
    (table,) = (t for t in pages.tables(PAGE) if t.head[0] == "Step")
    rows = {pages.spans(row["Script"])[0]: row for row in table.records}
    assert rows.keys() == {"single_gpu.py", *BEFORE}
    for script, row in rows.items():
        lines = len((SERIES / script).read_text(encoding="utf-8").splitlines())
        assert row["Lines"] == str(lines), script
        expected = changed(BEFORE[script], script) if script in BEFORE else ""
        assert row["Against the step before"] == expected, script


def arguments(script: str) -> dict[str, str]:
    """{argument: default} as the script's calls of add_argument have them."""
    found = {}
    for node in ast.walk(ast.parse((SERIES / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "add":
            names = [ast.literal_eval(word) for word in node.args]
            dashed = [names[0].replace("_", "-")] if names[0].startswith("--") else []
            assert set(names) == {names[0], *dashed}, script
            defaults = [ast.literal_eval(k.value) for k in node.keywords if k.arg == "default"]
            found[names[0]] = str(defaults[0]) if defaults else ""
    return found


def test_arguments_of_the_page_are_those_of_the_scripts():
    known: dict[str, str] = {}
    for script in ("single_gpu.py", *BEFORE):
        known |= arguments(script)
    (table,) = (t for t in pages.tables(PAGE) if t.head[0] == "Flag")
    stated = {row["Flag"].strip("`"): row["Default"].strip("`") for row in table.records}
    assert stated == known


def test_docstrings_and_page_agree_on_how_a_script_is_typed():
    for name in {"single_gpu.py", *BEFORE} - {"multinode_torchrun.py"}:
        usage = ast.get_docstring(ast.parse((SERIES / name).read_text(encoding="utf-8"))) or ""
        typed = re.findall(r"^\s*((?:python|torchrun) .*?)(?:\s{2,}#.*)?$", usage, re.M)
        assert typed, name
        assert set(typed) <= set(commands()), name


@pytest.mark.full
@pytest.mark.limit(1200)
def test_commands_of_the_page_run_as_typed(tmp_path):
    """In a directory of links to the scripts, so that what they leave is left there."""
    for path in SERIES.iterdir():
        if not path.name.startswith(".") and path.suffix != ".pt":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "mine.txt").write_text((SERIES / "mingpt" / "text.txt").read_text()[:8000])
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    ran, left = [], set()
    for command in commands():
        if command.startswith(ELSEWHERE):
            continue
        (tmp_path / "snapshot.pt").unlink(missing_ok=True)
        outcome = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment(PATH=path), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert outcome.returncode == 0, f"{command}\n{outcome.stdout}{outcome.stderr}"
        ran.append(command)
        left |= {entry.name for entry in tmp_path.iterdir() if not entry.is_symlink()}
    assert len(ran) == 10
    assert {"checkpoint.pt", "snapshot.pt", "profile", "traces", "gpt_snapshot.pt"} <= left
