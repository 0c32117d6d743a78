"""The pages' tables of flags, constants and settings are what the code says."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shared.config import ProcessOptions, RunOptions, ToolOptions
from shared.program import ProgramOptions
from shared.settings import leaves
from shared.stages import StageOptions
from shared.tools import monitor
from tests.pages import DOCS, IN_BOTH_LANGUAGES, RECIPES, ROOT, Table, spans, tables, text_of
from vasevqa.model import swift_flags

EVERYDAY = "shared/docs/everyday.md"
COMMON = (RunOptions, ProcessOptions, StageOptions)  # in the order of the tables of EVERYDAY
FROM_A_SCRIPT = re.compile(r"(?:Constant|Setting|In) .*`(.+)`|In `(.+)`")
# of other programs: TensorBoard, SLURM, torchrun, docker, mm tools, argparse; doctor.py's own
FOREIGN = {
    *("--logdir", "--signal", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--shm-size"),
    *("--no-validate", "--auto-scale-lr", "--no-pin-memory", "--no-persistent-workers"),
    *("--help", "--online"),
}
SWIFT_TOO = ("vasevqa/README.md", *DOCS)  # pages that name ms-swift's flags


def scripts_of(recipe: str) -> list[str]:
    """The recipe's programs with flags."""
    folder = ROOT / recipe
    programs = sorted(path for path in folder.rglob("*.py") if "demo" not in path.parts)
    texts = ((path, path.read_text(encoding="utf-8")) for path in programs)
    return [
        str(path.relative_to(folder))
        for path, text in texts
        if "\nclass Config" in text and "__main__" in text
    ]


@cache
def config_of(recipe: str, script: str) -> Any:
    """An instance of the program's settings, with their defaults."""
    module = ".".join((recipe, *Path(script).with_suffix("").parts))
    return importlib.import_module(module).Config()


def flags_of(config: Any, folder: Path = ROOT) -> dict[str, Any]:
    """Flag -> default; a path below `folder` as it reads from there."""
    found = {}
    for name, leaf in leaves(config).items():
        value = leaf.value
        if isinstance(value, Path) and value.is_relative_to(folder):
            value = str(value.relative_to(folder))
        for flag in (name, *leaf.field.metadata.get("aliases", ())):
            found[dashed(flag)] = value
    return found


def own_flags(config: Any) -> set[str]:
    """Without those that the program shares with others, and words typed without a name."""
    own = [item for item in fields(config) if not item.metadata.get("positional")]
    common = {name for kind in (*COMMON, ToolOptions) for name in leaves(kind())}
    found = {item.name for item in own if item.metadata} - common
    return {dashed(name) for name in found}


def dashed(flag: str) -> str:
    """A flag as the code names it, from either spelling."""
    return "--" + flag.strip("`").removeprefix("--").replace("_", "-")


def constants(script: Path) -> dict[str, Any]:
    """The literals with a name in capitals at the top of a program."""
    found = {}
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name.isupper() and isinstance(node.value, ast.Constant):
                found[name] = node.value.value
    return found


def settings_in(script: Path) -> dict[str, str]:
    """What a shell script passes on, a flag a line, and the variables it sets."""
    text = script.read_text(encoding="utf-8")
    (block,) = re.findall(r"^(?:arguments|settings)=\(\n(.*?)^\)", text, re.M | re.S)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    found = {words[0]: " ".join(words[1:]) for words in lines if words}
    return found | dict(re.findall(r"^export (\w+)=\$\{\w+:?-([^}]*)\}", text, re.M))


def parsed(cell: str) -> Any:
    try:
        return ast.literal_eval(cell.strip("`"))
    except (ValueError, SyntaxError):
        return cell.strip("`")


def at(recipe: str, name: str) -> Path:
    """The one script of that name, wherever in the recipe it lies."""
    (found,) = [p for p in (ROOT / recipe).rglob(Path(name).name) if str(p).endswith(f"/{name}")]
    return found


def flag_rows(table: Table) -> list[tuple[str, str, list[str]]]:
    """Flag, default and the scripts that are named, of a table with such columns."""
    return [
        (spans(row["Flag"])[0], row["Default"], spans(row.get("Script", "")))
        for row in table.records
        if row["Flag"].startswith("`--")
    ]


