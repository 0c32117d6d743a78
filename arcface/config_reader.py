"""mm-style Python configuration files, read with `ast` and never run.

A file holds assignments to plain names, and their values are made of: literals (text, numbers,
True, False, None, lists, tuples, dicts), `dict(name=value)`, names assigned above, and
`{{_base_.name}}` or `{{_base_.name.inner}}`, also inside quotes. `_base_` names one file or a list
of files, relative to the file that names them. Everything else (imports, calls, arithmetic,
comprehensions, f-strings) is refused with file and line, so a file from elsewhere cannot do harm.

What a file assigns is merged into its bases: a dict into a dict, key by key; anything else takes
the place of what was there, and so does a dict that holds `_delete_=True`. A name used twice and
`{{_base_.name}}` give copies: a later change of one place leaves the others as they are.
"""

from __future__ import annotations

import ast
import copy
import re
import warnings
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import UserError, did_you_mean, one_line, shown
from shared.files import is_file, read_text

RECIPE = Path(__file__).resolve().parent
ROOT = RECIPE.parent
DELETE = "_delete_"
DEEPEST = 50  # lists and dicts in one another
MOST_VALUES = 100_000  # in one file, copies counted: lists of copies of lists grow without bound

_TEMPLATE = re.compile(r"\{\{\s*([\w.]+)\s*\}\}")
_SCALAR = (str, int, float, type(None))


def find_config(name: str, cwd: Path) -> Path:
    """The configuration file `name`: looked up in `cwd`, then arcface/, then the repository root.

    Raises UserError, with the three places, when there is none.
    """
    given = Path(name).expanduser()
    places = [folder / given for folder in (cwd, RECIPE, ROOT)]
    for place in places:
        if is_file(place):
            return place
    ours = [str(path.relative_to(RECIPE)) for path in sorted(RECIPE.glob("config/arcface/*.py"))]
    looked = ", ".join(str(path) for path in dict.fromkeys(places))
    raise UserError(
        f"--config {name}: no such file (looked for {looked}){did_you_mean(name, ours) or ';'} "
        f"the recipe's own: {', '.join(ours)}"
    )


def read_config(path: Path) -> dict[str, Any]:
    """What the file and its bases assign, merged: plain dicts, lists, tuples and scalars.

    Raises UserError with file and line for all that is not allowed (see the module), for a missing
    or circular base, two bases that assign the same name, and a dict over what is no dict.
    """
    try:
        found = _read(Path(path), ())
        if _depth(found) <= DEEPEST:
            return found
    except RecursionError:
        pass
    raise UserError(f"{path}: nested too deeply to be read")


def merge(base: dict[str, Any], child: dict[str, Any], name: str = "") -> dict[str, Any]:
    """`child` merged into a copy of `base`, by the rules of the module.

    Raises ValueError, with the dotted name below `name`, for a dict over what is no dict.
    """
    merged = copy.deepcopy(base)
    for key, value in child.items():
        dotted = f"{name}.{key}" if name else str(key)
        before = merged.get(key)
        if not isinstance(value, dict) or value.get(DELETE) or before is None:
            merged[key] = _without_marks(value)
        elif isinstance(before, dict):
            merged[key] = merge(before, {k: v for k, v in value.items() if k != DELETE}, dotted)
        else:
            raise ValueError(
                f"{dotted} is {_short(before)} and cannot take in a dict; {DELETE}=True in the "
                "dict replaces it"
            )
    return merged


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """What the file assigns, over its bases. readers: the files whose base this one is."""
    if path.resolve() in readers:
        chain = " → ".join(file.name for file in (*readers, path))
        raise UserError(f"{path}: the file is its own base ({chain}); take one `_base_` out")
    tree = _parse(path)
    base = _read_bases(path, tree, (*readers, path.resolve()))
    file = _File(path, base)
    for statement in tree.body:
        file.read(statement)
    merged = base
    for name, value in file.names.items():
        if name == "_base_" or name.startswith("__"):
            continue
        try:
            merged = merge(merged, {name: value})
        except ValueError as error:
            raise UserError(f"{path}:{file.lines[name]}: {error}") from None
    return merged


