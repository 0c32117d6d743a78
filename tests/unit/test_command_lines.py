"""One table over all entry scripts: their help, what they refuse and how, and which value wins."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.settings import Setting, leaves
from tests.harness import ROOT, Outcome, run_here

SCRIPTS = [
    *(f"face_distill.{name}" for name in ("train_distill", "extract_teacher", "evaluate", "embed")),
    "face_distill.download_weight",
    *(f"lavic.src.{name}" for name in ("knowledge_distillation", "prompt_tuning", "evaluate")),
    *("lavic.src.crawl_images", "lavic.src.describe"),
    *(f"vasevqa.filter.{name}" for name in ("classifier", "clipfilter1", "clipfilter2", "model")),
    *("vasevqa.model.evaluate", "vasevqa.model.preflight", "vasevqa.run_all"),
    *(f"multimodal.{name}" for name in ("run_training", "evaluate", "embed", "run_all")),
    "multimodal.download_datasets",
    *("arcface.run_scripts.run_arcface", "arcface.evaluate", "shared.tools.fetch_model"),
]
POSITIONAL = {  # words without which a script refuses all others
    "face_distill.embed": ["faces"],
    "lavic.src.describe": ["picture.jpg"],
    "shared.tools.fetch_model": ["owner/name", "directory"],
}
PASSES_ON = {"multimodal.run_all"}  # flags that it does not know are its training's
OWN_FILES = {"multimodal.run_training", "arcface.run_scripts.run_arcface", "arcface.evaluate"}
NOT_NUMBERS = ("nan", "inf", "-inf", "1e38", str(2**70), "9" * 200_000, "[" * 5000 + "]" * 5000)
LONGEST_LINE = 300


def settings_of(script: str) -> dict[str, Setting]:
    return leaves(importlib.import_module(script).Config())


def shared_settings() -> set[str]:
    """The names that the first script shares with others: looked at there alone."""
    return {name for name in settings_of(SCRIPTS[0]) if name not in ("lr", "batch_size", "workers")}


def tried(script: str) -> dict[str, Setting]:
    """The settings to try mistakes on."""
    hidden = set() if script == SCRIPTS[0] else shared_settings()
    return {n: leaf for n, leaf in settings_of(script).items() if n not in hidden}


def run(script: str, *words: object) -> Outcome:
    return run_here(importlib.import_module(script).main, [*POSITIONAL.get(script, []), *words])


def printed(script: str, *words: object) -> dict[str, Any]:
    """The settings that a command line makes."""
    outcome = run(script, *words, "--print-config")
    assert outcome.code == 0, outcome.text
    return json.loads(outcome.text)


def complaint(outcome: Outcome, *about: str) -> str:
    """What is wrong with how a command refused its input; '' when nothing is."""
    lines = outcome.text.splitlines()
    if outcome.code != 2 or len(lines) != 1 or "Traceback" in outcome.text:
        return f"exit {outcome.code}, {len(lines)} lines: {outcome.text[-500:]}"
    said = lines[0].lower().replace("-", "_")
    if len(lines[0]) > LONGEST_LINE or not all(word.lower() in said for word in about):
        return f"{len(lines[0])} characters, not about {about}: {lines[0][:500]}"
    return ""


def complaints(
    main: Callable[[list[str]], int], commands: Mapping[str, Sequence[object]]
) -> dict[str, str]:
    """What is wrong with the refusals of commands, whose names begin with the flag to be named."""
    found = {
        name: complaint(run_here(main, words), name.partition(" ")[0])
        for name, words in commands.items()
    }
    return {name: text for name, text in found.items() if text}


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_80_columns_and_tells_every_flag_and_default(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    outcome = run_here(importlib.import_module(script).main, ["--help"])
    assert outcome.code == 0, outcome.text
    assert [line for line in outcome.text.splitlines() if len(line) > 80] == []
    boxes = " ".join(outcome.text.partition("usage: ")[2].replace("│", "").split())
    for name, leaf in settings_of(script).items():
        shown = boxes[boxes.index(f" {leaf.field.metadata['help']}") :]
        if leaf.flags:
            assert leaf.flags[0] in boxes
            assert re.match(r"[^╭]*?default", shown), name
        else:
            assert re.match(r"[^╭(]*?\(required\)", shown), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_takes_less_than_a_third_of_a_second_and_no_torch(script: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    command = [sys.executable, ROOT / (script.replace(".", "/") + ".py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    times = []
    while not times or (min(times) > 0.3 and len(times) < 5):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=60)
        after = os.times()
        times.append(after.children_user + after.children_system)
        times[-1] -= before.children_user + before.children_system
    assert min(times) < 0.3


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in PASSES_ON])
def test_a_flag_that_does_not_exist_is_refused_with_the_nearest(script: str) -> None:
    name = next(n for n, leaf in tried(script).items() if leaf.flags)
    abbreviated, misspelt = name[:-1], name[:-2] + name[-1] + name[-2]
    for wrong in (f"--{abbreviated}", f"--{misspelt}"):
        for typed in (wrong, wrong.replace("_", "-"), f"{wrong}=1"):
            named = f"unknown argument {wrong.replace('-', '_')};"
            assert complaint(run(script, typed), named, f"did you mean __{name}?") == ""
    assert complaint(run(script, "--zzzzz"), "unknown argument __zzzzz; __help lists") == ""
    if script != "lavic.src.describe":  # of which it is another picture
        assert complaint(run(script, "surplus"), "unknown argument surplus") == ""


WRONG = {  # by the setting's type; of the first of its type all are tried, of the others the first
    int: ("many", "1.5", "", "1 2", "[1]"),
    float: ("much", "", "1 2", "[1]"),
    Path: ("", "  ", "~nobody-of-this-name/x", "x" * 5000),
}


def allowed(leaf: Setting) -> str:
    """What a message has to say of the values that the setting takes."""
    if leaf.range:
        return leaf.range.describe(leaf.kind).replace("-", "_")
    return ", ".join(leaf.choices).replace("-", "_") or "a path"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_value_of_another_type_or_out_of_range_is_refused_with_what_is_allowed(script):
    found, seen = {}, set[Any]()
    for name, leaf in tried(script).items():
        values = list(("nonsense",) if leaf.choices else WRONG.get(leaf.kind, ()))
        if leaf.range:
            values += NOT_NUMBERS
        if leaf.kind in seen:
            values = values[:1]
        if leaf.range:
            values += ["-1"] if leaf.range.low > -1 else ["1e38"]
            values += ["0"] if leaf.range.low > 0 or leaf.range.above else []
        for value in values if leaf.flags else ():
            outcome = run(script, f"--{name}={value}", "--dry-run")
            found[f"{name} {value[:10]}"] = complaint(outcome, name, allowed(leaf))
        seen.add(leaf.kind)
    assert {name: said for name, said in found.items() if said} == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_without_its_value_is_refused(script: str) -> None:
    for name, leaf in tried(script).items():
        if leaf.flags and leaf.kind in (int, float, Path) and not leaf.field.metadata["const"]:
            assert complaint(run(script, f"--{name}"), "missing value", name, "__help") == ""
            assert complaint(run(script, f"--{name}", "--demo"), "missing value", name) == ""
            break


WITH_FILE = [name for name in SCRIPTS if "config" in settings_of(name) and name not in OWN_FILES]


@pytest.mark.parametrize("script", WITH_FILE)
def test_a_mistake_in_a_file_is_refused_with_the_files_name(script: str, tmp_path: Path) -> None:
    first_of_kind = {leaf.kind: (name, leaf) for name, leaf in reversed(tried(script).items())}
    found = {}
    for name, leaf in first_of_kind.values():
        path = tmp_path / f"{name}.yaml"
        path.write_text(f'"{name}": [[1]]\n')
        found[name] = complaint(run(script, "--config", path), f"{name}.yaml: {name} ", "[[1]]")
        if leaf.range:
            path.write_text(f"{name}: .inf\n")
            outcome = run(script, "--config", path)
            found[f"{name} inf"] = complaint(outcome, f"{name}.yaml: {name} ", allowed(leaf))
    path = tmp_path / "unknown.yaml"
    path.write_text("confgi: x\n")
    said = ("unknown.yaml: unknown setting confgi", "mean config?")
    found["unknown"] = complaint(run(script, "--config", path), *said)
    assert {name: said for name, said in found.items() if said} == {}


def test_one_process_of_several_tells_of_a_mistake() -> None:
    command = [sys.executable, ROOT / "face_distill" / "train_distill.py", "--lrr", "1"]
    for rank in ("0", "1"):
        environment = os.environ | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
        ended = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=60, check=False
        )
        assert ended.returncode == 2
        said = "error: unknown argument --lrr; did you mean --lr?\n"
        assert ended.stdout + ended.stderr == (said if rank == "0" else "")


def test_without_tyro_the_command_that_installs_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError('No tyro', name='tyro')\n")
    command = [sys.executable, ROOT / "multimodal" / "embed.py", "--demo"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert ended.returncode == 3
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: the Python package tyro is not installed in ")
    assert "./setup.sh" in line


@pytest.mark.parametrize("tool", ["monitor", "doctor"])
def test_the_tools_that_look_need_no_package(tool: str) -> None:
    path = ROOT / "shared" / "tools" / f"{tool}.py"
    for word, code in {"--help": 0, "/nowhere": 2}.items():
        command = [sys.executable, "-I", "-S", path, word]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == code, ended.stderr
        assert "Traceback" not in ended.stderr


# --- values ---------------------------------------------------------------------------------------

PRINTING = [name for name in SCRIPTS if "print_config" in settings_of(name)]


@pytest.mark.parametrize("script", PRINTING)
def test_dashes_and_underscores_are_the_same_and_flags_typed_alone_mean_auto(script: str) -> None:
    known = settings_of(script)
    paths = (n for n, leaf in known.items() if "_" in n and leaf.flags and leaf.kind is Path)
    for name in [*paths][:1]:
        dashes = printed(script, f"--{name.replace('_', '-')}", "/a_b-c")
        assert dashes[name] == "/a_b-c"
        assert dashes == printed(script, f"--{name}", "/a_b-c")
    bare = [name for name, leaf in known.items() if leaf.field.metadata["const"]]
    assert {"amp", "resume"} & {*known} == {"amp", "resume"} & {*bare}
    found = printed(script, *(f"--{name}" for name in bare), "--dry-run")
    assert [found[name] for name in bare] == ["auto"] * len(bare)


@pytest.mark.parametrize("script", ["arcface.run_scripts.run_arcface", "arcface.evaluate"])
def test_several_texts_follow_a_flag_that_may_be_repeated(script: str) -> None:
    line = "--cfg-options a.b=1 c_d=2 --amp --cfg_options=e=--f --cfg_options g=[1,2] h=-1"
    found = printed(script, *line.split())["cfg_options"]
    assert found == ["a.b=1", "c_d=2", "e=--f", "g=[1,2]", "h=-1"]
    said = complaint(run(script, "--cfg-options", "--amp"), "cfg_options is empty", "one or more")
    assert said == ""


DEMOS = [script for script in SCRIPTS if hasattr(importlib.import_module(script), "DEMO")]


@pytest.mark.parametrize("script", DEMOS)
def test_what_is_typed_wins_over_the_demo_and_the_demo_over_a_file(script, tmp_path):
    """All settings of the demo in one file, and all in one command."""
    demo = importlib.import_module(script).DEMO
    known, file, typed = settings_of(script), {}, {}
    for name, value in demo.items():
        typed[name], file[name] = other_values(known[name], value)
    path = tmp_path / "settings.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in file.items()))
    with_file = [] if script in OWN_FILES else ["--config", path]
    words = [
        (f"--{name}" if typed[name] == "True" else f"--no-{name}")
        if known[name].kind is bool
        else f"--{name}={typed[name]}"
        for name in demo
    ]

    def found(*more: object) -> dict[str, str]:
        shown = printed(script, *with_file, *more)
        return {name: str(shown[name]) for name in demo}

    assert not with_file or found() == file
    assert found("--demo") == {name: str(value) for name, value in demo.items()}
    assert found("--demo", *words) == typed


def other_values(leaf: Setting, value: Any) -> tuple[str, str]:
    """Two values that are not `value`, as texts."""
    if leaf.kind is bool:
        return str(not value), str(not value)
    candidates: tuple[Any, ...] = leaf.choices or ("/first", "/second")
    if leaf.range:
        candidates = tuple(leaf.kind(n) for n in (1, 3, 0.5, 64) if leaf.range.fits(n, leaf.kind))
    others = [str(other) for other in candidates if other != value]
    return others[0], others[1]
