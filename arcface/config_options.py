"""What a user types over a configuration file: `--cfg-options key=value` and `--data-root`.

Keys are dotted; a whole number is a list's index (`train_dataloader.dataset.pipeline.1.scale=72`).

Values: what Python reads as a literal is that (1, 1e-3, None, (1, 2), 'quoted'); true and false in
any spelling are booleans; 1,2 without brackets is a list; within [ ] and ( ) words need no quotes.
Everything else is the text as typed, spaces and commas kept: a path with a comma stays one path
(mmengine takes `a,b` for a list and drops spaces; here a list of words is typed [a,b]).

A key that neither the loaded configuration nor the caller's `known` has is set all the same, as mm
users expect (`default_hooks.checkpoint.max_keep_ckpts=3` is such a key), but never in silence.
"""

from __future__ import annotations

import ast
import copy
import fnmatch
import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from arcface.config_reader import DEEPEST, RECIPE, is_scalar, merge
from shared.errors import UserError, did_you_mean, shortened, shown

DATASETS = (
    *("train_dataloader", "val_dataloader", "test_dataloader"),
    *("query_dataloader", "gallery_dataloader", "model.prototype"),
)
DATA_ROOTS = tuple(f"{name}.dataset.data_root" for name in DATASETS)
# The other two only lend their values to these while the file is read; overriding them alone
# changes nothing.
READ_DATA_ROOTS = ("train_dataloader", "val_dataloader", "test_dataloader", "model.prototype")
_LAYOUT = "it holds Eval/list_eval_partition.txt and Img/img/{MEN,WOMEN}/…"


def parse_value(text: str) -> Any:
    """The value that `text` stands for, by the rules of the module."""
    stripped = text.strip()
    if stripped.lower() in ("true", "false"):
        return stripped.lower() == "true"
    is_literal, value = _literal(stripped)
    if is_literal:
        bare = isinstance(value, tuple) and not stripped.startswith("(")
        return list(value) if bare else value
    if stripped[:1] + stripped[-1:] in ("[]", "()"):
        items = _split(stripped[1:-1])
        if items is not None:
            values = [parse_value(item) for item in items]
            return values if stripped[0] == "[" else tuple(values)
    return text


def with_options(
    config: dict[str, Any],
    options: Iterable[str],
    *,
    known: Iterable[str] = (),
    strict: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """A copy of `config` with every `key=value` of `options` set, and a warning an unknown key.

    known: dotted keys (with * as in file names) that are read though the file may not hold them.
    strict: refuse unknown keys. Later options win. A dict is merged, anything else replaced.
    Raises UserError for an option without `=`, an index outside its list, a key below a scalar.
    """
    known = tuple(known)
    changed, remarks = copy.deepcopy(config), []
    for option in options:
        key, equals, text = option.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise UserError(
                f"--cfg-options {shortened(option)}: expected key=value, as in train_cfg.x=1"
            )
        if _depth(text) > DEEPEST:
            raise UserError(f"--cfg-options {shortened(option)}: nested too deeply to be read")
        remark = _unknown(config, parts, known)
        if remark and strict:
            raise UserError(f"--cfg-options {remark} (--strict-cfg refuses it)")
        remarks += [f"--cfg-options {remark}"] if remark else []
        _set(changed, parts, parse_value(text))
    return changed, remarks


def with_data_root(config: dict[str, Any], root: str) -> dict[str, Any]:
    """A copy of `config` in which every data set that it has reads from `root`."""
    changed = copy.deepcopy(config)
    for name in DATASETS:
        settings = _get(changed, f"{name}.dataset")
        if isinstance(settings, dict):
            settings["data_root"] = root
    return changed


def data_roots(config: dict[str, Any], cwd: Path) -> dict[str, Path]:
    """The directory of each data set that is read, by its key in READ_DATA_ROOTS.

    A relative path is looked up in `cwd`, then in arcface/. Raises UserError for an empty path
    (the variable of the documented command was not set) and for one that is no directory.
    """
    found = {}
    for name in READ_DATA_ROOTS:
        key = f"{name}.dataset.data_root"
        value = _get(config, key)
        if value is None and _get(config, name) is None:
            continue
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f"{key} is {'empty' if value in ('', None) else shown(value)}: type "
                f"`export data_path=/…/inshop` before the command, or --data-root PATH; {_LAYOUT}"
            )
        found[name] = _existing(key, value, cwd)
    return found


