"""A run's view as text: the block that a monitor shows, and the table of several runs.

Standard library only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from shared.progress import clock
from shared.run_view import FAILED, RUNNING, View

_BARS = "▁▂▃▄▅▆▇█"
_NAME = 9  # columns of the names on the left


def block(seen: View, width: int = 100) -> str:
    """Everything about one run, a topic a line; what is not known is left out."""
    lines = [headline(seen)]
    for name, text in (
        ("note", seen.note),
        ("reason", seen.reason or ""),
        ("progress", _progress(seen)),
        (
            "speed",
            _joined(_with(seen.samples_per_s, "samples/s"), _with(seen.steps_per_s, "steps/s")),
        ),
        ("loss", _loss(seen, width - _NAME - 45)),
        ("training", _training(seen)),
        ("best", _best(seen)),
        ("val", "  ".join(f"{name} {number(value)}" for name, value in seen.validation.items())),
        ("result", _result(seen)),
        ("memory", _memory(seen)),
        ("run", f"pid {seen.pid} on {seen.host}, {seen.run_dir}" if seen.pid else seen.run_dir),
        ("log", seen.log or ""),
    ):
        if text:
            lines.append(f"{name:<{_NAME}}{text}")
    if seen.warnings:
        lines += ["last warnings and errors", *(f"  {line[: width - 2]}" for line in seen.warnings)]
    return "\n".join(lines)


def headline(seen: View) -> str:
    """'lavic: RUNNING', with the code of one that failed."""
    code = f" (exit {seen.exit_code})" if seen.state == FAILED else ""
    return f"{seen.recipe or Path(seen.run_dir).name}: {seen.state.upper()}{code}"


def short(seen: View) -> str:
    """One line about one run, for files and pipes."""
    parts = [headline(seen), _progress(seen)]
    parts += [f"loss {number(seen.loss)}" if seen.loss is not None else ""]
    return "  ".join(part for part in (*parts, seen.note) if part)


def table(views: Sequence[View], root: Path) -> str:
    """Several runs, a row each."""
    rows: list[tuple[str, ...]] = [("recipe", "state", "step", "updated", "directory")]
    for seen in views:
        path = Path(seen.run_dir)
        place = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        code = f" ({seen.exit_code})" if seen.state == FAILED else ""
        step = "-" if seen.step is None else f"{seen.step}/{seen.total_steps or '?'}"
        state = seen.state.upper() + code
        rows.append((seen.recipe or "-", state, step, seen.updated_at or "-", place))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


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


def size(num_bytes: float | None) -> str:
    """1610612736 → '1.5 GiB'."""
    if num_bytes is None:
        return "-"
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _joined(*parts: str) -> str:
    return "  ".join(part for part in parts if part)


def _with(value: float | None, unit: str) -> str:
    return "" if value is None else f"{number(value)} {unit}"


def _progress(seen: View) -> str:
    if seen.step is None:
        return ""
    share = "" if seen.percent is None else f" ({seen.percent} %)"
    left = "" if seen.eta_s is None else f"ETA {clock(seen.eta_s)}"
    epoch = "" if seen.epoch is None else f"epoch {seen.epoch}"
    age = (
        ""
        if seen.heartbeat_s is None or seen.state != RUNNING
        else f"heard {seen.heartbeat_s:.0f} s ago"
    )
    return _joined(f"step {seen.step}/{seen.total_steps or '?'}{share}", epoch, left, age)


def _loss(seen: View, width: int) -> str:
    if seen.loss is None:
        return ""
    smoothed = f"({number(seen.loss_smoothed)} smoothed)"
    return _joined(number(seen.loss), smoothed, sparkline(seen.curve, min(width, 60)))


def _training(seen: View) -> str:
    named = (("lr", seen.lr), ("grad norm", seen.grad_norm), ("skipped", seen.skipped))
    return _joined(*(f"{name} {number(value)}" for name, value in named if value is not None))


def _best(seen: View) -> str:
    best = seen.best
    if not best:
        return ""
    return f"{best['name']} {number(best['value'])} in epoch {best['epoch']} (step {best['step']})"


def _result(seen: View) -> str:
    result = seen.result
    if not result:
        return ""
    before, after = (number(result.get(when)) for when in ("before", "after"))
    return f"{result.get('name')} {before} -> {after}"


def _memory(seen: View) -> str:
    own = "" if seen.memory_bytes is None else f"this run {size(seen.memory_bytes)}"
    disk = "" if seen.disk_free_bytes is None else f"disk {size(seen.disk_free_bytes)} free"
    return _joined(own, *gpu_texts(seen), disk)
