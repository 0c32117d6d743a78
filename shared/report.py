"""report.html: a run as a page to look at.

    write(run_dir)      run_dir/report.html

Made of what the run directory holds (shared/run_status.py), whole or not. A recipe adds to its
report by putting PNG, JPEG, SVG or HTML files into `pages/` of the run directory, or by naming them
among the outputs of its status; HTML pages in `evaluation/` are taken too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from shared import run_status
from shared.errors import UserError, one_line
from shared.files import is_file, read_bytes
from shared.page import Page, Picture
from shared.progress import clock
from shared.run_status import Run, Series, number
from shared.run_text import percent
from shared.settings import flat

log = logging.getLogger(__name__)

NAME = "report.html"
STAGE = "stage"  # a tag of metrics.jsonl: charts mark the steps at which its value changes

PAGES = "pages"  # of a run directory: the pictures and tables that a recipe adds to the report
EVALUATION = "evaluation"  # where its evaluate.py writes: of what is there, the pages
PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".html")
_LOG_END = 60  # lines
_LARGEST_PICTURE, _LARGEST_PAGE = 8_000_000, 40_000_000  # bytes
_BANNERS = {"done": "good", "failed": "bad", "stale": "bad"}
_WORDS = {"done": "Finished", "stopped": "Stopped", "failed": "Failed"}
_RESULT = {
    "before": "before",
    "after": "after",
    "unit": "unit",
    "n": "N",
    "chance": "chance",
    "majority": "majority answer",
}

_CHARTS = 24  # of a page, at most
_SPEED = ("steps_per_s", "samples_per_s")
_SAME = {"Loss/Total": "loss", "lowest_loss": "loss"}  # documented tags of one quantity
_PREFIX = re.compile(r"^(train|val|valid|validation|eval|epoch)[/_]")


def write(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of the run in `run_dir` to `out` (default: beside its files); its path.

    Raises UserError when there is no run to report on, or `out` cannot be written.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no directory: give a run directory, with status.json in it")
    run = run_status.read(run_dir)
    config = run_status.json_object(run_dir / "config.json", run.problems)
    curves = run_status.curves(run)
    if not (run.status or config or curves):
        problems = "; ".join(run.problems)
        raise UserError(f"{run_dir} holds no run ({problems}): give a directory with status.json")
    out, page = out or run_dir / NAME, _report(run, config, curves)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.write(out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {one_line(error)}; choose another --out"
        ) from None
    return out


def refresh(run_dir: Path) -> None:
    """Write the report anew if a run is there. Never raises: a page is not worth a run."""
    if not is_file(run_dir / "status.json"):
        return
    try:
        write(run_dir)
    except Exception as error:
        log.warning("no %s in %s: %s", NAME, run_dir, one_line(error))


# --- one run --------------------------------------------------------------------------------------


def _report(run: Run, config: dict[str, Any], curves: dict[str, dict[str, Series]]) -> Page:
    own, log_file = run.run_dir.absolute().name, _log_of(run)
    page = Page(" · ".join(dict.fromkeys(part for part in (_text(run, "recipe"), own) if part)))
    page.banner(_ending(run), _BANNERS.get(run.state, "open"))
    problems = [f"Not shown: {problem}." for problem in run.problems]
    page.warnings([*problems, *run_status.warnings_of(log_file, 10)])
    _add_result(page, run)
    _add_curves(page, curves)
    _add_settings(page, config)
    _add_pictures(page, run)
    _add_facts(page, run, config)
    if lines := run_status.log_lines(log_file, _LOG_END):
        page.lines(f"End of the log: {log_file}", lines, is_open=run.state != "done")
    return page


def _ending(run: Run) -> str:
    """How the run ended, in words."""
    reason, code = _text(run, "reason"), run.status.get("exit_code")
    if run.state in run_status.LIVE:
        told = [_place(run), run.note if run.state == run_status.SILENT else ""]
        return f"Still running when this page was written: {', '.join(filter(None, told))}."
    if run.state == run_status.STALE:
        place = f" It was {_place(run)}." if run.status else ""
        return f"Stale: {run.note}.{place}"
    told = f"{_WORDS[run.state]} (exit code {as_text(code)})" if code else _WORDS[run.state]
    return f"{told}: {reason}" if reason else f"{told}."


def _place(run: Run) -> str:
    if run.status.get("step") is None:
        return "before the first step"
    step, total = (as_text(run.status.get(name)) for name in ("step", "total_steps"))
    left = number(run.status.get("eta_s"))
    if run.state in run_status.LIVE and left and math.isfinite(left):
        return f"at step {step} of {total}, {clock(left)} left"
    return f"at step {step} of {total}"


def _text(run: Run, name: str) -> str:
    """A field of status.json as one line of text; '' without it."""
    value = run.status.get(name)
    return "" if value is None else " ".join(str(value).split())[:2000]


def _mapping(value: Any) -> dict[str, Any]:
    """`value` where it is a mapping, else {}."""
    return {str(name): item for name, item in value.items()} if isinstance(value, dict) else {}


def _add_result(page: Page, run: Run) -> None:
    """The run's result with all that is known of it, the last and the best values, the data."""
    result = _mapping(run.status.get("result"))
    higher = result.pop("higher_is_better", None)
    better = {True: " (higher is better)", False: " (lower is better)"}.get(higher, "")
    if result.get("unit") == "share":
        del result["unit"]
        result = {name: percent(v) if isinstance(v, float) else v for name, v in result.items()}
    if result:
        name = as_text(result.pop("name", "result")) + better
        columns = [*_RESULT, *(column for column in result if column not in _RESULT)]
        columns = [column for column in columns if column in result]
        headers = ["result", *(_RESULT.get(column, column) for column in columns)]
        page.table(headers, [(name, *(_cell(result[column]) for column in columns))])
    last, best = (_mapping(run.status.get(name)) for name in ("last", "best"))
    rows = [(n, _cell(last.get(n)), _cell(best.get(n))) for n in dict.fromkeys([*last, *best])]
    if rows:
        page.table(("", "last", "best"), rows, fold="Last and best values")
    _add_mapping(page, "Data", ("data", "count"), flat(_mapping(run.status.get("data"))))


