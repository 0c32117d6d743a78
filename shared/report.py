"""report.html: a run as a page to look at.

    write(run_dir)      run_dir/report.html

Made of what the run directory holds (see shared/run_record.py), whole or not. A recipe adds to its
report by putting PNG, JPEG, SVG or HTML files into `pages/` of the run directory, or by naming them
among the outputs of its status; HTML pages in `evaluation/` are taken too. Standard library only,
for the launcher.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from shared import page as html
from shared.errors import UserError, one_line
from shared.files import is_file, write_text
from shared.page import Markup, Page
from shared.report_curves import add_curves, charts
from shared.run_record import RunRecord, as_text, flat, number, read
from shared.safe_html import harmless

log = logging.getLogger(__name__)

NAME = "report.html"

_LARGEST_PICTURE, _LARGEST_PAGE = 8_000_000, 40_000_000  # bytes
_KINDS = {"done": "good", "failed": "bad", "killed": "bad"}


def write(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of the run in `run_dir` to `out` (default: beside its files); its path.

    Raises UserError when there is no run to report on, or `out` cannot be written.
    """
    return put(out or run_dir / NAME, _report(known(run_dir)).render())


def refresh(run_dir: Path) -> None:
    """Write the report anew if a run is there. Never raises: a page is not worth a run."""
    if not is_file(run_dir / "status.json"):
        return
    try:
        write(run_dir)
    except Exception as error:
        log.warning("no %s in %s: %s", NAME, run_dir, one_line(error))


def put(out: Path, text: str) -> Path:
    """Write a page; its path. Raises UserError when it cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text, durable=False)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {one_line(error)}; choose another --out"
        ) from None
    return out


def known(run_dir: Path) -> RunRecord:
    """What is known of the run in `run_dir`. Raises UserError when there is none."""
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
    add_curves(page, charts(record.curves))
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
    rest = f", about {duration(left)} to go" if left and record.state == "running" else ""
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
            cell(result.get("before")),
            cell(result.get("after")),
        )
    ]


def _facts(record: RunRecord) -> list[tuple[str, Any]]:
    names = ("state", "exit_code", "step", "total_steps", "epoch", "started_at", "updated_at")
    rows = [(name, as_text(record.status[name])) for name in names if name in record.status]
    if seconds := seconds_of(record):
        rows.append(("duration", duration(seconds)))
    command = record.config.get("command", record.status.get("command"))
    rows += [("command", command)] if isinstance(command, str) else []
    outputs = record.status.get("outputs")
    outputs = outputs if isinstance(outputs, list) else []
    rows += [("output", as_text(path).removeprefix(f"{record.run_dir}/")) for path in outputs]
    return [("directory", str(record.run_dir)), *rows]


def _add_numbers(page: Page, record: RunRecord) -> None:
    """The last and the best values, and how much data there was."""
    best, last = record.mapping("best"), record.mapping("last")
    rows = [(n, cell(last.get(n)), cell(best.get(n))) for n in dict.fromkeys([*last, *best])]
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


# --- values ---------------------------------------------------------------------------------------


def cell(value: Any) -> Any:
    """A value as a table of figures shows it: to six digits, to the right; all else as text."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    is_plain = value is None or (isinstance(value, int) and not isinstance(value, bool))
    return value if is_plain and abs(value or 0) < 10**15 else as_text(value)


def seconds_of(record: RunRecord) -> float:
    """From the start of the run (or of its continuation) to its last word; 0 when not known."""
    try:
        times = [datetime.fromisoformat(record.text(n)) for n in ("started_at", "updated_at")]
        return max(0.0, (times[1] - times[0]).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def duration(seconds: float) -> str:
    """3725 → '1 h 02 min'."""
    if not math.isfinite(seconds):
        return "an unknown time"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
