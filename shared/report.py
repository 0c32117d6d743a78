"""report.html: a run as a page to look at; compare.html: several runs side by side.

    write(run_dir)                           run_dir/report.html
    write_comparison(run_dirs, out)

Made of what the run directory holds (see shared/run_record.py), whole or not. A recipe adds to its
report by putting PNG, JPEG, SVG or HTML files into `pages/` of the run directory, or by naming them
among the outputs of its status; HTML pages in `evaluation/` are taken too. Standard library only,
for the launcher.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from shared import page as html
from shared.errors import UserError, one_line
from shared.files import is_file, write_text
from shared.page import Markup, Page
from shared.run_record import RunRecord, Series, as_text, flat, number, read
from shared.safe_html import harmless

log = logging.getLogger(__name__)

Curves = dict[str, dict[str, Series]]  # tag → line → series

NAME = "report.html"

_POINTS = 300  # buckets of a long series; each keeps its lowest and its highest value
_TAGS = 60  # curves of one page
_LARGEST_PICTURE, _LARGEST_PAGE = 8_000_000, 40_000_000  # bytes
_SPEED = ("steps_per_s", "samples_per_s")
_PREFIX = re.compile(r"^(train|val|valid|validation|eval|epoch)[/_]")
_KINDS = {"done": "good", "failed": "bad", "killed": "bad"}


def write(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of the run in `run_dir` to `out` (default: beside its files); its path.

    Raises UserError when there is no run to report on, or `out` cannot be written.
    """
    return _put(out or run_dir / NAME, _report(_known(run_dir)).render())


def refresh(run_dir: Path) -> None:
    """Write the report anew if a run is there. Never raises: a page is not worth a run."""
    if not is_file(run_dir / "status.json"):
        return
    try:
        write(run_dir)
    except Exception as error:
        log.warning("no %s in %s: %s", NAME, run_dir, one_line(error))


def write_comparison(run_dirs: list[Path], out: Path) -> Path:
    """Write the page that shows the runs side by side; its path. Errors as `write`."""
    records = [_known(path) for path in run_dirs]
    return _put(out, _comparison(_named_apart(records)).render())


def _put(out: Path, text: str) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text, durable=False)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {one_line(error)}; choose another --out"
        ) from None
    return out


def _known(run_dir: Path) -> RunRecord:
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is no directory: give a run directory, where status.json lies")
    record = read(run_dir)
    if not (record.status or record.config or record.curves):
        problems = "; ".join(record.problems)
        raise UserError(f"{run_dir} holds no run ({problems}): give a directory with status.json")
    return record


# --- one run --------------------------------------------------------------------------------------


def _report(record: RunRecord) -> Page:
    page = Page(record.name)
    page.add(html.banner(_ending(record), _KINDS.get(record.state, "open")))
    _add_table(page, ("", "before", "after"), _result_rows(record))
    _add_table(page, ("run", ""), _facts(record))
    for problem in record.problems:
        page.add(f"Not shown: {problem}.")
    _add_curves(page, _charts(record.curves))
    _add_numbers(page, record)
    _add_pictures(page, record)
    _add_settings(page, record)
    _add_section(page, "Environment", ("", ""), record.environment)
    if record.log_end:
        page.section("End of the log")
        page.add(html.verbatim(record.log_end), str(record.log))
    return page


def _ending(record: RunRecord) -> str:
    """How the run ended, in words."""
    reason, place = record.text("reason"), _place(record)
    code = record.status.get("exit_code")
    if record.state == "running":
        return f"Still running when this page was written: {place}."
    if record.state == "killed":
        pid = record.status.get("pid")
        return (
            f"Killed: process {pid} is gone and had no time to say why; it was {place}. The same "
            "command continues from the last checkpoint."
        )
    words = {"done": "Finished", "stopped": "Stopped", "failed": "Failed"}
    word = words.get(record.state, "Nothing says how this run ended")
    told = f"{word} (exit code {as_text(code)})" if code else word
    return f"{told}: {reason}" if reason else f"{told}."


def _place(record: RunRecord) -> str:
    step, total = (as_text(record.status.get(name)) for name in ("step", "total_steps"))
    left = number(record.status.get("eta_s"))
    rest = f", about {_duration(left)} to go" if left and record.state == "running" else ""
    return f"at step {step} of {total}{rest}"


def _result_rows(record: RunRecord) -> list[tuple[Any, ...]]:
    result = record.mapping("result")
    if not result:
        return []
    higher = result.get("higher_is_better")
    better = f" ({'higher' if higher else 'lower'} is better)" if isinstance(higher, bool) else ""
    return [
        (
            as_text(result.get("name")) + better,
            _cell(result.get("before")),
            _cell(result.get("after")),
        )
    ]


