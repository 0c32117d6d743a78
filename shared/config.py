"""Dataclass ↔ flags ↔ YAML: a recipe's frozen dataclass is its flags, its help, its file format.

    @dataclass(frozen=True)
    class Config:
        batch_size: Count = option(128, "images per optimizer step, summed over processes")
        run: RunOptions = field(default_factory=RunOptions)

    cfg = parse(Config, argv, __doc__)

What is typed wins over the settings of --demo, these over --config FILE, this over the defaults.
`--batch-size` and `--batch_size` are the same flag. Unknown names are refused with the nearest one.

Standard library only; tyro where a command line is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import re
import sys
import textwrap
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from shared import fit, gone
from shared.device import check_name
from shared.errors import UserError, did_you_mean, missing_package, one_line, shortened
from shared.settings import (
    PORTS,
    RESUME_WORDS,
    Count,
    Port,
    Range,
    Scope,
    Seconds,
    Seed,
    Setting,
    leaves,
    number,
    of_file,
    of_run,
    read,
    refuse_changes,
    sections,
    settings,
)

C = TypeVar("C")

_ROOT = Path(__file__).resolve().parents[1]


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


def free(default: Any, text: str, **more: Any) -> Any:
    """An `option` that a resumed run may always change."""
    return option(default, text, scope="free", **more)


@dataclass(frozen=True)
class ProcessOptions:
    """Flags for the launcher of processes; torchrun's names."""

    nproc: Count | None = free(
        None,
        "processes on this host; default: one a visible GPU, 1 without (also: NPROC_PER_NODE)",
        aliases=("--nproc-per-node",),
    )
    nnodes: Count = free(1, "number of hosts")
    node_rank: int = free(0, "this host's number, from 0")
    master_addr: str | None = free(None, "host 0's name or address")
    master_port: Port | None = free(None, "a free port on host 0 (one host: chosen)")
    rdzv_backend: str | None = free(None, "rendezvous backend, as torchrun's")
    rdzv_endpoint: str | None = free(None, "rendezvous host:port, as torchrun's")
    rdzv_id: str | None = free(None, "rendezvous id, as torchrun's")
    max_restarts: int = free(0, "start all processes again from the last checkpoint after a crash")
    shutdown_timeout: Annotated[int, Range(0, 2_000_000)] = free(
        120, "seconds to save and leave after SIGTERM before SIGKILL"
    )

    def __post_init__(self) -> None:
        _, colon, port = (self.rdzv_endpoint or "").rpartition(":")
        if colon and not port.endswith("]"):  # of an IPv6 address without a port
            number("the port of rdzv_endpoint", port, int, PORTS)


@dataclass(frozen=True)
class RunOptions:
    """Flags that mean the same in every recipe."""

    demo: bool = option(False, "train on the built-in demo data, in <recipe>/demo")
    resume: str = free(
        "auto",
        "auto: continue an interrupted run of the same settings; never; or a checkpoint's path",
        const="auto",
    )
    allow_reshard: bool = free(False, "let --resume PATH continue at another number of processes")
    run_dir: Path | None = free(None, "where status, metrics and checkpoints go")
    config: Path | None = free(None, "YAML or JSON file of these settings")
    dry_run: bool = free(False, "check settings and data, print the plan, stop")
    print_config: bool = free(False, "print the settings as JSON, stop")
    prove: bool = free(
        False, "train the first steps in several ways that must agree, compare them, stop"
    )
    replay: Count | None = free(
        None, "train up to this step of the run once more, write a page of its samples, stop"
    )
    stop_after: Count | None = free(None, "save after this optimizer step, and stop")
    device: str = free("auto", "auto, cpu, cuda or cuda:N")
    fit: str | None = free(
        None,
        "the same step in this much memory, as 12GB; typed alone: what the smallest GPU has free",
        const="auto",
    )
    amp: Literal["off", "bf16", "fp16", "auto"] = option(
        "off", "mixed precision; typed alone: auto", const="auto"
    )
    seed: Seed = option(0, "seed of weights, order and augmentation")
    log_every: Count = free(20, "steps between log lines and metrics")
    save_every: Count = free(500, "steps between checkpoints")
    keep: Count = free(2, "checkpoints to keep, to fall back on")
    on_full_disk: Literal["continue", "stop"] = free(
        "continue", "after a periodic checkpoint that could not be written"
    )
    max_bad_steps: Count = free(10, "non-finite steps in a row before the run stops")
    timeout: Seconds = free(1800.0, "seconds one process waits for another")
    processes: ProcessOptions = field(default_factory=ProcessOptions)
    typed: frozenset[str] = frozenset()  # fields the user gave; filled by parse

    def __post_init__(self) -> None:
        check_name(self.device)
        if self.fit not in (None, "auto"):
            fit.size_of(self.fit)

    @property
    def is_explicit_resume(self) -> bool:
        """Whether --resume names a checkpoint or run directory."""
        return self.resume not in RESUME_WORDS


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

    def __post_init__(self) -> None:
        check_name(self.device)


