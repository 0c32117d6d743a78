"""Look whether this machine has what a recipe needs, and say what brings the rest.

    python shared/tools/doctor.py                every recipe
    python shared/tools/doctor.py face_distill   one of them
    python shared/tools/doctor.py --json         for programs
    python shared/tools/doctor.py --online       asks whether the mirrors answer

First what the demos need: packages and a machine. Then what real data need:
network, weights, data, programs. Nothing is changed or fetched.
Exit code: 0 all is there, 1 something is missing, 2 a wrong word.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import logs, terminal
from shared.errors import DONE, FAILED, USER_ERROR, did_you_mean
from shared.tools import about

if TYPE_CHECKING:
    from shared.tools.doctor_checks import Check

_SIGNS = {"ok": "  ok   ", "note": "  note ", "missing": "MISSING"}
_INDENT = 10
_COLOURS = {"ok": "green", "note": "yellow", "missing": "red"}


def main(argv: list[str] | None = None, root: Path = about.ROOT) -> int:
    """Look, and print what was found; the exit code."""
    logs.open_streams()
    args = _arguments(argv)
    from shared.tools import doctor_checks as checks

    known = about.read_all(root)
    if args.recipe and args.recipe not in known:
        hint = did_you_mean(args.recipe, known)
        print(f"doctor: no recipe {args.recipe}{hint} (known: {', '.join(known)})", file=sys.stderr)
        return USER_ERROR
    recipes = [args.recipe] if args.recipe else list(known)
    for_demos = [*checks.packages(root, recipes), *checks.machine(root, os.environ)]
    for_data = list(checks.network(os.environ, args.online))
    for recipe in recipes:
        for_data += checks.data(root, known[recipe], os.environ)
    missing = _missing([*for_demos, *for_data])
    if args.json:
        listed = [asdict(check) for check in (*for_demos, *for_data)]
        answer = {"schema": 1, "recipes": recipes, "missing": missing, "checks": listed}
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_text(for_demos, for_data, f" {args.recipe}" if args.recipe else "")))
    return FAILED if missing else DONE


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="default: all of them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--online", action="store_true", help="ask the mirrors whether they answer")
    return parser.parse_args(argv)


def _missing(found: list[Check]) -> int:
    return sum(check.state == "missing" for check in found)


def _text(for_demos: list[Check], for_data: list[Check], recipe: str) -> Iterator[str]:
    """What the demos need, then what real data need."""
    lacking = _missing(for_demos)
    yield f"demos need {lacking} more" if lacking else f"demos need nothing more: ./demo.sh{recipe}"
    yield from _groups(_short(for_demos))
    yield f"\nreal data need {_missing(for_data) or 'nothing'} more"
    yield from _groups(for_data)


def _short(found: list[Check]) -> list[Check]:
    """The checks, with one line in place of the packages that are as they should be."""
    fine = [c for c in found[1:] if c.group == "packages" and c.state == "ok"]  # after Python
    summary = replace(found[0], name="as required", value=f"{len(fine)} packages")
    return [found[0], *[summary][: len(fine)], *(c for c in found[1:] if c not in fine)]


def _groups(found: list[Check]) -> Iterator[str]:
    """A line a check under its group's heading; below one that needs something, what brings it."""
    columns, group = terminal.width(), ""
    for check in found:
        if check.group != group:
            group = check.group
            yield f"\n{group}"
        sign = _SIGNS[check.state]
        line = terminal.fitted(f"{sign} {check.name}: {check.value}", columns, _INDENT)
        yield terminal.coloured(sign, _COLOURS[check.state]) + line[len(sign) :]
        if check.state != "ok" and check.command:
            yield terminal.command(check.command, columns, _INDENT)
        if check.state != "ok" and check.advice:
            yield terminal.fitted(" " * _INDENT + check.advice, columns, _INDENT)


if __name__ == "__main__":
    sys.exit(main())