def _facts(record: RunRecord) -> list[tuple[str, Any]]:
    names = ("state", "exit_code", "step", "total_steps", "epoch", "started_at", "updated_at")
    rows = [(name, as_text(record.status[name])) for name in names if name in record.status]
    if seconds := _seconds(record):
        rows.append(("duration", _duration(seconds)))
    command = record.config.get("command", record.status.get("command"))
    rows += [("command", command)] if isinstance(command, str) else []
    outputs = record.status.get("outputs")
    rows += [("output", as_text(path)) for path in (outputs if isinstance(outputs, list) else [])]
    return [("directory", str(record.run_dir)), *rows]


def _add_numbers(page: Page, record: RunRecord) -> None:
    """The last and the best values, and how much data there was."""
    best, last = record.mapping("best"), record.mapping("last")
    rows = [(n, _cell(last.get(n)), _cell(best.get(n))) for n in dict.fromkeys([*last, *best])]
    if rows:
        page.section("Last and best values")
        page.add(html.table(("", "last", "best"), rows))
    _add_section(page, "Data", ("", "count"), flat(record.mapping("data")))


def _add_settings(page: Page, record: RunRecord) -> None:
    settings, defaults = record.settings, record.defaults
    if not settings:
        return
    page.section("Configuration")
    names = sorted(name for name in defaults if name in settings)
    changed = [(name, as_text(settings[name]), as_text(defaults[name])) for name in names]
    if changed:
        page.add(html.table(("differs from the defaults", "value", "default"), changed))
    elif "defaults" in record.config:
        page.add("Every setting has its default.")
    rows = [(name, as_text(value)) for name, value in sorted(settings.items())]
    all_of_them = html.table(("setting", "value"), rows)
    page.add(html.folded(f"All {len(rows)} settings", all_of_them))


def _add_section(
    page: Page, heading: str, headers: tuple[str, str], values: Mapping[str, Any]
) -> None:
    if values:
        page.section(heading)
        page.add(html.table(headers, [(name, as_text(value)) for name, value in values.items()]))


def _add_table(page: Page, headers: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    if rows:
        page.add(html.table(headers, rows))


# --- curves ---------------------------------------------------------------------------------------


def _charts(curves: Curves) -> Curves:
    """The lines of each chart: training and validation of one thing stand in one.

    Recipes tell them apart by the split or by the name (loss and val/loss, train_loss and
    val_loss). `best` repeats points of other splits, so it stands there only where it is alone.
    """
    found: Curves = {}
    for tag, splits in curves.items():
        prefix = _PREFIX.match(tag)
        lines = found.setdefault(_PREFIX.sub("", tag) or tag, {})
        for split, series in splits.items():
            name = prefix[1] if prefix and split not in ("train", "val", "best") else split
            lines[name if name not in lines else f"{name} ({tag})"] = series
    for tag, lines in found.items():
        if len(lines) > 1:
            lines.pop("best", None)
        found[tag] = dict(sorted(lines.items(), key=lambda line: line[0] != "train"))
    return found


def _add_curves(page: Page, curves: Curves) -> None:
    """A chart a tag, and a logarithmic one beside it where the values span more than a decade."""
    tags = sorted(curves, key=lambda tag: (tag in _SPEED, "loss" not in tag.lower()))
    if not tags:
        return
    page.section("Curves")
    charts: list[Markup] = []
    for tag in tags[:_TAGS]:
        lines = {name or "value": thinned(*series) for name, series in curves[tag].items()}
        charts.append(html.line_chart(lines, x_label="step", y_label=tag))
        if _spans_a_decade(lines.values()):
            label = f"{tag}, logarithmic"
            charts.append(html.line_chart(lines, x_label="step", y_label=label, log_y=True))
    page.add(html.columns(charts))
    if len(tags) > _TAGS:
        page.add(f"Not shown: {len(tags) - _TAGS} more curves of metrics.jsonl.")


def thinned(steps: list[float], values: list[float], buckets: int = _POINTS) -> Series:
    """The series as a chart can show it: of each of `buckets` parts the lowest and highest point.

    Ends and gaps (NaN) stay.
    """
    if len(steps) <= 2 * buckets:
        return steps, values
    kept = {0, len(steps) - 1}
    for part in range(buckets):
        places = range(len(steps) * part // buckets, len(steps) * (part + 1) // buckets)
        finite = [place for place in places if math.isfinite(values[place])]
        gaps = [place for place in places if not math.isfinite(values[place])]
        kept.update(gaps[:1])
        kept.update(pick(finite, key=values.__getitem__) for pick in (min, max) if finite)
    chosen = sorted(kept)
    return [steps[place] for place in chosen], [values[place] for place in chosen]


def _spans_a_decade(lines: Iterable[Series]) -> bool:
    finite = [value for _, values in lines for value in values if math.isfinite(value)]
    return len(finite) > 1 and min(finite) > 0 and max(finite) > 10 * min(finite)


# --- pictures -------------------------------------------------------------------------------------


def _add_pictures(page: Page, record: RunRecord) -> None:
    if not record.pictures:
        return
    page.section("Pictures")
    room = _LARGEST_PAGE
    for path in record.pictures:
        try:
            content = path.read_bytes() if path.stat().st_size <= _LARGEST_PICTURE else None
            if content is None or len(content) > room:
                page.add(f"Not shown, too large: {path}")
                continue
            page.add(_embedded(path, content), path.name)
            room -= len(content)
        except (OSError, ValueError) as error:
            page.add(f"Not shown: {path.name}: {one_line(error)[:200]}")


def _embedded(path: Path, content: bytes) -> Markup:
    if path.suffix.lower() == ".html":
        return harmless(content.decode("utf-8", "replace"))
    if path.suffix.lower() == ".svg":
        if b"<svg" not in content[:2000]:
            raise ValueError("no SVG drawing")
        return html.drawing(content, path.stem)
    return html.thumbnail(content, path.stem)


# --- several runs ---------------------------------------------------------------------------------


def _named_apart(records: list[RunRecord]) -> dict[str, RunRecord]:
    """The runs under the shortest ends of their paths that tell them apart."""
    paths = [record.run_dir.absolute().parts for record in records]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, records, strict=True))
    raise UserError("the same run is named twice: give different run directories")