def _add_curves(page: Page, read: dict[str, dict[str, Series]]) -> None:
    """A chart for each quantity; what is the same at every step is named in a line."""
    curves = _quantities(read)
    if not curves:
        return
    page.section("Curves")
    flat_ones = {tag: value for tag in curves if (value := _only_value(curves[tag])) is not None}
    if flat_ones:
        told = ", ".join(f"{tag} {flat_ones[tag]:.6g}" for tag in sorted(flat_ones))
        page.text(f"Never changed: {told}.")
    moving = [tag for tag in curves if tag not in flat_ones]
    moving.sort(key=lambda tag: (tag in _SPEED, "loss" not in tag.lower()))
    borders = _borders(read.get(STAGE, {}))
    page.charts(
        {
            tag: {"lines": curves[tag], "log_y": _spans(tag, curves[tag]), "borders": borders}
            for tag in moving[:_CHARTS]
        }
    )
    if len(moving) > _CHARTS:
        page.text(f"Not shown: {len(moving) - _CHARTS} more curves of metrics.jsonl.")


def _quantities(curves: Mapping[str, Mapping[str, Series]]) -> dict[str, dict[str, Series]]:
    """The lines of each chart: training and validation of one thing are in one.

    Recipes tell them apart by the split or by the name (loss and val/loss, train_loss and
    val_loss). `best` repeats points of other splits, so it is shown only where it is alone.
    """
    found: dict[str, dict[str, Series]] = {}
    for tag, splits in curves.items():
        prefix = _PREFIX.match(tag)
        quantity = _PREFIX.sub("", tag) or tag
        lines = found.setdefault(_SAME.get(quantity, quantity), {})
        for split, series in splits.items():
            name = prefix[1] if prefix and split not in ("train", "val", "best") else split
            lines[name if name not in lines else f"{name} ({tag})"] = series
    found.pop(STAGE, None)
    for tag, lines in found.items():
        if len(lines) > 1:
            lines.pop("best", None)
        found[tag] = dict(sorted(lines.items(), key=lambda line: line[0] != "train"))
    return found


def _only_value(lines: Mapping[str, Series]) -> float | None:
    """The value that all of several points have, else None."""
    values = [value for _, line in lines.values() for value in line]
    is_flat = len(values) > 1 and len(set(values)) == 1 and math.isfinite(values[0])
    return values[0] if is_flat else None


def _spans(tag: str, lines: Mapping[str, Series]) -> bool:
    """Whether it is a loss over more than two decades, which only a logarithmic axis shows."""
    values = [value for _, line in lines.values() for value in line if math.isfinite(value)]
    return "loss" in tag.lower() and bool(values) and max(values) > 100 * min(values) > 0


def _borders(stages: Mapping[str, Series]) -> dict[float, str]:
    """Step → 'stage 2' for each step at which the stage changes."""
    found: dict[float, str] = {}
    for steps, values in stages.values():
        before = values[0]
        for step, value in zip(steps, values, strict=True):
            if value != before and math.isfinite(value):
                found[step], before = f"stage {value:.6g}", value
    return found


