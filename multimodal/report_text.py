"""A report's JSON as Markdown, with the front matter of a model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_RETRIEVAL = "retrieval"
_WHOLE = {  # sections in their order: key → heading
    "summary": "Result",
    "stages": "Stages",
    "data": "Data",
    _RETRIEVAL: "Retrieval",
    "evaluation": "Evaluation",
    "model": "Model",
    "pretrained": "Start",
    "checkpoints": "Checkpoints",
    "environment": "Environment",
    "config": "Settings",
}
_NO_SECTION = {
    "schema",
    "name",
    "status",
    "reason",
    "started_at",
    "updated_at",
    "command",
    "curves",
}


def render(report: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [_front_matter(report), f"# {report['name']}", _head(report)]
    others = [key for key in report if key not in _WHOLE and key not in _NO_SECTION]
    for key in [*_WHOLE, *others]:
        if report.get(key) not in (None, [], {}):
            parts += [
                f"## {_WHOLE.get(key, key.replace('_', ' ').capitalize())}",
                _body(report[key]),
            ]
        if key == "stages" and report.get("curves"):
            parts += ["## Curves", *(f"![{c['title']}]({c['file']})" for c in report["curves"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: Mapping[str, Any]) -> str:
    """What Hugging Face's Hub reads of a model's page."""
    data = sorted({row["data_set"] for row in report.get("data", []) if "left_out" not in row})
    lines = ["---", "license: mit", "pipeline_tag: feature-extraction", "library_name: pytorch"]
    lines += ["datasets:", *(f"- {name}" for name in data)] if data else []
    return "\n".join([*lines, "---"])


def _head(report: Mapping[str, Any]) -> str:
    lines = [f"- status: **{report['status']}**"]
    for name in ("reason", "started_at", "updated_at", "command"):
        if report.get(name):
            value = f"`{report[name]}`" if name == "command" else report[name]
            lines.append(f"- {name.replace('_', ' ')}: {value}")
    return "\n".join(lines)


def _body(content: Any) -> str:
    if isinstance(content, Mapping):
        return _pairs(content)
    if isinstance(content, Sequence) and not isinstance(content, str):
        if content and all(isinstance(row, Mapping) for row in content):
            return _table(content)
        return "\n".join(f"- {_cell(item)}" for item in content)
    return str(content)


def _pairs(content: Mapping[str, Any]) -> str:
    """Plain values as a table of two columns; lists of rows below, each with its name."""
    plain = [(name, value) for name, value in content.items() if not _is_rows(value)]
    parts = []
    if plain:
        rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in plain]
        parts.append("\n".join(["| | |", "| :--- | :--- |", *rows]))
    for name, value in content.items():
        if _is_rows(value):
            parts += [f"### {name.replace('_', ' ')}", _table(value)]
    return "\n\n".join(parts)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [_line(columns), _line(":---" for _ in columns)]
    lines += [_line(_cell(row.get(name)) for name in columns) for row in rows]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    """One value in few characters, safe inside a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_cell(item)}" for name, item in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value) or "–"
    return " ".join(str(value).split()).replace("|", "\\|")