def with_defaults(recipe: str) -> list[Table]:
    found = [t for t in tables(text_of(f"{recipe}/README.md")) if "Default" in t.head]
    assert found
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_in_a_table_have_the_defaults_of_the_code(recipe: str):
    """Of the scripts that the row names, else of one of the recipe's."""
    checked = 0
    for table in with_defaults(recipe):
        for flag, default, named in flag_rows(table) if "Flag" in table.head else []:
            values = {
                script: flags_of(config_of(recipe, script), folder)
                for script in scripts_of(recipe)
                for folder in [(ROOT / recipe / script).parent if not named else ROOT / recipe]
            }
            known = [flags[dashed(flag)] for flags in values.values() if dashed(flag) in flags]
            for script in named:
                assert values[script][dashed(flag)] == parsed(default), (flag, script)
            assert named or parsed(default) in known, flag
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("recipe", RECIPES)
def test_constants_and_settings_in_a_table_are_those_of_the_script_it_names(recipe: str):
    for table in with_defaults(recipe):
        for column in table.head:
            if found := FROM_A_SCRIPT.fullmatch(column):
                script = at(recipe, found[1] or found[2])
                known = constants(script) if script.suffix == ".py" else settings_in(script)
                for row in table.records:
                    name = spans(row.get(column, ""))[:1] or spans(row["Flag"])[:1]
                    stated = row["Default"] if spans(row[column]) else row[column]
                    value = str(known.get(name[0], ""))
                    assert value == stated.partition(", ")[0].strip("`"), (script, name)


def test_face_distills_names_stand_at_the_top_of_its_script():
    """The documented names, their flags and their defaults; every name that the page mentions."""
    page, script = text_of("face_distill/README.md"), at("face_distill", "train_distill.py")
    (table,) = [t for t in tables(page) if t.head[0] == "Name"]
    known, flags = constants(script), flags_of(config_of("face_distill", script.name))
    for row in table.records:
        assert known[row["Name"].strip("`")] == parsed(row["Default"])
        assert flags[dashed(row["Flag"])] == parsed(row["Default"])
    named = {span for span in spans(page) if re.fullmatch("[A-Z_]+", span)}
    named -= {"CUDA_VISIBLE_DEVICES", "HF_ENDPOINT"}
    assert {"BATCH_SIZE", "BLIP_PATH", "PROJECT_ROOT"} <= named
    assert named - set(re.findall(r"^([A-Z_]+) = ", script.read_text(), re.M)) == set()


def test_vasevqas_constants_are_their_flags_defaults():
    for table in with_defaults("vasevqa"):
        if table.head[0].startswith("Constant"):
            script = spans(table.head[0])[0]
            flags = flags_of(config_of("vasevqa", f"filter/{script}"), ROOT / "vasevqa" / "filter")
            for row in table.records:
                assert flags[dashed(spans(row["Flag"])[0])] == parsed(row["Default"]), row


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_flag_of_the_code_is_on_its_page(recipe: str):
    page = text_of(f"{recipe}/README.md")
    named = {dashed(name) for name in re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]*)", page)}
    for script in scripts_of(recipe):
        assert own_flags(config_of(recipe, script)) <= named, script


def test_flags_that_all_share_stand_in_one_place_with_their_defaults():
    found = [table for table in tables(text_of(EVERYDAY)) if table.head[:2] == ["Flag", "Default"]]
    assert len(found) == len(COMMON)
    seen: set[str] = set()
    for table, kind in zip(found, COMMON, strict=True):
        config = kind()
        own = {dashed(item.name) for item in fields(config) if item.metadata}
        stated = {flag: parsed(default) for flag, default, _ in flag_rows(table)}
        assert stated == {flag: flags_of(config)[flag] for flag in own}
        seen |= own
    assert {dashed(item.name) for item in fields(ToolOptions()) if item.metadata} <= seen


def test_batches_on_the_page_of_scaling_are_the_codes():
    (table,) = [t for t in tables(text_of("shared/docs/scaling.md")) if t.head[0] == "Recipe"]
    known = [flags_of(config_of(r, s)) for r in RECIPES for s in scripts_of(r)]
    shell = settings_in(at("vasevqa", "sft.sh"))
    known.append({dashed(flag): parsed(value) for flag, value in shell.items()})
    for row in table.records:
        flags = [span for span in spans(row["Flag"]) if span.startswith("--")]
        stated = re.findall(r"\d+", re.sub(r"`.*?`", "", row["Default"]))
        assert len(stated) == max(len(flags), 1)
        for flag, default in zip(flags, stated, strict=False):
            assert int(default) in [of.get(dashed(flag)) for of in known], flag


# the series has its own: tests/unit/test_ddp_series_readme.py
@pytest.mark.parametrize("page", [p for p in IN_BOTH_LANGUAGES if "ddp_series" not in p])
def test_every_flag_that_a_page_mentions_exists(page: str):
    known = set(FOREIGN)
    for kind in (*COMMON, ToolOptions, ProgramOptions, monitor.Config):
        known |= set(flags_of(kind()))
    for recipe in RECIPES:
        for script in scripts_of(recipe):
            known |= set(flags_of(config_of(recipe, script)))
    if page in SWIFT_TOO:
        # beside swift's, or passed to its export
        ours = ("estimate", "no_image_check", "skip_bad_rows", "exist_ok")
        names = (*swift_flags.declared(), *swift_flags.OLD_NAMES, *ours)
        known |= {dashed(name) for name in names}
    used = re.findall(r"(?<![\w-])--((?:no-)?[a-z][\w-]*\w)(?![\w-])", text_of(page))
    unknown = {dashed(name) for name in used} - known
    assert {flag for flag in unknown if flag.replace("--no-", "--") not in known} == set()