class HasRunOptions(Protocol):
    """A recipe's Config."""

    @property
    def run(self) -> RunOptions:
        """The flags that mean the same in every recipe."""
        ...


def parse(
    config_class: type[C],
    argv: list[str] | None = None,
    usage: str | None = None,
    demo: Mapping[str, Any] | None = None,
) -> C:
    """An instance of `config_class` from `argv` (default: sys.argv[1:]), its file and its defaults.

    demo: settings that come with --demo. An explicit --resume PATH takes what was not typed from
    the run that wrote it. Prints and leaves (SystemExit 0) for --help and --print-config.
    Raises UserError for anything not understood.
    """
    defaults = config_class()
    known = leaves(defaults)
    typed, rest = _read(defaults, argv, usage)
    if rest:
        name = rest[0].partition("=")[0]
        near = did_you_mean(name, of_script()) or "; --help lists the flags"
        raise UserError(f"unknown argument {shortened(name)}{near}")
    file = of_file(known, typed["config"]) if "config" in typed and _is_ours(known) else {}
    given = file | typed
    stored = of_run(known, given.get("resume"))
    refuse_changes(known, stored, given)
    is_demo = bool(given.get("demo"))
    if stored:
        given = stored | given | {"resume": stored["resume"]}
    elif is_demo:
        given = file | dict(demo or {}) | typed
    config = _build(defaults, given, frozenset(typed if is_demo else file | typed))
    if typed.get("print_config"):
        sys.stdout.write(json.dumps(settings(config), indent=2, ensure_ascii=False) + "\n")
        raise SystemExit(0)
    return config


def parse_own(
    config_class: type[C], argv: list[str] | None = None, usage: str | None = None
) -> tuple[C, list[str]]:
    """Like `parse`, and the words that belong to none of its settings, for another program.

    Only --help prints; a settings file is that program's.
    """
    defaults = config_class()
    typed, rest = _read(defaults, argv, usage)
    return _build(defaults, typed, frozenset(typed)), rest


def parse_known(config_class: type[C], argv: list[str]) -> C:
    """Like `parse`, for the settings of `config_class` alone; all others are passed over."""
    defaults = config_class()
    given, _ = _typed(defaults, argv, add_help=False)
    path = given.get("config")
    if isinstance(path, Path) and path.suffix != ".py":  # which a recipe reads itself
        given = of_file(leaves(defaults), path, strict=False) | given
    return _build(defaults, given, frozenset(given))


_of_script: frozenset[str] = frozenset()


def of_script() -> frozenset[str]:
    """The flags that this process's script has, once it has read its command line."""
    return _of_script


def dashed(argv: list[str]) -> list[str]:
    """`argv` with the names of long flags in their dashed spelling."""
    dashed = []
    for token in argv:
        name, equals, value = token.partition("=")
        dashed.append(name.replace("_", "-") + equals + value if name.startswith("--") else token)
    return dashed


def _is_ours(known: Mapping[str, Setting]) -> bool:
    """Whether --config is a file of these settings; else it is a file of the recipe's own kind."""
    return known["config"].kind is Path and known["config"].is_optional


def _build(defaults: C, given: Mapping[str, Any], typed: frozenset[str]) -> C:
    """`defaults` with the flat `given` values in their places. Raises UserError."""
    fields = dataclasses.fields(typing.cast(Any, defaults))
    below = {n: value for n, value in given.items() if n not in {item.name for item in fields}}
    changes: dict[str, Any] = {}
    for item in fields:
        value = getattr(defaults, item.name)
        if item.name == "typed":
            changes["typed"] = typed
        elif dataclasses.is_dataclass(value):
            changes[item.name] = _build(value, below, typed)
        elif item.name in given:
            changes[item.name] = given[item.name]
    try:
        return dataclasses.replace(typing.cast(Any, defaults), **changes)
    except ValueError as error:
        raise UserError(one_line(error)) from None


