"""Watch a run, or stop it: reads status.json, metrics.jsonl and the log, no more.

    python shared/tools/monitor.py                  the newest run
    python shared/tools/monitor.py --recipe lavic   that recipe's newest run
    python shared/tools/monitor.py RUN_DIR --json   one JSON object
    python shared/tools/monitor.py --stop           let it save and leave
    python shared/tools/monitor.py --list           every run of this repository

Ctrl-C ends the watching alone. SILENT: no heartbeat for five minutes, but its
processes use the processor. STALE: they are gone, or use none.
Exit codes: 0 done, stopped or running, 1 failed or stale, 2 no run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import gone, launched, lock, logs, processes, run_text, terminal
from shared.device import gpu_use
from shared.errors import DONE, FAILED, USER_ERROR, UserError, did_you_mean
from shared.files import open_regular, read_object, read_text
from shared.run_status import ENDED, LIVE, STALE, STARTING, View, log_lines, view
from shared.tools import about

ROOT = about.ROOT
RECIPES = about.read_all()
OF_DEMOS = ("demo/runs/*", "demo/runs/*/*")
LOGS = ("logs", "demo/runs/logs", "model/logs", "filter/logs")
PATIENCE = 150.0  # seconds that --stop waits: the launcher kills after 120
LONGEST = 86_400  # seconds between two looks
NO_STATUS = "the run has no status yet: models and data are being loaded"
MENU = "1 live log  2 summary  3 GPUs  4 warnings and errors  5 recent losses  6 quit"


@dataclass(frozen=True)
class Config:
    """What to watch, and how."""

    run_dir: Path | None = None
    recipe: str | None = None
    follow: bool = False
    once: bool = False
    json: bool = False
    stop: bool = False
    list: bool = False
    menu: bool = False
    every: float = 2.0  # seconds


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Do what the flags ask for; the exit code."""
    logs.open_streams()
    try:
        cfg = _read_flags(sys.argv[1:] if argv is None else argv)
        if cfg.list:
            return show_list(cfg, root)
        if cfg.menu:
            return show_menu(cfg, root)
        if cfg.stop:
            return stop(find(cfg, root), root)
        is_live = cfg.follow or not (cfg.once or cfg.json or not sys.stdout.isatty())
        return follow(cfg, root) if is_live else show(cfg, find(cfg, root))
    except UserError as error:
        logs.say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        print("\nthe run is left as it was", flush=True)
        return DONE


