"""Word of every start of a training, kept under its recipe: by it the monitor finds a run wherever
it writes, from its first second, and one that failed before it had a directory.

<recipe>/.runs/<pid>.json: id, host, birth and command of the process; started_at, log, run_dir
(null until the run has taken it), state (running|done|failed|stopped), exit_code, reason. None is
left where TOOLKIT_NO_WORD is set.
Standard library only.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from shared import processes
from shared.errors import DONE, INTERRUPTED, STOPPED
from shared.files import read_object, write_json
from shared.status import now

ROOT = Path(__file__).resolve().parents[1]
PLACE = ".runs"
NOTES = "TOOLKIT_LAUNCH_NOTES"  # the variable with the directory of a launcher's own notes
_KEPT = 20  # words of starts that have ended

Word = dict[str, Any]


def begin(script: Path, log: str | None) -> Path | None:
    """Leave word that this process starts `script`; where it is, None for no recipe's script."""
    recipe = _recipe_of(script)
    if recipe is None:
        return None
    _clean(recipe / PLACE)
    path = recipe / PLACE / f"{os.getpid()}.json"
    fields = {**processes.describe(os.getpid()), "recipe": recipe.name, "started_at": now()}
    fields |= {"log": log, "run_dir": None, "state": "running", "exit_code": None, "reason": None}
    with contextlib.suppress(OSError):  # a recipe that cannot be written is trained all the same
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"schema": 1, **fields}, durable=False)
    return path


def note(path: Path | None, **fields: Any) -> None:
    """Add to a word what is known now."""
    word = read_object(path) if path else {}
    if path and word:
        with contextlib.suppress(OSError):
            write_json(path, word | fields, durable=False)


def end(path: Path | None, code: int, reason: str) -> None:
    """Say how the start ended; one that was done without a run is forgotten."""
    if path and code == DONE and read_object(path).get("run_dir") is None:
        path.unlink(missing_ok=True)
        return
    state = {DONE: "done", INTERRUPTED: "stopped", STOPPED: "stopped"}.get(code, "failed")
    note(path, state=state, exit_code=code, reason=reason)


def read_all(recipe: Path) -> list[tuple[Path, Word]]:
    """The words under a recipe, the newest first."""
    found = [(_changed_at(path), path) for path in (recipe / PLACE).glob("*.json")]
    words = [(path, read_object(path)) for _, path in sorted(found, reverse=True)]
    return [(path, word) for path, word in words if type(word.get("pid")) is int]


def is_alive(word: Word) -> bool:
    """Whether the process that left the word runs, and is that one."""
    noted = {name: word.get(name) for name in ("pid", "host", "pid_born", "pid_command")}
    return processes.is_same(noted)


def _recipe_of(script: Path) -> Path | None:
    script = script.resolve()
    if not script.is_relative_to(ROOT):
        return None
    recipe = ROOT / script.relative_to(ROOT).parts[0]
    return recipe if (recipe / "about.json").is_file() else None


def _clean(place: Path) -> None:
    """Remove the words of starts that have ended: those whose run is gone, and the oldest."""
    ended = [(path, word) for path, word in read_all(place.parent) if not is_alive(word)]
    for number, (path, word) in enumerate(ended):
        run_dir = word.get("run_dir")
        is_gone = isinstance(run_dir, str) and not Path(run_dir).is_dir()
        if is_gone or number >= _KEPT:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _changed_at(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
