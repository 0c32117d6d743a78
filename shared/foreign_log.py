"""How far a foreign program is, from the JSON lines that it writes; ms-swift's logging.jsonl.

A line looks like {"loss": 0.51, "grad_norm": 1.2, "learning_rate": 1e-4, "epoch": 0.5,
"global_step/max_steps": "3/6", "train_speed(s/it)": 0.8, "memory(GiB)": 7.2}, lines of validation
have eval_loss, the last one names the checkpoints. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.files import open_regular

log = logging.getLogger(__name__)

_POSITION, _PACE, _MEMORY = "global_step/max_steps", "train_speed(s/it)", "memory(GiB)"
_CHECKPOINTS = ("best_model_checkpoint", "last_model_checkpoint")
_NAMES = {"learning_rate": "lr"}  # what our own recipes call it
_FLAT_STEPS = 10  # of GRPO without a spread of rewards, before it is said


class JsonLinesProgress:
    """Reads what is added to logging.jsonl in `run_dir` and in the directories in it.

    Called from time to time; returns the changes for status.json, and writes the same numbers into
    `run_dir/metrics.jsonl`, one object a step, as our own runs do.
    """

    def __init__(self, run_dir: Path, name: str = "logging.jsonl") -> None:
        self._run_dir, self._name = run_dir, name
        self._offsets = {path: path.stat().st_size for path in self._files()}  # of earlier runs
        self._last: dict[str, float | None] = {}
        self._flat_steps = 0
        self._metrics = run_dir / "metrics.jsonl"
        if self._metrics.exists():
            self._metrics.rename(_free_name(self._metrics))

    def __call__(self) -> dict[str, Any]:
        """The newest step, total_steps, epoch, eta_s, last and outputs, where there is news."""
        changes: dict[str, Any] = {}
        for path in self._files():
            for line in self._news(path):
                changes |= self._take(line)
        return changes

    def _files(self) -> list[Path]:
        return sorted([*self._run_dir.glob(self._name), *self._run_dir.glob(f"*/{self._name}")])

    def _news(self, path: Path) -> Iterator[dict[str, Any]]:
        """The whole lines that were added; half a line waits for its end."""
        with contextlib.suppress(OSError), open_regular(path) as stream:
            stream.seek(self._offsets.get(path, 0))
            text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offsets[path] = stream.tell() - len(text) + len(whole)
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    found = json.loads(line)
                    if isinstance(found, dict):
                        yield found

    def _take(self, line: dict[str, Any]) -> dict[str, Any]:
        outputs = [line[name] for name in _CHECKPOINTS if isinstance(line.get(name), str)]
        if outputs:
            return {"outputs": list(dict.fromkeys(outputs))}
        step, _, total = str(line.get(_POSITION, "")).partition("/")
        if not (step.isdigit() and total.isdigit() and len(step) + len(total) < 30):
            return {}
        values = numbers(line)
        epoch = max(0, math.ceil(values.pop("epoch", 0) or 0) - 1)  # theirs counts what is behind
        left = (int(total) - int(step)) * (values.get("seconds_per_step") or math.nan)
        self._record(int(step), epoch, values)
        self._watch_rewards(int(step), values)
        self._last |= values
        return {
            **{"step": int(step), "total_steps": int(total), "epoch": epoch},
            "last": dict(self._last),
            "eta_s": left if math.isfinite(left) else None,
        }

    def _record(self, step: int, epoch: int, values: dict[str, float | None]) -> None:
        is_validation = any(name.startswith("eval_") for name in values)
        split = "val" if is_validation else "train" if "loss" in values else "end"
        row = {"step": step, "epoch": epoch, "split": split, "time": round(time.time(), 3)}
        named = {name.removeprefix("eval_"): value for name, value in values.items()}
        with contextlib.suppress(OSError), self._metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row | named) + "\n")

    def _watch_rewards(self, step: int, values: dict[str, float | None]) -> None:
        """Warn, once a stretch, when the answers to each question earn the same: no gradient."""
        if "reward_std" not in values:
            return
        self._flat_steps = 0 if values["reward_std"] else self._flat_steps + 1
        if self._flat_steps == _FLAT_STEPS:
            log.warning(
                "step %d: %d steps in a row without a spread of rewards, so nothing is learnt: "
                "raise --temperature or --num_generations, or reward parts of an answer",
                *(step, _FLAT_STEPS),
            )


def numbers(line: dict[str, Any]) -> dict[str, float | None]:
    """The line's numbers under our names; None for NaN and infinities."""
    found: dict[str, float | None] = {}
    for name, value in line.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            continue
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            found[_NAMES.get(name, name)] = number if math.isfinite(number) else None
    for theirs, ours, factor in (
        (_MEMORY, "memory_bytes", 2.0**30),
        (_PACE, "seconds_per_step", 1),
    ):
        number = found.pop(theirs, None)
        if number:
            found[ours] = number * factor
    if found.get("seconds_per_step"):
        found["steps_per_s"] = round(1 / (found["seconds_per_step"] or 1), 4)
    return found


def _free_name(path: Path) -> Path:
    """The first of metrics.1.jsonl, metrics.2.jsonl, … that is not there."""
    number = 1
    while os.path.lexists(free := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    return free