def _read(
    defaults: Any, argv: list[str] | None, usage: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The settings typed to this script, and the words that are none; prints for --help.

    argv: default sys.argv[1:]. usage: the script's docstring. Raises UserError.
    """
    global _of_script
    _of_script = frozenset(flag for leaf in leaves(defaults).values() for flag in leaf.flags)
    words = dashed(sys.argv[1:] if argv is None else argv)
    gone.refuse(words, _of_script)
    if usage and not {"-h", "--help"}.isdisjoint(words):
        sys.stdout.write(_for_terminal(usage) + "\n\n")
    return _typed(defaults, words)


def _for_terminal(usage: str) -> str:
    """A docstring in 79 columns: prose filled; what a command does below it, where it must be."""
    blocks = usage.strip().split("\n\n")
    for at, block in enumerate(blocks):
        if "   " not in block.strip():
            blocks[at] = textwrap.fill(block, 79)
        elif max(map(len, block.splitlines())) > 79:
            blocks[at] = re.sub(r"^( *\S+(?: \S+)*)   *(?=\S)", r"\1\n      ", block, flags=re.M)
    return "\n\n".join(blocks)


def _typed(defaults: Any, argv: list[str], **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The settings in a command line, and the words that are none. options: of tyro.cli."""
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise missing_package(str(error.name)) from None
    words, said = dashed(argv), io.StringIO()
    typed = {word.partition("=")[0] for word in words}
    options |= {"description": "", "prog": Path(sys.argv[0]).name, "return_unknown_args": True}
    try:
        with contextlib.redirect_stderr(said):
            form, rest = tyro.cli(_form(defaults, typed), args=words, **options)
    except SystemExit as left:
        if left.code:
            raise UserError(_without_box(said.getvalue())) from None
        raise
    values = vars(form)
    for part in values.values():
        values = values | (vars(part) if dataclasses.is_dataclass(part) else {})
    return {
        name: tuple(itertools.chain(*values[name])) if leaf.is_list and leaf.flags else values[name]
        for name, leaf in leaves(defaults).items()
        if not leaf.flags or not typed.isdisjoint(leaf.flags)
    }, rest


def _without_box(text: str) -> str:
    """The words of a message that tyro has drawn a box around, on one line, without its title."""
    rows = [row.strip("│| ") for row in text.splitlines()[1:-1]]
    said = " ".join(row if row.strip("─-") else ";" for row in rows)  # a rule between two rows
    for clumsy, plain in (("1 values.", "one value"), (" ;", ";"), ("For full", "for the")):
        said = said.replace(clumsy, plain)
    return textwrap.shorten(said, 300)


def _form(defaults: Any, typed: Collection[str]) -> type:
    """The settings of `defaults` as tyro takes them: a dataclass, with one in it for each group.

    typed: the spellings of flags on the command line.
    """
    from tyro import conf

    (_, own), *groups = sections(defaults)
    fields = [_form_field(leaf, typed) for leaf in own.values()]
    for section, inner in groups:
        name = type(section).__name__.removesuffix("Options").lower()
        inner_fields = [_form_field(leaf, typed) for leaf in inner.values()]
        form = dataclasses.make_dataclass(name, inner_fields)
        about = conf.arg(help=(section.__doc__ or "").partition("\n")[0])
        fields.append((name, Annotated[form, about]))
    return dataclasses.make_dataclass("settings", fields, kw_only=True)


def _form_field(leaf: Setting, typed: Collection[str]) -> Any:
    """A setting as a field: how tyro reads and shows it."""
    from tyro import conf, constructors

    metadata, name, const = leaf.field.metadata, leaf.field.name, leaf.field.metadata.get("const")
    words = {int: "N", float: "X", Path: "PATH"}
    metavar = "{" + ",".join(leaf.choices) + "}" if leaf.choices else words.get(leaf.kind, "TEXT")

    def from_words(words: list[str]) -> Any:
        if leaf.is_list and not words:
            where = "" if metadata.get("positional") else " after the flag"
            raise UserError(f"{name} is empty, allowed: one or more texts{where}")
        alias = next((flag for flag in metadata.get("aliases", ()) if flag in typed), "")
        value = words if leaf.is_list else " ".join(words) if words else const
        return read(leaf, value, alias)

    spec = constructors.PrimitiveConstructorSpec(
        nargs="*" if leaf.is_list or const else 1,
        metavar=f"{metavar} …" if leaf.is_list else f"[{metavar}]" if const else metavar,
        instance_from_str=from_words,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )
    kind: Any = bool if leaf.kind is bool else Annotated[Any, spec]
    if metadata.get("positional"):
        about = conf.arg(
            help=metadata["help"], metavar=name.upper(), help_behavior_hint="(required)"
        )
        return name, Annotated[conf.Positional[kind], about]
    if leaf.is_list:
        kind = conf.UseAppendAction[tuple[kind, ...]]
    shown = conf.arg(
        help=metadata.get("help", ""),
        help_behavior_hint=_default(leaf),
        aliases=metadata.get("aliases", ()),
        prefix_name=False,
    )
    return name, Annotated[kind, shown], () if leaf.is_list else leaf.value


def _default(leaf: Setting) -> str:
    """The end of a setting's help."""
    value = leaf.value
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, tuple):
        value = " ".join(value)
    elif isinstance(value, Path) and value.is_relative_to(_ROOT):
        value = value.relative_to(_ROOT)
    is_told = value in (None, "") and "default" in leaf.field.metadata.get("help", "")
    return "" if is_told else f"(default: {'none' if value in (None, '') else value})"
