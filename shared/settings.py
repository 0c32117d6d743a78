"""What a setting is: its type, its range, and its value from a text, a file or an earlier run.

A number's range is declared with its type: `lr: Positive`, `workers: Workers`, `batch_size: Count`,
or `Annotated[int, Range(32, 4096)]`. Without one it is from 0 to what the range's defaults allow.

Standard library only, and PyYAML where a file is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from shared import gone
from shared.errors import UserError, did_you_mean, one_line, shortened, shown
from shared.files import read_json, read_text

Scope = Literal["result", "length", "free"]

RESUME_WORDS = ("auto", "latest", "never")
_ONE_CALL = (  # asked for anew each time
    *("dry_run", "print_config", "config", "allow_reshard", "fit"),
    *("prove", "replay", "stop_after"),
)
_MOST_BRACKETS = 1_000  # in a file of settings
_MOST_WHOLE = 2**31 - 1  # what torch, numpy and the operating system take as a count
_MOST = 10**9  # of other numbers: far from where half and single precision overflow
_LONGEST_PATH = 4096  # Linux's PATH_MAX


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting takes: from `low` to `high`; without these with above, below."""

    low: float = 0
    high: float = _MOST
    above: bool = False
    below: bool = False

    def fits(self, value: Any, kind: type) -> bool:
        """Whether `value` is one of them, and of this kind, int or float; NaN never is."""
        if isinstance(value, bool) or not isinstance(value, int | kind):
            return False
        is_end = (self.above and value == self.low) or (self.below and value == self.high)
        return self.low <= value <= self.high and not is_end

    def describe(self, kind: type) -> str:
        """The words of a message: a whole number from 1 to 16."""
        what = "a whole number" if kind is int else "a number"
        low = f"above {self.low:,} and up" if self.above else f"from {self.low:,}"
        return f"{what} {low} to {'below ' if self.below else ''}{self.high:,}"


