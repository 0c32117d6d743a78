"""Run the recipes' main jobs on their built-in demo data, one after another; compare the results.

demo.sh calls this. Exit code: 0 when every recipe ended well, 1 when one failed, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared.child import Child
from shared.errors import DONE, FAILED, INTERRUPTED, STOPPED, USER_ERROR, did_you_mean
from shared.files import read_json

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Recipe:
    """One recipe's demo: the documented command, and where its status.json lies."""

    trains: str
    script: str  # below the recipe
    arguments: tuple[str, ...]
    run_directory: str  # below <recipe>/demo/runs


RECIPES = {
    "face_distill": Recipe(
        "face adapters on a BLIP-2 vision tower", "train.sh", ("--demo",), "checkpoints"
    ),
    "lavic": Recipe(
        "five vectors a picture for LLaVA-v1.6", "run_training.sh", ("--demo",), "out_distilled"
    ),
    "vasevqa": Recipe(
        "filters, SFT and GRPO for questions about vases", "run_all.sh", ("--demo",), "flow"
    ),
    "multimodal": Recipe(
        "pictures, texts and sounds in one space", "run_all.sh", ("--demo",), "outputs"
    ),
    "arcface": Recipe(
        "ArcFace retrieval of garments",
        "run_scripts/run_arcface.py",
        ("--demo",),
        "resnet18-arcface_demo",
    ),
}


@dataclass
class Outcome:
    """What one recipe's demo came to. `status` is empty when the run left none."""

    name: str
    code: int
    seconds: float
    status: dict[str, Any]

    @property
    def ended_well(self) -> bool:
        """Whether the command succeeded and its status says so too."""
        return self.code == DONE and self.status.get("state") == "done"


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the named demos, all when none is named, and print the table; the exit code."""
    parser = argparse.ArgumentParser(
        prog="demo.sh", description="Train recipes on their built-in demo data."
    )
    known = [name for name, recipe in RECIPES.items() if (root / name / recipe.script).is_file()]
    parser.add_argument("recipes", nargs="*", help=f"of: {' '.join(known)} (default: all)")
    names = parser.parse_args(argv).recipes or known
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            print(f"demo.sh: no recipe {name}{hint} (known: {', '.join(known)})", file=sys.stderr)
            return USER_ERROR
    outcomes: list[Outcome] = []
    with Child() as child:
        for name in dict.fromkeys(names):
            if not child.stopped_by:
                outcomes.append(run_demo(name, root, child))
    print("\n" + table(outcomes, root), flush=True)
    if child.stopped_by:
        return INTERRUPTED if child.stopped_by == signal.SIGINT else 128 + child.stopped_by
    return DONE if all(outcome.ended_well for outcome in outcomes) else FAILED


def run_demo(name: str, root: Path, child: Child) -> Outcome:
    """Run one recipe's documented script; how it went."""
    recipe = RECIPES[name]
    script = root / name / recipe.script
    program = [sys.executable] if script.suffix == ".py" else []
    command = [*program, str(script), *recipe.arguments]
    print(f"\n=== {name}: {name}/{recipe.script} {' '.join(recipe.arguments)}", flush=True)
    started, clock = time.time(), time.monotonic()
    try:
        code = child.run(command)
    except OSError as error:
        print(f"demo.sh: {command[0]} does not start: {error}", file=sys.stderr)
        code = FAILED
    seconds = time.monotonic() - clock
    path = _runs(name, root) / "status.json"
    # an older file tells of an older run
    fresh = path.is_file() and path.stat().st_mtime >= started - 1
    return Outcome(name, code, seconds, (read_json(path) if fresh else None) or {})


def _runs(name: str, root: Path) -> Path:
    """The run directory of a recipe's demo."""
    return root / name / "demo" / "runs" / RECIPES[name].run_directory


def table(outcomes: list[Outcome], root: Path) -> str:
    """The outcomes as aligned text: recipe, what was trained, result, time; then where to look."""
    rows: list[tuple[str, ...]] = [("recipe", "trained", "result", "time")]
    for outcome in outcomes:
        took = f"{outcome.seconds:.0f} s"
        rows.append((outcome.name, RECIPES[outcome.name].trains, result_text(outcome), took))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *_where_to_look(outcomes, root)])


def _where_to_look(outcomes: list[Outcome], root: Path) -> Iterator[str]:
    """The reports that are there, and the pages that go on from a demo."""
    reports = [path for o in outcomes if (path := _runs(o.name, root) / "report.html").is_file()]
    if reports:
        yield "\nthe runs as pages, for a browser"
        yield from (f"  {path.relative_to(root)}" for path in reports)
    pages = [f"{outcome.name}/README.md" for outcome in outcomes]
    yield f"\nyour own data: {', '.join(pages)}"


def result_text(outcome: Outcome) -> str:
    """'accuracy 0.512 -> 0.874' of a run that ended well, else what went wrong."""
    if not outcome.ended_well:
        state = "no status.json" if outcome.code == DONE else f"exit code {outcome.code}"
        reason = " ".join(str(outcome.status.get("reason") or state).split())
        word = "STOPPED" if outcome.code in (INTERRUPTED, STOPPED) else "FAILED"
        return f"{word}: {reason if len(reason) <= 60 else reason[:57] + '...'}"
    result = outcome.status.get("result")
    if not result:
        return "done"
    before, after = result["before"], result["after"]
    gain = None if None in (before, after) else after - before
    if gain is not None and (gain if result["higher_is_better"] else -gain) <= 0:
        return f"{result['name']} {_number(before)} -> {_number(after)} (no gain)"
    return f"{result['name']} {_number(before)} -> {_number(after)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
