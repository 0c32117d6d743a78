"""Dataclass → flags: what argparse reads, and the help, of a configuration's settings.

Standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from pathlib import Path
from typing import Any, Literal, NoReturn

from shared import gone
from shared.errors import UserError, did_you_mean, shortened
from shared.settings import Setting, own_leaves, own_names, reader_of, without_none


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError in place of printing its usage."""

    def error(self, message: str) -> NoReturn:
        short = re.sub(r"\S{81,}", lambda word: shortened(word[0]), message)
        raise UserError(f"{short}; --help lists the flags")


_of_script: frozenset[str] = frozenset()


def of_script() -> frozenset[str]:
    """The flags that this process's script has, once it has read its command line."""
    return _of_script


class _Extend(argparse.Action):
    """Texts of a flag typed once or several times, as one tuple."""

    def __call__(self, _parser: Any, namespace: Any, values: Any, _flag: Any = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


def read(defaults: Any, argv: list[str], usage: str | None) -> dict[str, Any]:
    """The settings typed, by name; prints for --help. Raises UserError for what is none of them."""
    parser = _parser_of_script(defaults, usage)
    gone.refuse(dashed(argv), parser._option_string_actions)
    known, unknown = parser.parse_known_args(dashed(argv))
    if unknown:
        name = unknown[0].partition("=")[0]
        near = did_you_mean(name, parser._option_string_actions)
        raise UserError(f"unknown argument {shortened(name)}{near or '; --help lists the flags'}")
    return vars(known)


def read_known(defaults: Any, argv: list[str]) -> dict[str, Any]:
    """Like `read`, for these settings alone; all other words are passed over, --help too."""
    return vars(_parser(defaults, add_help=False).parse_known_args(dashed(argv))[0])


def read_own(defaults: Any, argv: list[str], usage: str | None) -> tuple[dict[str, Any], list[str]]:
    """Like `read`, and the words that belong to none of the settings."""
    known, rest = _parser_of_script(defaults, usage).parse_known_args(dashed(argv))
    return vars(known), rest


def dashed(argv: list[str]) -> list[str]:
    """`argv` with the names of long flags in their dashed spelling."""
    dashed = []
    for token in argv:
        name, equals, value = token.partition("=")
        dashed.append(name.replace("_", "-") + equals + value if name.startswith("--") else token)
    return dashed


def _parser_of_script(defaults: Any, usage: str | None) -> argparse.ArgumentParser:
    global _of_script
    parser = _parser(defaults, description=usage)
    _of_script = frozenset(parser._option_string_actions)
    return parser


def _parser(defaults: Any, **options: Any) -> argparse.ArgumentParser:
    parser = _Parser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        **options,
    )
    _add_flags(parser, defaults)
    return parser


def _add_flags(
    parser: argparse.ArgumentParser, defaults: Any, group: Any = None, hidden: Any = frozenset()
) -> None:
    """Add a flag for every setting; each nested dataclass becomes a group of the help."""
    own = own_leaves(defaults)
    for item in dataclasses.fields(defaults):
        value = getattr(defaults, item.name)
        if dataclasses.is_dataclass(value):
            title = (type(value).__doc__ or "").partition(".")[0]
            inner = parser.add_argument_group(title)
            _add_flags(parser, value, inner, hidden | own_names(defaults))
        elif item.name not in {"typed", *hidden}:
            _add_flag(group or parser, own[item.name])


def _add_flag(parser: Any, setting: Setting) -> None:
    metadata, name = setting.field.metadata, setting.field.name
    names = ["--" + name.replace("_", "-"), *metadata.get("aliases", ())]
    shown = (
        "" if setting.value is None or setting.value is False else f" (default: {setting.value})"
    )
    options: dict[str, Any] = {"dest": name}
    options["help"] = (metadata.get("help", "") + shown).replace("%", "%%")
    if metadata.get("positional"):
        kind = reader_of(without_none(setting.kind))
        parser.add_argument(name, type=kind, help=metadata["help"].replace("%", "%%"))
        return
    if setting.kind is bool:
        parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        return
    if metadata.get("const") is not None:
        options |= {"nargs": "?", "const": metadata["const"]}
    kind = without_none(setting.kind)
    if typing.get_origin(kind) is Literal:
        parser.add_argument(*names, choices=typing.get_args(kind), **options)
    elif typing.get_origin(setting.kind) is tuple:
        parser.add_argument(*names, nargs="+", action=_Extend, metavar="TEXT", **options)
    elif kind is Path:
        parser.add_argument(*names, type=_typed_path, metavar="PATH", **options)
    else:
        word = {int: "N", float: "X", str: "TEXT"}[kind]
        parser.add_argument(*names, type=reader_of(kind), metavar=word, **options)


def _typed_path(text: str) -> Any:
    """The path of a flag; an empty one, as of a variable that is not set, is refused by name."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty (an unset variable?): name one")
    return reader_of(Path)(text)