def _existing(key: str, value: str, cwd: Path) -> Path:
    given = Path(value).expanduser()
    for place in (cwd / given, RECIPE / given):
        if place.is_dir():
            return place
    raise UserError(
        f"{key}: {cwd / given} is no directory; unpack In-shop there ({_LAYOUT}), or name the "
        "place of all data sets with --data-root PATH"
    )


def _literal(text: str) -> tuple[bool, Any]:
    """Whether `text` is a Python literal of kinds that a configuration file holds; its value."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False, None
    return _is_plain(value), value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _is_plain(v) for key, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return is_scalar(value)  # no sets, bytes, complex, Ellipsis


def _depth(text: str) -> int:
    """How many brackets are open at once."""
    steps = ((sign in "([{") - (sign in ")]}") for sign in text)
    return max(itertools.accumulate(steps), default=0)


def _split(text: str) -> list[str] | None:
    """`text` at the commas outside brackets and quotes; None when those do not match."""
    items, depth, quote, start = [], 0, "", 0
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        elif sign == "," and depth == 0:
            items.append(text[start:place])
            start = place + 1
        if depth < 0:
            return None
    if quote or depth:
        return None
    last = text[start:]
    return [item.strip() for item in (*items, *([last] if last.strip() else []))]


def _get(config: Any, dotted: str) -> Any:
    """The value at a dotted key, or None."""
    for part in dotted.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _unknown(config: dict[str, Any], parts: list[str], known: tuple[str, ...]) -> str:
    """What is wrong with a key that nobody is known to read, or ''."""
    dotted = ".".join(parts)
    if any(fnmatch.fnmatchcase(dotted, pattern) for pattern in known):
        return ""
    here: Any = config
    for depth, part in enumerate(parts):
        if not isinstance(here, dict):  # lists are checked when the value is set
            here = here[int(part)] if _is_index(here, part) else None
        elif part in here:
            here = here[part]
        else:
            place = ".".join(parts[:depth])
            return (
                f"{shortened(dotted)}: {place or 'the configuration'} has no {shortened(part)}"
                + _hint(config, dotted, place, part, [*here, *_below(known, place)])
            )
        if here is None:
            return ""
    return ""


def _hint(config: dict[str, Any], dotted: str, place: str, part: str, level: list[str]) -> str:
    """'; did you mean …?': a longer key that ends as typed, else the nearest name beside it."""
    longer = [key for key in _leaves(config) if key.endswith(f".{dotted}")]
    if longer:
        return f"; did you mean {longer[0]}?"
    near = did_you_mean(part, map(str, level))
    return near.replace("did you mean ", f"did you mean {place}.") if place else near


def _below(known: tuple[str, ...], place: str) -> Iterator[str]:
    """The names that `known` keys have right below `place`."""
    prefix = f"{place}." if place else ""
    for key in known:
        if key.startswith(prefix):
            yield key.removeprefix(prefix).partition(".")[0]


def _leaves(value: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key in `value`."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield f"{prefix}{key}"
        if isinstance(inner, dict | list):
            yield from _leaves(inner, f"{prefix}{key}.")


def _is_index(value: Any, part: str) -> bool:
    return isinstance(value, list) and part.isdecimal() and int(part) < len(value)


def _set(config: dict[str, Any], parts: list[str], value: Any) -> None:
    """Put `value` at the dotted key, in place; missing dicts on the way are made."""
    here: Any = config
    for depth, part in enumerate(parts[:-1]):
        key = _key(here, part, parts[:depth])
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        here = here[key]
    key = _key(here, parts[-1], parts[:-1])
    if not isinstance(value, dict):
        here[key] = value
        return
    name, before = parts[-1], here[key] if isinstance(here, list) or key in here else None
    try:
        here[key] = merge({name: before}, {name: value}, ".".join(parts[:-1]))[name]
    except ValueError as error:
        raise UserError(f"--cfg-options {error}") from None


def _key(here: Any, part: str, above: list[str]) -> Any:
    """`part` as a key of the dict or an index of the list `here`. Raises UserError."""
    place = ".".join(above)
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise UserError(f"--cfg-options {place}.{part}: {place} is {shown(here)}, it has no keys")
    if not _is_index(here, part):
        raise UserError(
            f"--cfg-options {place}.{part}: {place} is a list of length {len(here)}, allowed are "
            f"the indices 0 to {len(here) - 1}"
        )
    return int(part)
