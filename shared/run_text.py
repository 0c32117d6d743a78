"""A run as text for people: the block that a monitor shows, a line, and the table of several runs.

The one place for the words of a state. Standard library only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared import terminal
from shared.progress import clock, span
from shared.run_status import DONE, FAILED, RUNNING, STALE, View

_BARS = "▁▂▃▄▅▆▇█"
_NAME = 9  # columns of the names on the left
_COLOURS = {DONE: "green", RUNNING: "green", FAILED: "red", STALE: "red"}  # the others: yellow


def block(seen: View, columns: int = 80) -> str:
    """Everything about one run, a topic a line; what is not known is left out."""
    speed = (_with(seen.samples_per_s, "samples/s"), _with(seen.steps_per_s, "steps/s"))
    lines = [terminal.coloured(headline(seen), _COLOURS.get(seen.state, "yellow"))]
    for name, text in (
        ("note", seen.note),
        ("reason", seen.reason or ""),
        ("progress", _joined(_progress(seen), _heartbeat(seen))),
        ("speed", _joined(*speed)),
        ("loss", _loss(seen, columns - _NAME - 35)),
        ("training", _training(seen)),
        ("best", _best(seen)),
        ("val", "  ".join(f"{name} {number(value)}" for name, value in seen.validation.items())),
        ("result", result_text(seen.result)),
        ("memory", _memory(seen)),
        ("run", _joined(*_process(seen), _short(seen.run_dir))),
        ("log", _short(seen.log) if seen.log else ""),
    ):
        if text:
            lines.append(terminal.fitted(f"{name:<{_NAME}}{text}", columns, _NAME))
    if seen.warnings:
        lines.append("last warnings and errors")
        lines += [terminal.fitted(f"  {line}", columns, 4) for line in seen.warnings]
    return "\n".join(lines)


def headline(seen: View) -> str:
    """'lavic: RUNNING', with the code of one that failed."""
    return f"{seen.recipe or Path(seen.run_dir).name}: {state_text(seen)}"


def state_text(seen: View) -> str:
    """'RUNNING', 'FAILED (exit 1)'."""
    code = f" (exit {seen.exit_code})" if seen.state == FAILED else ""
    return f"{seen.state.upper()}{code}"


def short(seen: View) -> str:
    """One line about one run, for files and pipes."""
    loss = f"loss {number(seen.loss)}" if seen.loss is not None else ""
    return _joined(headline(seen), _progress(seen), loss, seen.note)


def table(views: Sequence[View], root: Path, columns: int = 80) -> str:
    """Several runs, a row each; a long directory continues below."""
    rows: list[tuple[str, ...]] = []
    for seen in views:
        path = Path(seen.run_dir)
        place = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        step = "-" if seen.step is None else f"{seen.step}/{seen.total_steps or '?'}"
        ago = "-" if seen.heartbeat_s is None else f"{span(seen.heartbeat_s)} ago"
        rows.append((state_text(seen), step, ago, place))
    return terminal.table(("state", "step", "updated", "directory"), rows, columns)


def result_text(result: dict[str, Any] | None) -> str:
    """'accuracy 0.512 -> 0.874 (chance 0.5, N 600)', and '(no gain)' where it got no better.

    In percent where the result's unit is "share"; '' without a result.
    """
    if not result:
        return ""
    before, after = result.get("before"), result.get("after")
    shown = percent if result.get("unit") == "share" else number
    text = f"{result.get('name')} {shown(before)} -> {shown(after)}"
    names = {"chance": "chance", "majority": "majority", "n": "N"}
    known = {label: result.get(name) for name, label in names.items()}
    said = [f"{name} {shown(value)}" for name, value in known.items() if value is not None]
    text += f" ({', '.join(said)})" if said else ""
    if not (isinstance(before, (int, float)) and isinstance(after, (int, float))):
        return text
    gain = after - before if result.get("higher_is_better", True) else before - after
    return text if gain > 0 else f"{text} (no gain)"


def gpu_texts(seen: View) -> list[str]:
    """'GPU 0: 43 %, 10.2 GiB of 24.0 GiB' for every GPU of the machine."""
    return [
        f"GPU {gpu['index']:.0f}: {gpu['percent']:.0f} %, {size(gpu['used_bytes'])} of "
        f"{size(gpu['total_bytes'])}"
        for gpu in seen.gpus
    ]


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of `values` in at most `width` characters, each the mean of its share of them."""
    count = min(max(width, 0), len(values))
    edges = [len(values) * at // count for at in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    if not means:
        return ""
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def number(value: object) -> str:
    """A number in four digits; anything else as it is, None as a dash."""
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def percent(value: object) -> str:
    """A share in [0, 1] as percent; anything but a fraction as `number` has it."""
    return f"{100 * value:.1f} %" if isinstance(value, float) else number(value)


def size(num_bytes: float | None) -> str:
    """1610612736 → '1.5 GiB'."""
    if num_bytes is None:
        return "-"
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _joined(*parts: str) -> str:
    return "  ".join(part for part in parts if part)


def _with(value: float | None, unit: str) -> str:
    return "" if value is None else f"{number(value)} {unit}"


def _short(path: str) -> str:
    """A path as it is typed from here."""
    here, place = Path.cwd(), Path(path)
    return str(place.relative_to(here)) if place.is_relative_to(here) else path


def _process(seen: View) -> tuple[str, ...]:
    host = f" on {seen.host}" if seen.host else ""
    return (f"pid {seen.pid}{host}",) if seen.pid else ()


def _progress(seen: View) -> str:
    if seen.step is None:
        return ""
    share = "" if seen.percent is None else f" ({seen.percent} %)"
    left = "" if seen.eta_s is None else f"ETA {clock(seen.eta_s)}"
    epoch = "" if seen.epoch is None else f"epoch {seen.epoch}"
    return _joined(f"step {seen.step}/{seen.total_steps or '?'}{share}", epoch, left)


def _heartbeat(seen: View) -> str:
    if seen.heartbeat_s is None or seen.state != RUNNING:
        return ""
    return f"last heartbeat {span(seen.heartbeat_s)} ago"


def _loss(seen: View, width: int) -> str:
    if seen.loss is None:
        return ""
    smoothed = f"({number(seen.loss_smoothed)} smoothed)"
    return _joined(number(seen.loss), smoothed, sparkline(seen.curve, min(width, 60)))


def _training(seen: View) -> str:
    named = (
        *(("lr", seen.lr), ("grad norm", seen.grad_norm), ("skipped", seen.skipped)),
        *(("reward", seen.reward), ("reward std", seen.reward_std)),
    )
    return _joined(*(f"{name} {number(value)}" for name, value in named if value is not None))


def _best(seen: View) -> str:
    best = seen.best
    if not best:
        return ""
    return f"{best['name']} {number(best['value'])} in epoch {best['epoch']} (step {best['step']})"


def _memory(seen: View) -> str:
    own = "" if seen.memory_bytes is None else f"this run {size(seen.memory_bytes)}"
    disk = "" if seen.disk_free_bytes is None else f"disk {size(seen.disk_free_bytes)} free"
    return _joined(own, *gpu_texts(seen), disk)