COUNTS = Range(1, _MOST_WHOLE)
Count = Annotated[int, COUNTS]
WORKERS = Range(0, max(16, 4 * (os.cpu_count() or 1)))  # processes or threads
Workers = Annotated[int, WORKERS]
Connections = Annotated[int, Range(1, 1024)]  # threads that wait for a network
PROCESSES = Range(1, max(64, os.cpu_count() or 1))  # on a machine without a GPU
PORTS = Range(1, 65_535)
Port = Annotated[int, PORTS]
SEEDS = Range(0, 2**63 - 1)
Seed = Annotated[int, SEEDS]
SIZES = Range(1, 65_536)  # of a side of a tensor
Size = Annotated[int, SIZES]
Positive = Annotated[float, Range(above=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
ShareAboveZero = Annotated[float, Range(0, 1, above=True)]
Seconds = Annotated[float, Range(0, 2_000_000, above=True)]  # poll() counts to 2**31 milliseconds


def number(name: str, value: Any, kind: type, allowed: Range) -> Any:
    """`value`, a number or its text, as an int or a float that `allowed` holds.

    The only place that decides which numbers a setting takes. Raises UserError.
    """
    try:
        found = kind(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not allowed.fits(found, kind):
        got = shown(value if found is None else found)
        raise UserError(f"{name} must be {allowed.describe(kind)}, got {got}")
    return kind(found)


class Setting(NamedTuple):
    """One leaf of a configuration: its field, its type (without `| None`), its value."""

    field: dataclasses.Field[Any]
    kind: Any
    is_optional: bool
    value: Any
    range: Range | None  # of a number

    @property
    def scope(self) -> Scope:
        """What a resumed run may do with it (see config.option)."""
        return self.field.metadata.get("scope", "result")

    @property
    def choices(self) -> tuple[str, ...]:
        """The texts it may be; () for any other type."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def is_list(self) -> bool:
        """Whether it is several texts."""
        return typing.get_origin(self.kind) is tuple

    @property
    def flags(self) -> list[str]:
        """Its spellings on the command line; [] for what is typed without a name."""
        if self.field.metadata.get("positional"):
            return []
        name = self.field.name.replace("_", "-")
        off = [f"--no-{name}"] if self.kind is bool else []
        return [f"--{name}", *off, *self.field.metadata.get("aliases", ())]


def leaves(config: Any) -> dict[str, Setting]:
    """Every setting of a configuration by name, those of nested dataclasses too.

    A name of the outer dataclass hides the same name of a nested one.
    """
    return {name: leaf for _, section in sections(config) for name, leaf in section.items()}


def sections(config: Any, hidden: Collection[str] = ()) -> Iterator[tuple[Any, dict[str, Setting]]]:
    """A configuration and the dataclasses in it, the outer ones first, each with its settings."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    own, nested = {}, []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            nested.append(value)
        elif item.name not in {"typed", *hidden}:
            own[item.name] = _setting(item, hints[item.name], value)
    yield config, own
    for value in nested:
        yield from sections(value, {*hidden, *own})


def _setting(item: dataclasses.Field[Any], declared: Any, value: Any) -> Setting:
    is_union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    parts = typing.get_args(declared) if is_union else (declared,)
    kind = next(part for part in parts if part is not type(None))
    marks = getattr(kind, "__metadata__", ())
    kind = kind.__origin__ if marks else kind
    default = {int: Range(0, _MOST_WHOLE), float: Range()}.get(kind)
    limits = next((mark for mark in marks if isinstance(mark, Range)), default)
    return Setting(item, kind, type(None) in parts, value, limits)


def settings(
    config: Any, scopes: tuple[Scope, ...] = ("result", "length", "free")
) -> dict[str, Any]:
    """The flat {name: plain JSON value} of a configuration, for the scopes asked for."""
    return {n: plain(leaf.value) for n, leaf in leaves(config).items() if leaf.scope in scopes}


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def flat(values: dict[str, Any], prefix: str = "", depth: int = 20) -> dict[str, Any]:
    """`values` without nesting: {"a": {"b": 1}} → {"a.b": 1}; an empty mapping stays as it is."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value and depth:
            found |= flat(value, f"{prefix}{name}.", depth - 1)
        else:
            found[f"{prefix}{name}"] = value
    return found


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """'name: old → new' for every setting that is not the same in both."""
    names = sorted(before.keys() | now.keys())
    return [
        f"{name}: {before.get(name)} → {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def read(setting: Setting, value: Any, called: str = "") -> Any:
    """`value`, the text of a flag or what a file holds, as the setting's type.

    called: in the message, instead of the setting's name. Raises UserError, which says what is
    allowed.
    """
    name, kind = called or setting.field.name, setting.kind
    if value is None and setting.is_optional:
        return None
    if setting.range:
        return number(name, value, kind, setting.range)
    if kind is bool:
        allowed, found = "true or false", value if isinstance(value, bool) else None
    elif setting.is_list:
        items = tuple(value) if isinstance(value, list) else (None,)
        is_texts = all(isinstance(item, str) for item in items)
        allowed, found = "a list of texts", items if is_texts else None
    elif setting.choices:
        value = "off" if value is False else value  # as YAML reads it
        allowed, found = ", ".join(setting.choices), value if value in setting.choices else None
    elif kind is Path:
        allowed, found = "a path (not empty; ~NAME: a user's home)", _path(value)
    else:
        allowed, found = "a text", _text(value)
    if found is None:
        raise UserError(f"{name} is {shown(value)}, allowed: {allowed}")
    return found


def _text(value: Any) -> str | None:
    """A text or number as a text; None for anything else, and a number beyond Python's decimals."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return str(value)
    return None


def _path(text: Any) -> Path | None:
    """Absolute, from where it was typed; None for what no system takes as a path.

    That is also an empty text, as of a variable that is not set, and the home of an unknown user.
    """
    if isinstance(text, str) and text.strip() and len(text) <= _LONGEST_PATH and "\0" not in text:
        with contextlib.suppress(RuntimeError):
            return Path(text).expanduser().absolute()
    return None


def load_file(path: Path) -> dict[str, Any]:
    """The names and values of a YAML or JSON file, unchecked. Raises UserError."""
    import yaml

    try:
        text = read_text(path, "utf-8-sig")
        if text.count("[") + text.count("{") > _MOST_BRACKETS:  # yaml's time grows with the square
            raise ValueError("it nests too deeply")
        loaded = yaml.safe_load(text) or {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read: {one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise UserError(
            f"--config {path} must hold `name: value` lines, found {type(loaded).__name__}"
        )
    return {name if isinstance(name, str) else shown(name): value for name, value in loaded.items()}


def of_file(known: Mapping[str, Setting], path: Path, *, strict: bool = True) -> dict[str, Any]:
    """The settings of a YAML or JSON file, checked. strict: unknown names raise UserError."""
    given: dict[str, Any] = {}
    for written, value in load_file(path).items():
        name = written.replace("-", "_")
        if name in known:
            given[name] = read(known[name], value, f"{path}: {name}")
        elif strict:
            gone.refuse(["--" + name.replace("_", "-")])
            near = did_you_mean(name, known) or "; --help lists the names"
            raise UserError(f"{path}: unknown setting {shortened(written)}{near}")
    return given


def of_run(known: Mapping[str, Setting], resume: str | None) -> dict[str, Any]:
    """The settings of the run that wrote the checkpoint PATH; {} for auto, latest and never."""
    if resume is None or resume in RESUME_WORDS:
        return {}
    path = Path(resume).expanduser().absolute()
    if not path.exists():
        raise UserError(
            f"--resume {resume}: no such checkpoint; give a file, a run directory, auto or never"
        )
    directory = path if path.is_dir() else path.parent
    above = directory.parent / "config.json"  # of a run that keeps checkpoints in a folder
    if path.is_file() and above.is_file() and not (directory / "config.json").is_file():
        directory = directory.parent
    file = directory / "config.json"
    written = read_json(file)
    if not isinstance(written, dict) or not isinstance(written.get("settings"), dict):
        raise UserError(
            f"--resume {resume}: {file} is missing or was not written by a run; a checkpoint is "
            "resumed from its own run directory"
        )
    stored = written["settings"] | {"resume": str(path), "run_dir": str(directory)}
    kept = (name for name in known if name in stored and name not in _ONE_CALL)
    return {name: read(known[name], stored[name], f"{file}: {name}") for name in kept}


def refuse_changes(
    known: Mapping[str, Setting], stored: dict[str, Any], given: dict[str, Any]
) -> None:
    """Raise UserError when a given setting would change the numbers of the resumed run."""
    names = [name for name in given if name in stored and known[name].scope == "result"]
    refused = differing({n: stored[n] for n in names}, {n: given[n] for n in names})
    if refused:
        raise UserError(
            f"--resume {given['resume']} cannot continue with {'; '.join(refused)}; "
            "leave these flags out, or start anew with --resume never"
        )