def _parse(path: Path) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about escapes in somebody's text
            return ast.parse(read_text(path, "utf-8-sig"))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: {error.msg}; not a Python file") from None
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path}: the file cannot be read: {one_line(error)}") from None


def _read_bases(path: Path, tree: ast.Module, readers: tuple[Path, ...]) -> dict[str, Any]:
    """What the files named by `_base_` assign, together."""
    merged: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for name, line in _base_names(path, tree):
        place = path.parent / name
        if not is_file(place):
            raise UserError(f"{path}:{line}: the base {name} is missing (looked for {place})")
        found = _read(place, readers)
        for key in found:
            if key in owners:
                raise UserError(
                    f"{path}:{line}: the bases {owners[key]} and {name} both assign {key}; keep it "
                    "in one of them"
                )
            owners[key] = name
        merged |= found
    return merged


def _base_names(path: Path, tree: ast.Module) -> list[tuple[str, int]]:
    """The files that `_base_` names, each with its line."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and _targets(statement) == ["_base_"]:
            value = statement.value
            entries = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
            names = [node.value for node in entries if isinstance(node, ast.Constant)]
            if len(names) < len(entries) or not all(isinstance(name, str) for name in names):
                raise UserError(
                    f"{path}:{statement.lineno}: _base_ must be a file's name in quotes, or a "
                    "list of them"
                )
            return [(str(name), node.lineno) for name, node in zip(names, entries, strict=True)]
    return []


def _targets(statement: ast.Assign) -> list[str] | None:
    """The names that are assigned, or None where something else is."""
    names = [node.id for node in statement.targets if isinstance(node, ast.Name)]
    return names if len(names) == len(statement.targets) else None


class _File:
    """A file being read: the names it has assigned so far, and the line of each."""

    def __init__(self, path: Path, base: dict[str, Any]) -> None:
        self.path, self._base = path, base
        self.names: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        self._num_values = 0

    def read(self, statement: ast.stmt) -> None:
        """Take in one statement: an assignment, or a docstring."""
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return
        targets = _targets(statement) if isinstance(statement, ast.Assign) else None
        if targets is None or not isinstance(statement, ast.Assign):
            self._refuse(statement)
        for name in targets:
            self.names[name] = self._value(statement.value)
            self.lines[name] = statement.lineno

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return self._constant(node)
        if isinstance(node, ast.List):
            return [self._value(element) for element in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self._value(element) for element in node.elts)
        if isinstance(node, ast.Dict):
            return self._dict(node, list(zip(node.keys, node.values, strict=True)))
        if isinstance(node, ast.Call):
            return self._dict_call(node)
        if isinstance(node, ast.UnaryOp):
            return self._signed(node)
        if isinstance(node, ast.Name):
            return self._named(node)
        if isinstance(node, ast.Set):
            return self._from_base(node)
        self._refuse(node)

    def _constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, str):
            return self._filled_in(node.value, node)
        if is_scalar(node.value):
            return node.value
        self._refuse(node)  # bytes, complex numbers, ...

    def _signed(self, node: ast.UnaryOp) -> int | float:
        """A number with a sign before it."""
        number = node.operand.value if isinstance(node.operand, ast.Constant) else None
        if isinstance(number, bool) or not isinstance(number, int | float):
            self._refuse(node)
        if isinstance(node.op, ast.USub):
            return -number
        return number if isinstance(node.op, ast.UAdd) else self._refuse(node)

    def _dict_call(self, node: ast.Call) -> dict[str, Any]:
        if not isinstance(node.func, ast.Name) or node.func.id != "dict" or node.args:
            self._refuse(node)
        keys = [ast.Constant(word.arg) if word.arg else None for word in node.keywords]
        return self._dict(
            node, list(zip(keys, (word.value for word in node.keywords), strict=True))
        )

    def _dict(
        self, node: ast.expr, pairs: list[tuple[ast.expr | None, ast.expr]]
    ) -> dict[str, Any]:
        """The dict of these keys and values; a key of None stands for `**other`."""
        found: dict[Any, Any] = {}
        for key, value in pairs:
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str | int):
                self._refuse(node, "a dict's keys are words or whole numbers")
            if key.value in found:
                self._refuse(node, f"the key {shown(key.value)} stands twice in one dict")
            found[key.value] = self._value(value)
        return found

    def _named(self, node: ast.Name) -> Any:
        if node.id in self.names:
            return self._copy(self.names[node.id], node)
        if node.id in self._base:
            self._refuse(node, f"{node.id} belongs to a base: write {{{{_base_.{node.id}}}}}")
        near = did_you_mean(node.id, self.names)
        self._refuse(node, f"nothing above assigns {node.id}{near}")

    def _from_base(self, node: ast.Set) -> Any:
        """`{{_base_.name}}`, which Python reads as a set in a set."""
        inner = node.elts[0]
        if len(node.elts) == 1 and isinstance(inner, ast.Set) and len(inner.elts) == 1:
            dotted = ast.unparse(inner.elts[0])
            if re.fullmatch(r"_base_(\.\w+)+", dotted):
                return self._look_up(dotted, node)
        self._refuse(node)

    def _filled_in(self, text: str, node: ast.Constant) -> Any:
        """Quoted text with each `{{_base_.name}}` replaced; one that fills it keeps its type."""
        whole = _TEMPLATE.fullmatch(text)
        if whole:
            return self._look_up(whole[1], node)

        def as_text(match: re.Match[str]) -> str:
            value = self._look_up(match[1], node)
            if not isinstance(value, _SCALAR):
                self._refuse(node, f"{match[1]} is {_short(value)}, no part of a text")
            return str(value)

        return _TEMPLATE.sub(as_text, text)

    def _look_up(self, dotted: str, node: ast.expr) -> Any:
        """A copy of what `_base_.name.inner` names."""
        first, *parts = dotted.split(".")
        if first != "_base_" or not parts:
            self._refuse(node, f"{{{{{dotted}}}}}: only {{{{_base_.name}}}} is known")
        value: Any = self._base
        for part in parts:
            if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, dict) and part in value:
                value = value[part]
            else:
                near = did_you_mean(part, map(str, value)) if isinstance(value, dict) else ""
                self._refuse(node, f"no base assigns {dotted} (at {part}){near}")
        return self._copy(value, node)

    def _copy(self, value: Any, node: ast.expr) -> Any:
        self._num_values += _count(value)
        if self._num_values > MOST_VALUES:
            self._refuse(node, f"copies of names make more than {MOST_VALUES:,} values")
        return copy.deepcopy(value)

    def _refuse(self, node: ast.AST, why: str = "") -> NoReturn:
        line, text = getattr(node, "lineno", 1), ast.unparse(node).splitlines()[0][:80]
        raise UserError(
            f"{self.path}:{line}: "
            + (
                why
                or f"`{text}` is refused: a configuration file is read, never run; it may hold "
                "literals, dict(name=value), names assigned above and {{_base_.name}}"
            )
        )


def is_scalar(value: Any) -> bool:
    """Whether it is text, None, or a number that can be written out."""
    return isinstance(value, _SCALAR) and not (isinstance(value, int) and abs(value) >= 2**64)


def _count(value: Any) -> int:
    """How many values there are in `value`, itself counted."""
    inner = value.values() if isinstance(value, dict) else value
    return 1 + sum(map(_count, inner)) if isinstance(value, dict | list | tuple) else 1


def _depth(value: Any) -> int:
    """How many lists and dicts are in one another."""
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list | tuple) else 0


def _without_marks(value: Any) -> Any:
    """A copy of `value` without the `_delete_` marks that had nothing to delete."""
    if isinstance(value, dict):
        return {key: _without_marks(inner) for key, inner in value.items() if key != DELETE}
    return copy.deepcopy(value)


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
