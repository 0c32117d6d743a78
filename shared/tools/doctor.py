"""Look whether this machine has what a recipe needs, and say what brings the rest.

    python shared/tools/doctor.py                  every recipe
    python shared/tools/doctor.py face_distill     one of them
    python shared/tools/doctor.py --json           for programs
    python shared/tools/doctor.py --online         asks the mirrors, too, whether they answer

Nothing is changed or fetched. Exit code: 0 all is there, 1 something is missing, 2 a wrong word.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import logs
from shared.errors import DONE, FAILED, USER_ERROR, did_you_mean

ROOT = Path(__file__).resolve().parents[2]
_SIGNS = {"ok": "  ok   ", "note": "  note ", "missing": "MISSING"}


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Look, and print what was found; the exit code."""
    logs.open_streams()
    args = _arguments(argv)
    from shared.tools import doctor_checks as checks
    from shared.tools.needs import NEEDS

    known = [name for name in NEEDS if (root / name).is_dir()]
    if args.recipe and args.recipe not in known:
        hint = did_you_mean(args.recipe, known)
        print(f"doctor: no recipe {args.recipe}{hint} (known: {', '.join(known)})", file=sys.stderr)
        return USER_ERROR
    recipes = [args.recipe] if args.recipe else known
    found = [
        *checks.packages(root, recipes),
        *checks.machine(root, os.environ),
        *checks.network(os.environ, args.online),
    ]
    for recipe in recipes:
        found += checks.data(root, recipe, NEEDS[recipe], os.environ)
    missing = sum(check.state == "missing" for check in found)
    if args.json:
        listed = [asdict(check) for check in found]
        answer = {"schema": 1, "recipes": recipes, "missing": missing, "checks": listed}
        print(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        print(_text(found, missing))
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


def _text(found: list[Any], missing: int) -> str:
    """A line a check under its group's heading; below one that needs something, what brings it."""
    lines: list[str] = []
    group = ""
    for check in found:
        if check.group != group:
            group = check.group
            lines += ["", group]
        lines.append(f"{_SIGNS[check.state]} {check.name}: {check.value}")
        if check.advice and check.state != "ok":
            lines.append(f"          → {check.advice}")
    lines += ["", f"{missing} missing" if missing else "nothing is missing"]
    return "\n".join(lines[1:])


if __name__ == "__main__":
    sys.exit(main())