def _comparison(runs: dict[str, RunRecord]) -> Page:
    page = Page(f"{len(runs)} runs side by side")
    page.section("Results")
    page.add(html.table(("", *runs), _rows_of({n: _outcome(r) for n, r in runs.items()})))
    for name, record in runs.items():
        for problem in record.problems:
            page.add(f"Not shown of {name}: {problem}.")
    page.section("Settings that differ")
    differing = _differing({name: record.settings for name, record in runs.items()})
    if differing:
        page.add(html.table(("setting", *runs), differing))
    else:
        page.add("None.")
    _add_curves(page, _together(runs))
    page.section("Environment")
    page.add(html.table(("", *runs), _rows_of({n: r.environment for n, r in runs.items()})))
    return page


def _outcome(record: RunRecord) -> dict[str, Any]:
    """What the table of results says of a run."""
    said: dict[str, Any] = {"ended": record.state, "reason": record.text("reason")}
    result = record.mapping("result")
    if result:
        name = as_text(result.get("name"))
        said |= {f"{name}, {when}": result.get(when) for when in ("before", "after")}
    said["step"] = record.status.get("step")
    said["duration"] = _duration(seconds) if (seconds := _seconds(record)) else None
    for when in ("best", "last"):
        said |= {f"{when} {tag}": value for tag, value in record.mapping(when).items()}
    return said


def _rows_of(columns: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """A row for each name in any of the columns."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [[n, *(_cell(column.get(n)) for column in columns.values())] for n in names]


def _differing(settings: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    return [row for row in sorted(_rows_of(settings)) if any(cell != row[1] for cell in row[2:])]


def _together(runs: dict[str, RunRecord]) -> Curves:
    """Curves by tag, with the lines of all runs."""
    found: Curves = {}
    for name, record in runs.items():
        for tag, lines in _charts(record.curves).items():
            for split, series in lines.items():
                found.setdefault(tag, {})[f"{name} {split}".strip()] = series
    return found


# --- values ---------------------------------------------------------------------------------------


def _cell(value: Any) -> Any:
    """A value as a table of figures shows it: to six digits, to the right; all else as text."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    is_plain = value is None or (isinstance(value, int) and not isinstance(value, bool))
    return value if is_plain and abs(value or 0) < 10**15 else as_text(value)


def _seconds(record: RunRecord) -> float:
    """From the start of the run (or of its continuation) to its last word; 0 when not known."""
    try:
        times = [datetime.fromisoformat(record.text(n)) for n in ("started_at", "updated_at")]
        return max(0.0, (times[1] - times[0]).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _duration(seconds: float) -> str:
    """3725 → '1 h 02 min'."""
    if not math.isfinite(seconds):
        return "an unknown time"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