def _add_settings(page: Page, config: dict[str, Any]) -> None:
    settings, defaults = (flat(_mapping(config.get(name))) for name in ("settings", "defaults"))
    if not settings:
        return
    page.section("Settings")
    names = sorted(name for name in defaults if name in settings)
    changed = [(name, as_text(settings[name]), as_text(defaults[name])) for name in names]
    if changed:
        page.table(("differs from the default", "value", "default"), changed)
    elif "defaults" in config:
        page.text("Every setting has its default.")
    rows = [(name, as_text(value)) for name, value in sorted(settings.items())]
    page.table(("setting", "value"), rows, fold=f"All {len(rows)} settings")


def _add_pictures(page: Page, run: Run) -> None:
    """The pictures, and pages of a recipe in frames that run no script and fetch nothing."""
    pictures = _pictures_of(run)
    if not pictures:
        return
    page.section("Pictures")
    room = _LARGEST_PAGE
    for path in pictures:
        try:
            content = read_bytes(path) if path.stat().st_size <= _LARGEST_PICTURE else None
            if content is None or len(content) > room:
                page.text(f"Not shown, too large: {path}")
                continue
            if path.suffix.lower() == ".html":
                page.frame(path.name, content.decode("utf-8", "replace"))
            else:
                page.pictures([Picture(content, path.stem)])
            room -= len(content)
        except (OSError, ValueError) as error:
            page.text(f"Not shown: {path.name}: {one_line(error)[:200]}")


def _add_facts(page: Page, run: Run, config: dict[str, Any]) -> None:
    """When and where, and the environment."""
    page.section("Run")
    names = ("state", "exit_code", "step", "total_steps", "epoch", "started_at", "updated_at")
    facts = {"directory": str(run.run_dir)}
    facts |= {name: run.status[name] for name in names if name in run.status}
    if seconds := _seconds_of(run):
        facts["duration"] = clock(seconds)
    command = config.get("command", run.status.get("command"))
    facts |= {"command": command} if isinstance(command, str) else {}
    rows = [(name, as_text(value)) for name, value in facts.items()]
    outputs = run.status.get("outputs")
    outputs = outputs if isinstance(outputs, list) else []
    rows += [("output", as_text(path).removeprefix(f"{run.run_dir}/")) for path in outputs]
    page.table(("run", ""), rows)
    host = {"host": run.status.get("host"), "processes": run.status.get("world_size")}
    environment = {name: value for name, value in host.items() if value is not None}
    for name in ("environment", "versions"):
        environment |= flat(_mapping(config.get(name)))
    _add_mapping(page, "Environment", ("environment", ""), environment)


def _log_of(run: Run) -> Path | None:
    """The run's log file: as status.json names it, else the newest in the run directory."""
    named = run.status.get("log")
    candidates = [Path(named)] if isinstance(named, str) and named else []
    with contextlib.suppress(OSError):
        candidates += sorted(run.run_dir.glob("*.log"), key=lambda p: p.stat().st_mtime)[::-1]
    return next((path for path in candidates if is_file(path)), None)


def _pictures_of(run: Run) -> list[Path]:
    """Files of pages/ by their names, pages of an evaluation, pictures among the run's outputs."""
    found: list[Path] = []
    for pattern in (f"{PAGES}/*", f"{EVALUATION}/*.html"):
        with contextlib.suppress(OSError):
            found += sorted(run.run_dir.glob(pattern))
    outputs = run.status.get("outputs")
    names = [name for name in outputs if isinstance(name, str)] if isinstance(outputs, list) else []
    found += [run.run_dir / name for name in names]  # an absolute one stays as it is
    inside = [path for path in found if path.suffix.lower() in PICTURES and is_file(path)]
    return [path for path in dict.fromkeys(inside) if path.name != "report.html"]


def _add_mapping(
    page: Page, heading: str, headers: tuple[str, str], values: Mapping[str, Any]
) -> None:
    if values:
        page.table(headers, [(n, as_text(value)) for n, value in values.items()], fold=heading)


# --- values ---------------------------------------------------------------------------------------


def as_text(value: Any) -> str:
    """A value as the tables show it: texts as they are, all else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):
        return repr(type(value))


def _cell(value: Any) -> Any:
    """A figure as a table shows it; all else as text."""
    is_figure = isinstance(value, (int, float)) and not isinstance(value, bool)
    shown = value is None or (is_figure and abs(value) < 10**15)
    return value if shown else as_text(value)


def _seconds_of(run: Run) -> float:
    """From the start of the run (or of its continuation) to its last word; 0 when not known."""
    try:
        times = [datetime.fromisoformat(_text(run, n)) for n in ("started_at", "updated_at")]
        return max(0.0, (times[1] - times[0]).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
