"""What a configuration is: a dataclass, nested ones among its fields, each leaf a setting.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple

Scope = Literal["result", "length", "free"]


class Setting(NamedTuple):
    """One leaf of a configuration: its field, the type it is declared with, its value."""

    field: dataclasses.Field[Any]
    kind: Any
    value: Any

    @property
    def scope(self) -> Scope:
        """What a resumed run may do with it (see config.option)."""
        return self.field.metadata.get("scope", "result")


def leaves(config: Any) -> dict[str, Setting]:
    """Every setting of a configuration by name, those of nested dataclasses too.

    A name of the outer dataclass hides the same name of a nested one.
    """
    found: dict[str, Setting] = {}
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            found = leaves(value) | found
        elif item.name != "typed":
            found[item.name] = Setting(item, hints[item.name], value)
    return found


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


def _path(text: Any) -> Path:
    """Absolute, from where it was typed.

    Raises ValueError for an empty text, and for the home of a user unknown here.
    """
    if not str(text).strip():
        raise ValueError("the path is empty")
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
