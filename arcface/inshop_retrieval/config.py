"""mm-style configuration files: Python that is run, merged into its bases, changed by options.

The names that a file assigns are the configuration. `_base_` names one file or several, relative to
it; what the file assigns is merged into them: a dict into a dict, key by key, everything else, and
a dict with `_delete_=True`, takes the place of what was there. `_base_.name` and `{{_base_.name}}`,
also inside quotes, are values of the bases. A file is code of the user's own.

Options are `key=value`. Keys are dotted; a whole number is a list's index. A value is what Python
reads as a literal (1, 1e-3, None, (1, 2), 'quoted'), true or false in any spelling, a list
(1,2 or a,b or [a,b]), else the text as typed. Where the file holds a text a comma makes no list: a
path may have one.
"""

from __future__ import annotations

import ast
import copy
import re
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from shared.errors import UserError, did_you_mean, one_line, shortened, shown
from shared.files import is_file, read_text

RECIPE = Path(__file__).resolve().parents[1]
ROOT = RECIPE.parent
_DELETE, _FILL = "_delete_", "__fill__"
_TEMPLATE = re.compile(r"\{\{\s*(_base_(?:\.\w+)+|file[A-Z]\w+)\s*\}\}")
_LEAVES = (str, int, float, type(None))
_PATHS = ("data_root", "ann_file", "data_prefix", "checkpoint", "load_from", "work_dir")
_MOST_BRACKETS = 50  # in one another, in the value of an option


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


