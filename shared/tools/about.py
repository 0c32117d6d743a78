"""What doctor, monitor and demos know of the recipes: each recipe's about.json.

    recipes = read_all(root)        {name: Recipe}

    name, trains    the recipe's directory, and what it trains in a few words
    demo            command: a script of the recipe with its flags; run: the directory of its run
    runs            patterns of the documented run directories, below the recipe
    weights, data   what real data need: what, path (a pattern), and command or hint, or both;
                    alternatives are other places, optional: some commands do without
    programs        name, what they are for, alternatives (programs, packages), command or hint

Paths are below the repository, unless they begin with a cache: {hub}, the Hugging Face Hub's, or
{torch}, torch's own. Commands are for a shell in the repository's root. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Need:
    """A file, directory or program that real data need, and what brings it."""

    what: str
    path: str = ""
    name: str = ""  # of a program
    command: str = ""
    hint: str = ""
    alternatives: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Recipe:
    """One recipe's facts. demo_run and runs: directories and patterns below the recipe."""

    name: str
    trains: str
    demo_command: str
    demo_run: str
    runs: tuple[str, ...]
    weights: tuple[Need, ...]
    data: tuple[Need, ...]
    programs: tuple[Need, ...]


def read_all(root: Path = ROOT) -> dict[str, Recipe]:
    """The recipes below `root`, in the order in which the pages name them."""
    found = [_recipe(path) for path in root.glob("*/about.json")]
    order = ("face_distill", "lavic", "vasevqa", "multimodal", "arcface")
    found.sort(key=lambda recipe: order.index(recipe.name) if recipe.name in order else len(order))
    return {recipe.name: recipe for recipe in found}


def _recipe(path: Path) -> Recipe:
    facts = json.loads(path.read_text(encoding="utf-8"))
    return Recipe(
        facts["name"],
        facts["trains"],
        facts["demo"]["command"],
        facts["demo"]["run"],
        tuple(facts["runs"]),
        *(tuple(map(_need, facts.get(kind, ()))) for kind in ("weights", "data", "programs")),
    )


def _need(facts: dict[str, Any]) -> Need:
    alternatives: Any = tuple(facts.get("alternatives", ()))
    return Need(**(facts | {"alternatives": alternatives}))
