"""One dict of a configuration, read key by key: wrong values are refused, unknown keys noticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from shared.errors import UserError, did_you_mean, shown
from shared.settings import COUNTS, Range

D = TypeVar("D", float, int, bool, None)
ANY = Range(-Range.high)  # number


class Section:
    """The dict called `name`. Every key that is asked for counts as known to `unknown`.

    A key that is missing has the default; what has another kind or range raises UserError, with the
    dotted name, the value and what is allowed.
    """

    def __init__(self, values: Any, name: str) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{name} is {shown(values)}, expected dict(…)")
        self.name = name
        self._values, self._known = values, list[str]()

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        self._known.append(key)
        return self._values.get(key, default)

    def section(self, key: str, default: dict[str, Any] | None = None) -> Section:
        """The dict below `key`; None counts as missing."""
        value = self.get(key)
        return Section((default or {}) if value is None else value, self._dotted(key))

    def sections(self, key: str) -> list[Section]:
        """The dicts of the list, or of the one dict, below `key`."""
        value = self.get(key)
        entries = [] if value is None else value if isinstance(value, list | tuple) else [value]
        return [Section(entry, f"{self._dotted(key)}.{n}") for n, entry in enumerate(entries)]

    def flag(self, key: str, default: bool) -> bool:
        """True or False."""
        value = self.get(key, default)
        return value if isinstance(value, bool) else self._refuse(key, value, "True or False")

    def number(
        self, key: str, default: D, *, low: float = ANY.low, above: float = ANY.low
    ) -> float | D:
        """A finite number of at least `low` and above `above`; None only as the default."""
        value = self.get(key, default)
        allowed = Range(max(low, above), above=above > low)
        if value is not default and not allowed.fits(value, float):
            self._refuse(key, value, allowed.describe(float))
        return value

    def whole(self, key: str, default: Any, allowed: Range = COUNTS) -> Any:
        """A whole number that `allowed` holds; None only as the default."""
        value = self.get(key, default)
        if value is None and default is None:
            return None
        if not allowed.fits(value, int):
            self._refuse(key, value, allowed.describe(int))
        return value

    def numbers(self, key: str) -> list[float]:
        """A list of numbers."""
        value = self.get(key)
        if not isinstance(value, list | tuple) or not all(map(is_number, value)):
            self._refuse(key, value, f"a list, each {ANY.describe(float)}")
        return list(value)

    def text(self, key: str, default: str | None) -> str | None:
        """Text; None only as the default."""
        value = self.get(key, default)
        if value is not default and not isinstance(value, str):
            self._refuse(key, value, "text")
        return value

    def one_of(self, key: str, allowed: Sequence[str], default: str | None = None) -> str:
        """One of the texts `allowed`."""
        value = self.get(key, default)
        if value not in allowed:
            near = did_you_mean(str(value), allowed)
            self._refuse(key, value, f"one of {', '.join(allowed)}{near}")
        return value

    def unknown(self, passed_over: Sequence[str] = ()) -> list[str]:
        """A line for each key that nobody has asked for and that is not in `passed_over`."""
        known = list(dict.fromkeys([*self._known, *passed_over]))
        return [
            f"{self._dotted(key)} is not known and has no effect; known there: {', '.join(known)}"
            f"{did_you_mean(str(key), known)}"
            for key in self._values
            if key not in known
        ]

    def refuse_rest(self) -> None:
        """Raise UserError for a key that nobody has asked for."""
        for line in self.unknown():
            raise UserError(line)

    def _dotted(self, key: object) -> str:
        return f"{self.name}.{key}" if self.name else str(key)

    def _refuse(self, key: str, value: Any, expected: str) -> Any:
        found = f"is {shown(value)}" if key in self._values else "is missing"
        raise UserError(f"{self._dotted(key)} {found}, expected {expected}")


def refuse_unknown(settings: Any, name: str, allowed: Sequence[str], form: str) -> None:
    """Raise UserError unless `settings` is a dict with no keys but `allowed`; form: an example."""
    if not isinstance(settings, dict):
        raise UserError(f"{name} is {shown(settings)}, expected {form}")
    for key in settings:
        if key not in allowed:
            hint = did_you_mean(str(key), allowed)
            raise UserError(f"{name} has no setting {key}; allowed: {', '.join(allowed)}{hint}")


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and neither infinite nor beyond use."""
    return ANY.fits(value, float)
