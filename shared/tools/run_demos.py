"""Run the recipes' main jobs on their built-in demo data, one after another; compare the results.

demo.sh calls this. What a recipe writes goes to <recipe>/demo/runs/logs/demo.log; a terminal shows
at most 15 lines for each. Exit code: 0 when every recipe ended well, 1 when one failed, 130 after
Ctrl-C, 143 after another stop signal.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import logs, run_text, stop, terminal
from shared.child import Child
from shared.errors import DONE, FAILED, INTERRUPTED, STOPPED, USER_ERROR, did_you_mean
from shared.progress import clock
from shared.run_status import STALE, View, log_lines, view
from shared.tools import about
from shared.tools.about import ROOT, Recipe

LOG = Path("demo", "runs", "logs", "demo.log")  # below the recipe
_TOLD_AT = (30.0, 120.0, 480.0)  # seconds at which a line tells how far it is, without a terminal
_LAST_LINES = 4  # of the log of one that failed


@dataclass
class Outcome:
    """What one recipe's demo came to; `run` is None when it left no status."""

    recipe: Recipe
    code: int
    seconds: float
    run: View | None

    @property
    def ended_well(self) -> bool:
        """Whether the command succeeded and its status says so too."""
        return self.code == DONE and self.run is not None and self.run.state == "done"


class Progress:
    """Tells on one line of a terminal, or on a few lines elsewhere, what the log says last."""

    def __init__(self, log: Path) -> None:
        self._log, self._began, self._left = log, time.monotonic(), list(_TOLD_AT)

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._began

    def tell(self) -> None:
        """Show the last line of the log; called every second."""
        is_live = sys.stdout.isatty()
        if is_live or (self._left and self.seconds >= self._left[0]):
            self._left = [second for second in self._left if second > self.seconds]
            last = (log_lines(self._log, 1) or [""])[0]
            last = last.partition(" | ")[2] or last  # without the time of day
            line = f"  {clock(self.seconds)}  {last}"[: terminal.width() - 1].rstrip()
            print(f"\r\x1b[2K{line}" if is_live else line, end="" if is_live else "\n", flush=True)

    def close(self) -> None:
        """Remove the line of a terminal."""
        if sys.stdout.isatty():
            print("\r\x1b[2K", end="", flush=True)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the named demos, all when none is named, and print the table; the exit code."""
    logs.open_streams()
    recipes = about.read_all(root)
    known = [name for name, recipe in recipes.items() if _script(recipe, root).is_file()]
    parser = argparse.ArgumentParser(
        prog="demo.sh", description="Train recipes on their built-in demo data."
    )
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
                outcomes.append(run_demo(recipes[name], root, child))
    print("\n".join(summary(outcomes, root)), flush=True)
    if child.stopped_by:
        return stop.exit_code_for(child.stopped_by)
    return DONE if all(outcome.ended_well for outcome in outcomes) else FAILED


def run_demo(recipe: Recipe, root: Path, child: Child) -> Outcome:
    """Run one recipe's documented script; how it went."""
    script, log = _script(recipe, root), root / recipe.name / LOG
    flags = recipe.demo_command.split()[1:]
    command = [*([sys.executable] if script.suffix == ".py" else []), str(script), *flags]
    print(f"{recipe.name}: {recipe.trains}")
    print(f"  {recipe.name}/{recipe.demo_command} > {log.relative_to(root)}", flush=True)
    started = time.time()
    code, seconds = _run(command, log, child)
    status = root / recipe.name / recipe.demo_run / "status.json"
    # an older file tells of an older run
    fresh = status.is_file() and status.stat().st_mtime >= started - 1
    outcome = Outcome(recipe, code, seconds, view(status.parent) if fresh else None)
    if not (outcome.ended_well or child.stopped_by):
        print(f"  exit code {code}; the log ends with:")
        for line in log_lines(log, _LAST_LINES):
            print(f"  | {line}"[: terminal.width()].rstrip())
    return outcome


def _script(recipe: Recipe, root: Path) -> Path:
    return root / recipe.name / recipe.demo_command.split()[0]


def _run(command: list[str], log: Path, child: Child) -> tuple[int, float]:
    """Exit code and seconds of a command, whose output goes to the file `log`."""
    progress = Progress(log)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            code = child.run(command, tick=progress.tell, output=stream.fileno())
    except OSError as error:
        print(f"demo.sh: {command[0]} does not start: {error}", file=sys.stderr)
        code = FAILED
    progress.close()
    return code, progress.seconds


def summary(outcomes: list[Outcome], root: Path) -> Iterator[str]:
    """The outcomes as a table, the reports that are there, the pages that continue from a demo."""
    rows = [(o.recipe.name, f"{o.seconds:.0f} s", result_text(o)) for o in outcomes]
    yield terminal.table(("recipe", "time", "result"), rows, terminal.width())
    for outcome in outcomes:
        path = root / outcome.recipe.name / outcome.recipe.demo_run / "report.html"
        if path.is_file():
            yield f"report: {path.relative_to(root)}"
    pages = ", ".join(f"{outcome.recipe.name}/README.md" for outcome in outcomes)
    yield terminal.fitted(f"your own data: {pages}", terminal.width(), 2)


def result_text(outcome: Outcome) -> str:
    """'accuracy 0.512 -> 0.874' of a run that ended well, else its state and the reason."""
    run = outcome.run
    if outcome.ended_well and run:
        return run_text.result_text(run.result) or "done"
    if run is None or run.state == "done":
        word = "STOPPED" if outcome.code in (INTERRUPTED, STOPPED) else "FAILED"
        why = "no status.json" if outcome.code == DONE else f"exit code {outcome.code}"
        return f"{word}: {why}"
    reason = (run.note if run.state == STALE else run.reason) or f"exit code {outcome.code}"
    return f"{run_text.state_text(run)}: {reason}"


if __name__ == "__main__":
    sys.exit(main())
