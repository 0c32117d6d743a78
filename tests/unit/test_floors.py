"""What a recipe's documented `pip install -r requirements.txt` brings: a floor for every import."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.harness import ROOT

DISTRIBUTIONS = packages_distributions()
FLOORS = {
    "shared": "base.txt",
    **{name: f"{name}.txt" for name in ("face_distill", "lavic", "vasevqa", "multimodal")},
    "arcface": "arcface.txt",
}


def plain(name: str) -> str:
    """A distribution's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def floors(name: str) -> dict[str, str]:
    """Distribution → floor of a list in requirements/, with those of the lists it names."""
    found: dict[str, str] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["-r"]:
            found |= floors(words[1])
        elif words and words[0] != "-c":
            distribution, floor = re.fullmatch(r"([\w.-]+)>=(\S+)", words[0]).groups()
            found[plain(distribution)] = floor
    return found


def is_optional(node: ast.Try) -> bool:
    """Whether a `try` does without what it cannot import."""
    names = [ast.unparse(handler.type) for handler in node.handlers if handler.type]
    return any("ImportError" in name or "ModuleNotFoundError" in name for name in names)


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of the modules imported at any depth, those it can do without left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Try) and is_optional(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]
        yield from imports(node)


def is_ours(name: str, path: Path) -> bool:
    """Whether a module is the standard library's or of this repository."""
    beside = path.with_name(f"{name}.py").exists()
    return name in sys.stdlib_module_names or (ROOT / name).is_dir() or beside


@pytest.mark.parametrize("directory", FLOORS)
def test_every_third_party_import_has_a_floor(directory):
    lacking = {}
    known = floors(FLOORS[directory])
    for path in sorted((ROOT / directory).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name in {name for name in imports(tree) if not is_ours(name, path)}:
            if not {plain(one) for one in DISTRIBUTIONS.get(name, [name])} & known.keys():
                lacking[name] = str(path.relative_to(ROOT))
    assert not lacking


@pytest.mark.parametrize("name", sorted(set(FLOORS.values())))
def test_every_floor_is_held_by_the_lock(name):
    lock = dict(
        line.partition("#")[0].strip().split("==", 1)
        for line in (ROOT / "requirements" / "lock.txt").read_text().splitlines()
        if "==" in line.partition("#")[0]
    )
    locked = {plain(distribution): version for distribution, version in lock.items()}

    def numbers(version: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", version)[:3]]

    for distribution, floor in floors(name).items():
        least = floor.partition(",")[0]
        assert numbers(locked[distribution]) >= numbers(least), distribution
