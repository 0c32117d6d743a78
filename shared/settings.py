"""What a configuration is: a dataclass, nested ones among its fields, each leaf a setting.

A number's range is declared with its type: `lr: Positive`, `workers: Workers`, `batch_size: Count`,
or `Annotated[int, Range(32, 4096)]`. Without one it is from 0 to what the range's defaults allow.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from shared.errors import UserError, shown

Scope = Literal["result", "length", "free"]

_MOST_WHOLE = 2**31 - 1  # what torch, numpy and the operating system take as a count
_LONGEST_PATH = 4096  # Linux's PATH_MAX
_MOST = 10**9  # of other numbers: far from where half and single precision overflow


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting takes: from `low` to `high`; without these with above, below."""

    low: float = 0
    high: float = _MOST
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is one of them; NaN never is."""
        return self.low <= value <= self.high and not (
            (self.above and value == self.low) or (self.below and value == self.high)
        )

    def fits(self, value: Any, kind: type) -> bool:
        """Whether `value` is one of them, and of this kind, int or float."""
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        return is_number and self.holds(value)

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


class Setting(NamedTuple):
    """One leaf of a configuration: its field, the type it is declared with, its value."""

    field: dataclasses.Field[Any]
    kind: Any
    value: Any
    range: Range | None = None  # of a number

    @property
    def scope(self) -> Scope:
        """What a resumed run may do with it (see config.option)."""
        return self.field.metadata.get("scope", "result")


def leaves(config: Any) -> dict[str, Setting]:
    """Every setting of a configuration by name, those of nested dataclasses too.

    A name of the outer dataclass hides the same name of a nested one.
    """
    found = own_leaves(config)
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            found = leaves(value) | found
    return found


def own_leaves(config: Any) -> dict[str, Setting]:
    """The settings of a configuration itself, by name, without those of nested dataclasses."""
    hints = typing.get_type_hints(type(config))
    declared = typing.get_type_hints(type(config), include_extras=True)
    found = {}
    for item in dataclasses.fields(config):
        value, kind = getattr(config, item.name), hints[item.name]
        if item.name != "typed" and not dataclasses.is_dataclass(value):
            found[item.name] = Setting(item, kind, value, _range_of(kind, declared[item.name]))
    return found


def _range_of(kind: Any, declared: Any) -> Range | None:
    """The range of a number's type; None for what is no number."""
    marks = (mark for part in _parts(declared) for mark in getattr(part, "__metadata__", ()))
    default = {int: Range(0, _MOST_WHOLE), float: Range()}.get(without_none(kind))
    return next((mark for mark in marks if isinstance(mark, Range)), default)


def _parts(kind: Any) -> Iterator[Any]:
    yield kind
    yield from typing.get_args(kind)


def number(name: str, value: Any, kind: type, allowed: Range) -> Any:
    """`value`, a number or its text, as an int or a float that `allowed` holds.

    The only place that decides which numbers a setting takes. Raises UserError.
    """
    try:
        found = kind(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not allowed.fits(found, kind):
        raise UserError(f"{name} must be {allowed.describe(kind)}, got {shown(value)}")
    return kind(found)


def in_range(setting: Setting, value: Any) -> Any:
    """`value`, refused by a UserError where its setting is a number with another range."""
    if setting.range is None or value is None:
        return value
    return number(setting.field.name, value, without_none(setting.kind), setting.range)


def own_names(config: Any) -> set[str]:
    """The settings of a configuration itself, without those of nested dataclasses."""
    return {item.name for item in dataclasses.fields(config)} - {"typed"}


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


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """'name: old → new' for every setting that is not the same in both."""
    names = sorted(before.keys() | now.keys())
    return [
        f"{name}: {before.get(name)} → {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def reader_of(kind: type) -> Any:
    """The function from text to a value of `kind`."""
    if kind is Path:
        return _path
    return kind


def _path(text: str) -> Path:
    """Absolute, from where it was typed.

    Raises ValueError for the home of a user unknown here, and for what no system takes as a path:
    an empty text, too.
    """
    if not text.strip():
        raise ValueError("the path is empty")
    if len(text) > _LONGEST_PATH or "\0" in text:
        raise ValueError("no path")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{text}: {error}") from None


def without_none(kind: Any) -> Any:
    """`int` for `int | None`; any other kind as it is."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def from_plain(kind: Any, value: Any) -> Any:
    """What `plain` was given, for a setting of this kind."""
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if without_none(kind) is Path and value else value
