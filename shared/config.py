"""Dataclass ↔ flags ↔ YAML: a recipe's frozen dataclass is its flags, its help, its file format.

    @dataclass(frozen=True)
    class Config:
        batch_size: int = option(128, "images per optimizer step, summed over processes")
        run: RunOptions = field(default_factory=RunOptions)

    cfg = parse(Config, argv, usage=__doc__)

Flags win over `--config FILE`, which wins over the defaults. `--batch-size` and `--batch_size` are
the same flag. Unknown names are refused with the nearest one. Standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeVar

from shared.errors import UserError, did_you_mean, one_line
from shared.files import read_json

_MOST_BRACKETS = 10_000  # in a file of settings
_RESUME_WORDS = ("auto", "latest", "never")

C = TypeVar("C")
Scope = Literal["result", "length", "free"]


def option(
    default: Any,
    text: str,
    *,
    scope: Scope = "result",
    const: Any = None,
    aliases: tuple[str, ...] = (),
    positional: bool = False,
) -> Any:
    """A dataclass field that is also a flag.

    The field's type: bool, int, float, str, Path or a Literal of texts, alone or with None; or
    tuple[str, ...], one or more texts after the flag.
    text: the flag's help. const: the value of the flag typed alone. aliases: other spellings.
    positional: typed without a name, and has to be typed.
    scope: what a resumed run may do with it. "result" changes the numbers and must stay, "length"
    (epochs, steps) may change with an explicit --resume PATH, "free" (workers, logging) always may.
    """
    metadata = {"help": text, "scope": scope, "const": const, "aliases": aliases}
    return field(default=default, metadata=metadata | {"positional": positional})


@dataclass(frozen=True)
class ProcessOptions:
    """Flags for the launcher of processes; torchrun's names."""

    nproc: int | None = option(
        None,
        "processes on this host; default: one a visible GPU, 1 without (also: NPROC_PER_NODE)",
        scope="free",
        aliases=("--nproc-per-node",),
    )
    nnodes: int = option(1, "number of hosts", scope="free")
    node_rank: int = option(0, "this host's number, from 0", scope="free")
    master_addr: str | None = option(None, "host 0's name or address", scope="free")
    master_port: int | None = option(None, "a free port on host 0 (one host: chosen)", scope="free")
    rdzv_backend: str | None = option(None, "rendezvous backend, as torchrun's", scope="free")
    rdzv_endpoint: str | None = option(None, "rendezvous host:port, as torchrun's", scope="free")
    rdzv_id: str | None = option(None, "rendezvous id, as torchrun's", scope="free")
    max_restarts: int = option(
        0, "start all processes again from the last checkpoint after a crash", scope="free"
    )
    shutdown_timeout: int = option(
        120, "seconds to save and leave after SIGTERM before SIGKILL", scope="free"
    )


@dataclass(frozen=True)
class RunOptions:
    """Flags that mean the same in every recipe."""

    demo: bool = option(False, "train on the built-in demo data, in <recipe>/demo")
    resume: str = option(
        "auto",
        "auto: continue an interrupted run of the same settings; never; or a checkpoint's path",
        scope="free",
        const="auto",
    )
    allow_reshard: bool = option(
        False, "let --resume PATH continue at another number of processes", scope="free"
    )
    run_dir: Path | None = option(None, "where status, metrics and checkpoints go", scope="free")
    config: Path | None = option(None, "YAML or JSON file of these settings", scope="free")
    dry_run: bool = option(False, "check settings and data, print the plan, stop", scope="free")
    print_config: bool = option(False, "print the settings as JSON, stop", scope="free")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", scope="free")
    amp: Literal["off", "bf16", "fp16", "auto"] = option(
        "off", "mixed precision; typed alone: auto", const="auto"
    )
    seed: int = option(0, "seed of weights, order and augmentation")
    log_every: int = option(20, "steps between log lines and metrics", scope="free")
    save_every: int = option(500, "steps between checkpoints", scope="free")
    keep: int = option(2, "checkpoints to keep, to fall back on", scope="free")
    on_full_disk: Literal["continue", "stop"] = option(
        "continue", "after a periodic checkpoint that could not be written", scope="free"
    )
    max_bad_steps: int = option(10, "non-finite steps in a row before the run stops", scope="free")
    timeout: float = option(1800.0, "seconds one process waits for another", scope="free")
    processes: ProcessOptions = field(default_factory=ProcessOptions)
    typed: frozenset[str] = frozenset()  # fields the user gave; filled by parse

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "keep", "max_bad_steps", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def is_explicit_resume(self) -> bool:
        """Whether --resume names a checkpoint or run directory."""
        return self.resume not in _RESUME_WORDS