def read_config(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What the file and its bases assign, merged: plain dicts, lists, tuples, texts and numbers.

    readers: the files whose base this one is. Raises UserError, with file and line, for an error of
    the code, a missing or circular base, and two bases that assign the same name.
    """
    if path.resolve() in readers:
        chain = " → ".join(file.name for file in (*readers, path))
        raise UserError(f"{path}: the file is its own base ({chain}); take one `_base_` out")
    tree = _parse(path)
    base: dict[str, Any] = {}
    for name in _bases(path, tree):
        if not is_file(path.parent / name):
            raise UserError(f"{path}: the base {name} is missing (looked for {path.parent / name})")
        found = read_config(path.parent / name, (*readers, path.resolve()))
        twice = sorted(base.keys() & found.keys())
        if twice:
            raise UserError(
                f"{path}: the base {name} assigns {twice[0]}, as a base before it; keep one of them"
            )
        base |= found
    try:
        return merge(base, _run(path, tree, base))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def merge(base: dict[str, Any], child: dict[str, Any], name: str = "") -> dict[str, Any]:
    """`child` merged into a copy of `base`, by the rules of the module.

    Raises ValueError, with the dotted name below `name`, for a dict over what is no dict.
    """
    merged = copy.deepcopy(base)
    for key, value in child.items():
        before, dotted = merged.get(key), f"{name}.{key}".lstrip(".")
        if not isinstance(value, dict) or value.get(_DELETE) or before is None:
            merged[key] = _without_marks(value)
        elif isinstance(before, dict):
            merged[key] = merge(before, {k: v for k, v in value.items() if k != _DELETE}, dotted)
        else:
            raise ValueError(
                f"{dotted} is {shown(before)} and cannot take in a dict; {_DELETE}=True in the "
                "dict replaces it"
            )
    return merged


def _without_marks(value: Any) -> Any:
    """A copy of `value` without the marks that had nothing to delete."""
    if isinstance(value, dict):
        return {key: _without_marks(inner) for key, inner in value.items() if key != _DELETE}
    return copy.deepcopy(value)


# --- running a file -------------------------------------------------------------------------------


class _Base(dict[str, Any]):
    """The bases' values, by keys and by attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"no base assigns {name}{did_you_mean(name, self)}")
        value = self[name]
        return _Base(value) if isinstance(value, dict) else value


class _Templates(ast.NodeTransformer):
    """Makes `{{_base_.x}}`, which Python takes for a set in a set, and that in quotes the value."""

    def visit_Set(self, node: ast.Set) -> ast.AST:
        inner = node.elts[0]
        if isinstance(inner, ast.Set) and ast.unparse(inner.elts[0]).startswith("_base_."):
            return inner.elts[0]
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and _TEMPLATE.search(node.value):
            call = ast.Call(ast.Name(_FILL, ast.Load()), [node], [])
            return ast.fix_missing_locations(ast.copy_location(call, node))
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if _is_base(node) else self.generic_visit(node)


def _parse(path: Path) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about escapes in somebody's text
            return ast.parse(read_text(path, "utf-8-sig"))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: {error.msg}; not a Python file") from None
    except (OSError, ValueError, MemoryError, RecursionError) as error:
        raise UserError(f"{path}: the file cannot be read: {one_line(error)}") from None


def _is_base(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_base_"


def _bases(path: Path, tree: ast.Module) -> list[str]:
    """The files that `_base_` names."""
    names: Any = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and _is_base(node):
            try:
                names = ast.literal_eval(node.value)
            except ValueError:
                names = None
            names = [names] if isinstance(names, str) else names
            if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
                raise UserError(
                    f"{path}:{node.lineno}: _base_ must be a file's name in quotes, or a list"
                )
    return list(names)


def _run(path: Path, tree: ast.Module, base: dict[str, Any]) -> dict[str, Any]:
    """What the file assigns."""
    files = {"fileDirname": str(path.parent), "fileBasename": path.name,
             "fileBasenameNoExtension": path.stem, "fileExtname": path.suffix}  # fmt: skip
    words = {"_base_": _Base(copy.deepcopy(base)), **files}
    names: dict[str, Any] = {
        "_base_": words["_base_"],
        "__file__": str(path),
        "__name__": path.stem,
    }
    names[_FILL] = lambda text: _filled(text, words)
    try:
        exec(compile(_Templates().visit(tree), str(path), "exec"), names)
        return {
            name: _plain(value, name)
            for name, value in names.items()
            if not name.startswith("__") and name != "_base_" and _is_setting(value)
        }
    except (Exception, SystemExit) as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        why = f"{type(error).__name__}: {one_line(error)}".rstrip(": ")
        raise UserError(":".join(map(str, [path, *lines[-1:]])) + f": {why}") from None


def _filled(text: str, words: dict[str, Any]) -> Any:
    """Quoted text with its templates replaced; one that fills it keeps its type."""

    def value_of(dotted: str) -> Any:
        value: Any = words
        for part in dotted.split("."):
            value = value[int(part) if isinstance(value, list | tuple) else part]
        return value

    whole = _TEMPLATE.fullmatch(text)
    return value_of(whole[1]) if whole else _TEMPLATE.sub(lambda m: str(value_of(m[1])), text)


def _is_setting(value: Any) -> bool:
    """Whether a name's value belongs to the configuration; modules and functions do not."""
    return isinstance(value, (*_LEAVES, dict, list, tuple, PurePath)) or _is_numpys(value)


def _is_numpys(value: Any) -> bool:
    """Whether it is one number of numpy's."""
    return hasattr(value, "item") and not hasattr(value, "__len__")


def _plain(value: Any, name: str) -> Any:
    """A copy as JSON can hold it; numbers of numpy as Python's, a class as its name."""
    if isinstance(value, dict):
        return {key: _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(inner, f"{name}.{place}") for place, inner in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, PurePath):
        return str(value)
    value = value.item() if _is_numpys(value) else value
    is_beyond = isinstance(value, int) and abs(value) >= 2**64  # what nothing counts to
    if not isinstance(value, _LEAVES) or is_beyond:
        raise TypeError(
            f"{name} is a {type(value).__name__}{' beyond use' * is_beyond}, which is no setting"
        )
    return value


# --- options --------------------------------------------------------------------------------------


def with_options(config: dict[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """A copy of `config` with every `key=value` of `options` set; later ones win.

    A dict is merged, anything else replaced. Raises UserError for an option without `=`, an index
    outside its list, and a key below a value.
    """
    changed = copy.deepcopy(config)
    for option in options:
        key, equals, text = option.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(
                f"--cfg-options {shortened(option)}: expected key=value, as in train_cfg.x=1"
            )
        if sum(map(text.count, "[({")) > _MOST_BRACKETS:
            raise UserError(f"--cfg-options {shortened(option)}: nested too deeply to be read")
        here = changed
        for depth, part in enumerate(parts[:-1]):
            step = _key(here, part, parts[:depth])
            if isinstance(here, dict) and here.get(step) is None:
                here[step] = {}
            here = here[step]
        last = _key(here, parts[-1], parts[:-1])
        before = here[last] if isinstance(here, list) else here.get(last)
        is_text = isinstance(before, str) or parts[-1] in _PATHS
        try:
            pair = {parts[-1]: parse_value(text, is_text=is_text)}
            here[last] = merge({parts[-1]: before}, pair, ".".join(parts[:-1]))[parts[-1]]
        except ValueError as error:
            raise UserError(f"--cfg-options {error}") from None
    return changed


def parse_value(text: str, *, is_text: bool = False) -> Any:
    """The value that `text` stands for. is_text: a comma makes no list."""
    stripped = text.strip()
    if stripped.lower() in ("true", "false"):
        return stripped.lower() == "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = _plain(ast.literal_eval(stripped), "")
        return list(value) if isinstance(value, tuple) and stripped[:1] != "(" else value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    items = _split(stripped) or []
    if len(items) > 1 and not is_text:
        return [parse_value(item) for item in items]
    inner = _split(stripped[1:-1]) if stripped[:1] + stripped[-1:] in ("[]", "()") else None
    if len(items) == 1 and inner is not None:
        return (tuple if stripped[0] == "(" else list)(parse_value(item) for item in inner)
    return text


def _split(text: str) -> list[str] | None:
    """`text` at the commas outside brackets and quotes; None when those do not match."""
    items, opened, quote, start = [], 0, "", 0
    for place, sign in enumerate(text):
        if quote or sign in "'\"":
            quote = sign if not quote else "" if sign == quote else quote
        elif sign == "," and not opened:
            items.append(text[start:place].strip())
            start = place + 1
        else:
            opened += (sign in "([{") - (sign in ")]}")
        if opened < 0:
            return None
    last = text[start:].strip()
    return None if quote or opened else [*items, *([last] if last else [])]


def _key(here: Any, part: str, above: list[str]) -> Any:
    """`part` as a key of the dict or an index of the list `here`. Raises UserError."""
    place = ".".join(above)
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise UserError(f"--cfg-options {place}.{part}: {place} is {shown(here)}, it has no keys")
    if not part.isdecimal() or int(part) >= len(here):
        raise UserError(
            f"--cfg-options {place}.{part}: {place} is a list of length {len(here)}, allowed are "
            f"the indices 0 to {len(here) - 1}"
        )
    return int(part)


def checked(entry: Any, name: str, **defaults: Any) -> dict[str, Any]:
    """A dict of a configuration over `defaults`, without its type.

    Raises UserError for what is no dict, and for a key that has no default.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{name} is {shown(entry)}, expected dict(…)")
    for key in entry:
        if key not in defaults and key != "type":
            near = did_you_mean(str(key), defaults)
            raise UserError(f"{name}.{key} is not known; known there: {', '.join(defaults)}{near}")
    return {**defaults, **{key: value for key, value in entry.items() if key != "type"}}