def _read_flags(argv: list[str]) -> Config:
    """The settings of a command line. Raises UserError for what it does not know."""
    parser = argparse.ArgumentParser(
        prog="monitor.py", description=__doc__, allow_abbrev=False, exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("place", nargs="?", type=Path, metavar="RUN_DIR", help="the run's directory")
    add("--run-dir", "--run_dir", type=Path, metavar="RUN_DIR", help="the same")
    add("--recipe", metavar="NAME", help=f"that recipe's newest run: {', '.join(RECIPES)}")
    for name, text in (
        ("follow", "show it until the run ends; on a terminal the default"),
        ("once", "show the present state and leave; elsewhere the default"),
        ("json", "one JSON object (with --follow a line each time)"),
        ("stop", "let the run save and leave, and wait for it"),
        ("list", "every run of this repository, or of --recipe"),
        ("menu", "choose from a menu, read from stdin"),
    ):
        add(f"--{name}", action="store_true", help=text)
    add("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (2)")
    gone.refuse(argv)
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see --help") from None
    if unknown:
        near = did_you_mean(unknown[0], [f"--{item.name}" for item in fields(Config)])
        raise UserError(f"unknown argument {unknown[0]}{near}; see --help")
    if args.recipe not in (None, *RECIPES):
        near = did_you_mean(args.recipe, RECIPES)
        raise UserError(f"--recipe {args.recipe}: unknown{near} (known: {', '.join(RECIPES)})")
    if args.follow and args.once:
        raise UserError("--follow and --once exclude each other: give one of them")
    if not 0 < args.every <= LONGEST:
        raise UserError(f"--every {args.every:g}: must be a number above 0, at most {LONGEST}")
    chosen = vars(args)
    place = chosen.pop("place")
    return Config(**(chosen | {"run_dir": place or args.run_dir}))


# which run


def find(cfg: Config, root: Path) -> View:
    """The run that is asked for: named, else a live one, else the newest. Raises UserError."""
    if cfg.run_dir:
        if not cfg.run_dir.is_dir():
            raise UserError(f"{cfg.run_dir} is no directory; --list shows the runs")
        if not (cfg.run_dir / "status.json").exists() and not lock.is_held(cfg.run_dir):
            raise UserError(f"{cfg.run_dir} holds no run: status.json is missing; see --list")
        return seen(cfg.run_dir)
    recipes = [cfg.recipe] if cfg.recipe else list(RECIPES)
    newest = [(_written_at(path), view(path)) for path in run_directories(recipes, root)[:5]]
    newest = sorted(newest + starts(recipes, root), key=lambda pair: pair[0], reverse=True)
    found = [seen for _, seen in newest]
    live = [seen for seen in found if seen.state in LIVE]
    begun = live or beginning(recipes, root, found) or found
    if not begun:
        whose = f"of {cfg.recipe} " if cfg.recipe else ""
        raise UserError(f"no run {whose}is to be found below {root}; name its directory")
    return replace(begun[0], gpus=gpu_use())


def run_directories(recipes: list[str], root: Path) -> list[Path]:
    """The directories with a status.json, the one that was written last first."""
    patterns = [
        (root / recipe, glob) for recipe in recipes for glob in (*RECIPES[recipe].runs, *OF_DEMOS)
    ]
    found = {path.parent for base, glob in patterns for path in base.glob(f"{glob}/status.json")}
    words = [word for recipe in recipes for _, word in launched.read_all(root / recipe)]
    elsewhere = {Path(word["run_dir"]) for word in words if isinstance(word.get("run_dir"), str)}
    here = {path.resolve() for path in found}
    found |= {p for p in elsewhere - here if (p / "status.json").is_file()}
    return sorted(found, key=_written_at, reverse=True)


def _written_at(run_dir: Path) -> float:
    with contextlib.suppress(OSError):
        return (run_dir / "status.json").stat().st_mtime
    return 0.0


def starts(recipes: list[str], root: Path) -> list[tuple[float, View]]:
    """Starts that have no status of their own, with their time: models are loading, or it failed.

    Of those that have ended the newest of each recipe.
    """
    found = []
    for recipe in recipes:
        for number, (path, word) in enumerate(launched.read_all(root / recipe)):
            is_alive = launched.is_alive(word)
            if (number == 0 or is_alive) and not _has_status(word):
                with contextlib.suppress(OSError):
                    found.append((path.stat().st_mtime, _view_of(word, root / recipe, is_alive)))
    return found


def _has_status(word: launched.Word) -> bool:
    run_dir = word.get("run_dir")
    status = read_object(Path(run_dir) / "status.json") if isinstance(run_dir, str) else {}
    return status.get("pid") == word["pid"]


def _view_of(word: launched.Word, recipe: Path, is_alive: bool) -> View:
    texts = {
        name: word[name]
        for name in ("reason", "host", "log", "started_at")
        if isinstance(word.get(name), str)
    }
    state, code = word.get("state"), word.get("exit_code")
    note = "it ended before its first step"
    if state not in ENDED:
        state = STARTING if is_alive else STALE
        note = (
            NO_STATUS
            if is_alive
            else f"process {word['pid']} ended without writing its status: see its log"
        )
    return View(
        str(word.get("run_dir") or recipe), str(state), note, recipe.name,
        exit_code=code if isinstance(code, int) else None, pid=word["pid"], **texts,
    )  # fmt: skip


def beginning(recipes: list[str], root: Path, known: list[View]) -> list[View]:
    """Runs that a recipe's script has started and that have no status yet: models are loading."""
    found = []
    for path in (root / recipe / place / "run.pid" for recipe in recipes for place in LOGS):
        with contextlib.suppress(OSError, ValueError):
            pid = int(read_text(path))
            if _is_script_of(root, path, pid) and pid not in [other.pid for other in known]:
                log = str((path.parent / "latest.log").resolve())
                recipe = path.relative_to(root).parts[0]
                found.append(View(str(path.parent), STARTING, NO_STATUS, recipe, pid=pid, log=log))
    return found


def _is_script_of(root: Path, pid_file: Path, pid: int) -> bool:
    """Whether a process wrote `pid_file`: it is older, and runs something of the recipe."""
    born, recipe = processes.born_at(pid), root / pid_file.relative_to(root).parts[0]
    if not processes.is_alive(pid) or born is None or born > pid_file.stat().st_mtime + 1:
        return False
    return processes.runs_below(pid, recipe)


def seen(run_dir: Path) -> View:
    """The run in `run_dir`, with the machine's GPUs."""
    return replace(view(run_dir), gpus=gpu_use())


# what is shown


def show(cfg: Config, run: View) -> int:
    """Print one view; the exit code that it stands for."""
    if cfg.json:
        indent = None if cfg.follow else 2
        print(json.dumps(asdict(run), indent=indent, ensure_ascii=False), flush=True)
    elif cfg.follow and not sys.stdout.isatty():
        line = f"{datetime.now():%H:%M:%S} | {run_text.short(run)}"
        print(terminal.fitted(line, terminal.width(), 11), flush=True)
    else:
        print(run_text.block(run, terminal.width()), flush=True)
    return FAILED if run.state in (STALE, "failed") else DONE


def follow(cfg: Config, root: Path) -> int:
    """Show the run again and again until it ends; its exit code."""
    clear = sys.stdout.isatty() and not cfg.json
    run = find(cfg, root)
    while True:
        if clear:
            print("\x1b[H\x1b[2J", end="")
        code = show(cfg, run)
        if run.state not in LIVE:
            return code
        if not logs.has_reader():  # as after `| head`
            return DONE
        if clear:
            print("\nCtrl-C leaves; the run continues", flush=True)
        time.sleep(cfg.every)
        run = find(cfg, root) if run.state == STARTING else seen(Path(run.run_dir))


def show_list(cfg: Config, root: Path) -> int:
    """Print all runs, newest first."""
    recipes = [cfg.recipe] if cfg.recipe else list(RECIPES)
    views = [seen for _, seen in starts(recipes, root)]
    views += [view(path) for path in run_directories(recipes, root)]
    views = beginning(recipes, root, views) + views
    if cfg.json:
        print(json.dumps([asdict(run) for run in views], indent=2, ensure_ascii=False))
    else:
        print(run_text.table(views, root, terminal.width()) if views else f"no runs below {root}")
    return DONE if views else USER_ERROR


# the menu


def show_menu(cfg: Config, root: Path) -> int:
    """Read choices from stdin until 6 or the end; the exit code."""
    while True:
        print(MENU, flush=True)
        choice = sys.stdin.readline().strip()
        if choice in ("", "6", "q"):
            return DONE
        try:
            answer(choice, cfg, find(cfg, root))
        except UserError as error:
            logs.say(f"error: {error}")


def answer(choice: str, cfg: Config, run: View) -> None:
    """What a number of the menu shows."""
    if choice == "1":
        tail(run, cfg.every)
    elif choice == "2":
        show(cfg, run)
    elif choice == "3":
        print("\n".join(run_text.gpu_texts(run)) or "no GPU, or no nvidia-smi")
    elif choice == "4":
        print("\n".join(run.warnings) or "no warnings and no errors")
    elif choice == "5":
        print("\n".join(f"step {step}  loss {loss:.6g}" for step, loss in run.recent_losses) or "-")
    else:
        print(f"no such entry: {choice}")


def tail(run: View, every: float) -> None:
    """The last lines of the log, and on a terminal what is added until Ctrl-C."""
    print("\n".join(log_lines(run.log, 20)) or "this run has no log file that is known")
    if not (run.log and sys.stdin.isatty() and sys.stdout.isatty()):
        return
    with (
        contextlib.suppress(KeyboardInterrupt, OSError),
        io.TextIOWrapper(open_regular(Path(run.log)), "utf-8", "replace") as log,
    ):
        log.seek(0, os.SEEK_END)
        while True:
            print(log.read(), end="", flush=True)
            time.sleep(min(every, 0.5))


# stopping


def stop(run: View, root: Path = ROOT) -> int:
    """Send SIGTERM to the run's launcher and wait until it has saved and left; the exit code.

    Raises UserError when that process cannot be proven to be the run's.
    """
    run_dir, pid = Path(run.run_dir), run.pid or 1
    status = read_object(run_dir / "status.json")
    if run.state in ENDED:
        raise UserError(f"nothing to stop: {run_text.short(run)}")
    if run.host not in (None, os.uname().nodename):
        raise UserError(f"the run is on {run.host}: stop it there with kill -TERM {run.pid}")
    word = _word_of(run, root)
    is_runs = processes.is_same(status) and pid != 1 and lock.is_held_by(run_dir, pid)
    if not is_runs and word is None:
        raise UserError(
            f"nothing was signalled: process {run.pid} is not known to be the run in {run_dir} (it "
            "is gone, or the run has not taken its directory yet); a process that you know is "
            "stopped with kill -TERM"
        )
    os.kill(pid, signal.SIGTERM)
    print(f"SIGTERM to process {pid}: it saves and leaves", flush=True)
    deadline = time.monotonic() + PATIENCE
    while processes.is_same(status) if is_runs else _word_of(run, root):
        if time.monotonic() > deadline:
            print(f"process {pid} has not ended in {PATIENCE:.0f} s", file=sys.stderr)
            return FAILED
        time.sleep(0.1)
    return _tell_end(run, run_dir, word)


def _word_of(run: View, root: Path) -> Path | None:
    """The word that the run's launcher has left, while it is alive."""
    words = launched.read_all(root / run.recipe) if run.recipe else []
    alive = (path for path, word in words if word["pid"] == run.pid and launched.is_alive(word))
    return next(alive, None)


def _tell_end(run: View, run_dir: Path, word: Path | None) -> int:
    """Print what became of the run that was stopped, whoever is in its directory now."""
    told = read_object(word) if word else {}
    ended = view(run_dir)
    if told.get("state") in ENDED:
        said = told if isinstance(told.get("exit_code"), int) else {}
        ended = replace(
            run,
            state=told["state"],
            reason=str(told.get("reason")),
            exit_code=said.get("exit_code"),
        )
    elif ended.pid != run.pid:
        ended = replace(run, state="stopped", reason="it ended before its first step")
    print(f"{run_text.headline(ended)}: {ended.reason or ended.note}")
    return DONE if ended.state in ("done", "stopped") else FAILED


if __name__ == "__main__":
    sys.exit(main())