@dataclass(frozen=True)
class ToolOptions:
    """Flags that mean the same in every script that keeps no run."""

    demo: bool = option(False, "work on the built-in demo, in <recipe>/demo")
    config: Path | None = option(None, "YAML or JSON file of these settings")
    dry_run: bool = option(False, "check settings and files, print the plan, stop")
    print_config: bool = option(False, "print the settings as JSON, stop")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    amp: Literal["off", "bf16", "fp16", "auto"] = option(
        "off", "mixed precision; typed alone: auto", const="auto"
    )
    typed: frozenset[str] = frozenset()  # fields the user gave; filled by parse


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError in place of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


class _Extend(argparse.Action):
    """Texts of a flag typed once or several times, as one tuple."""

    def __call__(self, _parser: Any, namespace: Any, values: Any, _flag: Any = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


class Setting(NamedTuple):
    """One leaf of a configuration: its field, the type it is declared with, its value."""

    field: dataclasses.Field[Any]
    kind: Any
    value: Any

    @property
    def scope(self) -> Scope:
        """What a resumed run may do with it (see `option`)."""
        return self.field.metadata.get("scope", "result")


class HasRunOptions(Protocol):
    """A recipe's Config."""

    @property
    def run(self) -> RunOptions:
        """The flags that mean the same in every recipe."""
        ...


def parse(config_class: type[C], argv: list[str] | None = None, usage: str | None = None) -> C:
    """An instance of `config_class` from `argv` (default: sys.argv[1:]), its file and its defaults.

    Prints and leaves (SystemExit 0) for --help and --print-config. An explicit --resume PATH takes
    what was not typed from the run that wrote it. Raises UserError for anything not understood.
    """
    defaults = config_class()
    flags = _read_flags(defaults, sys.argv[1:] if argv is None else argv, usage)
    own_config = "config" in _names(defaults)  # then --config is not a file of these settings
    given = _read_file(defaults, None if own_config else flags.get("config")) | flags
    stored = _read_stored(defaults, given.get("resume"))
    _refuse_changes(defaults, stored, given)
    resume = {"resume": stored["resume"]} if stored else {}
    config = _build(defaults, stored | given | resume, frozenset(given))
    if flags.get("print_config"):
        sys.stdout.write(json.dumps(settings(config), indent=2, ensure_ascii=False) + "\n")
        raise SystemExit(0)
    return config


def parse_known(config_class: type[C], argv: list[str]) -> C:
    """Like `parse`, for the settings of `config_class` alone; all others are passed over."""
    defaults = config_class()
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    _add_flags(parser, defaults)
    flags = vars(parser.parse_known_args(dashed(argv))[0])
    known, path = leaves(defaults), flags.get("config")
    file = load_file(path) if path and path.suffix != ".py" else {}  # .py: a recipe's own kind
    given = {
        name: checked(known[name], value, path)
        for name, value in ((n.replace("-", "_"), v) for n, v in file.items())
        if name in known
    }
    return _build(defaults, given | flags, frozenset(given | flags))


def parse_own(
    config_class: type[C], argv: list[str] | None = None, usage: str | None = None
) -> tuple[C, list[str]]:
    """Like `parse`, and the words that belong to none of its settings, for another program.

    Only --help prints; a settings file is that program's.
    """
    defaults = config_class()
    parser = _Parser(
        description=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _add_flags(parser, defaults)
    flags, rest = parser.parse_known_args(dashed(sys.argv[1:] if argv is None else argv))
    return _build(defaults, vars(flags), frozenset(vars(flags))), rest


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


def _names(config: Any) -> set[str]:
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


def _build(defaults: C, given: dict[str, Any], typed: frozenset[str]) -> C:
    """`defaults` with the flat `given` values in their places. Raises UserError."""
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(typing.cast(Any, defaults)):
        value = getattr(defaults, item.name)
        if dataclasses.is_dataclass(value):
            below = {name: given[name] for name in given.keys() - _names(defaults)}
            changes[item.name] = _build(value, below, typed)
        elif item.name == "typed":
            changes[item.name] = typed
        elif item.name in given:
            changes[item.name] = given[item.name]
    try:
        return dataclasses.replace(typing.cast(Any, defaults), **changes)
    except ValueError as error:
        raise UserError(one_line(error)) from None


def _read_flags(defaults: Any, argv: list[str], usage: str | None) -> dict[str, Any]:
    parser = _Parser(
        description=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    _add_flags(parser, defaults)
    known, unknown = parser.parse_known_args(dashed(argv))
    if unknown:
        name = unknown[0].partition("=")[0]
        near = did_you_mean(name, parser._option_string_actions)
        raise UserError(f"unknown argument {name}{near or '; --help lists the flags'}")
    return vars(known)


def dashed(argv: list[str]) -> list[str]:
    """`argv` with the names of long flags in their dashed spelling."""
    dashed = []
    for token in argv:
        name, equals, value = token.partition("=")
        dashed.append(name.replace("_", "-") + equals + value if name.startswith("--") else token)
    return dashed


def _add_flags(
    parser: argparse.ArgumentParser, defaults: Any, group: Any = None, hidden: Any = frozenset()
) -> None:
    """Add a flag for every setting; each nested dataclass becomes a group of the help."""
    hints = typing.get_type_hints(type(defaults))
    for item in dataclasses.fields(defaults):
        value = getattr(defaults, item.name)
        if dataclasses.is_dataclass(value):
            title = (type(value).__doc__ or "").partition(".")[0]
            inner = parser.add_argument_group(title)
            _add_flags(parser, value, inner, hidden | _names(defaults))
        elif item.name not in {"typed", *hidden}:
            _add_flag(group or parser, Setting(item, hints[item.name], value))


def _add_flag(parser: Any, setting: Setting) -> None:
    metadata, name = setting.field.metadata, setting.field.name
    names = ["--" + name.replace("_", "-"), *metadata.get("aliases", ())]
    shown = (
        "" if setting.value is None or setting.value is False else f" (default: {setting.value})"
    )
    options: dict[str, Any] = {"dest": name}
    options["help"] = (metadata.get("help", "") + shown).replace("%", "%%")
    if metadata.get("positional"):
        kind = _reader(_without_none(setting.kind))
        parser.add_argument(name, type=kind, help=options["help"])
        return
    if setting.kind is bool:
        parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        return
    if metadata.get("const") is not None:
        options |= {"nargs": "?", "const": metadata["const"]}
    kind = _without_none(setting.kind)
    if typing.get_origin(kind) is Literal:
        parser.add_argument(*names, choices=typing.get_args(kind), **options)
    elif typing.get_origin(setting.kind) is tuple:
        parser.add_argument(*names, nargs="+", action=_Extend, metavar="TEXT", **options)
    else:
        word = {int: "N", float: "X", str: "TEXT", Path: "PATH"}[kind]
        parser.add_argument(*names, type=_reader(kind), metavar=word, **options)


def _reader(kind: type) -> Any:
    """The function from text to a value of `kind`."""
    if kind is Path:
        return lambda text: Path(text).expanduser().absolute()  # relative to where it was typed
    return kind


def _without_none(kind: Any) -> Any:
    """`int` for `int | None`; any other kind as it is."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _read_file(defaults: Any, path: Path | None) -> dict[str, Any]:
    """The settings of a YAML or JSON file, checked like flags. Raises UserError."""
    known = leaves(defaults)
    given: dict[str, Any] = {}
    for written, value in (load_file(path) if path else {}).items():
        name = written.replace("-", "_")
        if name not in known:
            near = did_you_mean(name, known)
            raise UserError(
                f"{path}: unknown setting {written}{near or '; --help lists the names'}"
            )
        given[name] = checked(known[name], value, path)
    return given


def load_file(path: Path) -> dict[str, Any]:
    """The names and values of a YAML or JSON file, unchecked. Raises UserError."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.count("[") + text.count("{") > _MOST_BRACKETS:  # yaml's time grows with the square
            raise ValueError("it nests too deeply")
        loaded = yaml.safe_load(text) or {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read: {one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise UserError(
            f"--config {path} must hold `name: value` lines, found {type(loaded).__name__}"
        )
    return {str(name): value for name, value in loaded.items()}


def checked(setting: Setting, value: Any, path: Path | None) -> Any:
    """`value` from a file as its setting's type; a wrong one is refused by name."""
    kind, name = _without_none(setting.kind), setting.field.name
    if value is None and kind is not setting.kind:
        return None
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(f"{path}: {name} is {value!r}, expected a list of texts")
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        value = "off" if value is False and "off" in allowed else value  # YAML reads off as false
        if value not in allowed:
            raise UserError(f"{path}: {name} is {value!r}, allowed: {', '.join(allowed)}")
        return value
    accepted = {bool: (bool,), int: (int,), float: (int, float, str), str: (str, int, float)}
    if isinstance(value, bool) is (kind is bool) and isinstance(value, accepted.get(kind, (str,))):
        try:
            return _reader(kind)(value)
        except ValueError:
            pass  # YAML reads 5e-4 as text, which float() accepts; any other text ends below
    raise UserError(f"{path}: {name} is {value!r}, expected {kind.__name__}")


def _read_stored(defaults: Any, resume: str | None) -> dict[str, Any]:
    """The settings of the run that wrote the checkpoint PATH; {} for auto, latest and never."""
    if resume is None or resume in _RESUME_WORDS:
        return {}
    path = Path(resume).expanduser().absolute()
    if not path.exists():
        raise UserError(
            f"--resume {resume}: no such checkpoint; give a file, a run directory, auto or never"
        )
    directory = path if path.is_dir() else path.parent
    above = directory.parent  # of a recipe that keeps checkpoints in a folder of the run's
    if (
        path.is_file()
        and not (directory / "config.json").is_file()
        and (above / "config.json").is_file()
    ):
        directory = above
    written = read_json(directory / "config.json")
    if not isinstance(written, dict) or not isinstance(written.get("settings"), dict):
        raise UserError(
            f"--resume {resume}: {directory / 'config.json'} is missing or was not written by a "
            "run; a checkpoint is resumed from its own run directory"
        )
    stored = written["settings"] | {"resume": str(path), "run_dir": str(directory)}
    kept = {name: leaf for name, leaf in leaves(defaults).items() if name not in _ONE_CALL}
    return {
        name: _from_plain(leaf.kind, stored[name]) for name, leaf in kept.items() if name in stored
    }


def _from_plain(kind: Any, value: Any) -> Any:
    """What `plain` was given, for a setting of this kind."""
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if _without_none(kind) is Path and value else value


_ONE_CALL = ("dry_run", "print_config", "config", "allow_reshard")  # asked for anew each time


def _refuse_changes(defaults: Any, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise UserError when a given setting would change the numbers of the resumed run."""
    known = leaves(defaults)
    refused = [
        f"{name}: {stored[name]} → {plain(value)}"
        for name, value in given.items()
        if known[name].scope == "result" and name in stored and plain(stored[name]) != plain(value)
    ]
    if refused:
        raise UserError(
            f"--resume {given['resume']} cannot continue with {'; '.join(refused)}; "
            "leave these flags out, or start anew with --resume never"
        )
