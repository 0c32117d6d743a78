"""Dataclass ↔ flags ↔ YAML: a recipe's frozen dataclass is its flags, its help, its file format.

    @dataclass(frozen=True)
    class Config:
        batch_size: Count = option(128, "images per optimizer step, summed over processes")
        run: RunOptions = field(default_factory=RunOptions)

    cfg = parse(Config, argv, __doc__)

What is typed wins over the settings of --demo, these over --config FILE, this over the defaults.
`--batch-size` and `--batch_size` are the same flag. Unknown names are refused with the nearest one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from shared.device import check_name
from shared.errors import UserError, did_you_mean, one_line, shortened
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
    of_line,
    of_run,
    of_script,
    of_script_line,
    refuse_changes,
    settings,
)

C = TypeVar("C")


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
    device: str = free("auto", "auto, cpu, cuda or cuda:N")
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
    typed, rest = of_script_line(defaults, argv, usage)
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


def _is_ours(known: Mapping[str, Setting]) -> bool:
    """Whether --config is a file of these settings; else it is a file of the recipe's own kind."""
    return known["config"].kind is Path and known["config"].is_optional


def parse_own(
    config_class: type[C], argv: list[str] | None = None, usage: str | None = None
) -> tuple[C, list[str]]:
    """Like `parse`, and the words that belong to none of its settings, for another program.

    Only --help prints; a settings file is that program's.
    """
    defaults = config_class()
    typed, rest = of_script_line(defaults, argv, usage)
    return _build(defaults, typed, frozenset(typed)), rest


def parse_known(config_class: type[C], argv: list[str]) -> C:
    """Like `parse`, for the settings of `config_class` alone; all others are passed over."""
    defaults = config_class()
    given, _ = of_line(defaults, argv, add_help=False)
    path = given.get("config")
    if isinstance(path, Path) and path.suffix != ".py":  # which a recipe reads itself
        given = of_file(leaves(defaults), path, strict=False) | given
    return _build(defaults, given, frozenset(given))


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
