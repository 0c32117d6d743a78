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

import dataclasses
import json
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from shared import flags, settings_file
from shared.device import check_name
from shared.errors import UserError, one_line
from shared.settings import (
    PORTS,
    Count,
    Port,
    Range,
    Scope,
    Seconds,
    Seed,
    in_range,
    number,
    own_leaves,
    own_names,
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


@dataclass(frozen=True)
class ProcessOptions:
    """Flags for the launcher of processes; torchrun's names."""

    nproc: Count | None = option(
        None,
        "processes on this host; default: one a visible GPU, 1 without (also: NPROC_PER_NODE)",
        scope="free",
        aliases=("--nproc-per-node",),
    )
    nnodes: Count = option(1, "number of hosts", scope="free")
    node_rank: int = option(0, "this host's number, from 0", scope="free")
    master_addr: str | None = option(None, "host 0's name or address", scope="free")
    master_port: Port | None = option(
        None, "a free port on host 0 (one host: chosen)", scope="free"
    )
    rdzv_backend: str | None = option(None, "rendezvous backend, as torchrun's", scope="free")
    rdzv_endpoint: str | None = option(None, "rendezvous host:port, as torchrun's", scope="free")
    rdzv_id: str | None = option(None, "rendezvous id, as torchrun's", scope="free")
    max_restarts: int = option(
        0, "start all processes again from the last checkpoint after a crash", scope="free"
    )
    shutdown_timeout: Annotated[int, Range(0, 2_000_000)] = option(
        120, "seconds to save and leave after SIGTERM before SIGKILL", scope="free"
    )

    def __post_init__(self) -> None:
        _, colon, port = (self.rdzv_endpoint or "").rpartition(":")
        if colon and not port.endswith("]"):  # of an IPv6 address without a port
            number("the port of rdzv_endpoint", port, int, PORTS)


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
    seed: Seed = option(0, "seed of weights, order and augmentation")
    log_every: Count = option(20, "steps between log lines and metrics", scope="free")
    save_every: Count = option(500, "steps between checkpoints", scope="free")
    keep: Count = option(2, "checkpoints to keep, to fall back on", scope="free")
    on_full_disk: Literal["continue", "stop"] = option(
        "continue", "after a periodic checkpoint that could not be written", scope="free"
    )
    max_bad_steps: Count = option(
        10, "non-finite steps in a row before the run stops", scope="free"
    )
    timeout: Seconds = option(1800.0, "seconds one process waits for another", scope="free")
    processes: ProcessOptions = field(default_factory=ProcessOptions)
    typed: frozenset[str] = frozenset()  # fields the user gave; filled by parse

    def __post_init__(self) -> None:
        check_name(self.device)

    @property
    def is_explicit_resume(self) -> bool:
        """Whether --resume names a checkpoint or run directory."""
        return self.resume not in settings_file.RESUME_WORDS


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


def parse(config_class: type[C], argv: list[str] | None = None, usage: str | None = None) -> C:
    """An instance of `config_class` from `argv` (default: sys.argv[1:]), its file and its defaults.

    Prints and leaves (SystemExit 0) for --help and --print-config. An explicit --resume PATH takes
    what was not typed from the run that wrote it. Raises UserError for anything not understood.
    """
    defaults = config_class()
    typed = flags.read(defaults, sys.argv[1:] if argv is None else argv, usage)
    own_config = "config" in own_names(defaults)  # then --config is not a file of these settings
    given = settings_file.read(defaults, None if own_config else typed.get("config")) | typed
    stored = settings_file.read_stored(defaults, given.get("resume"))
    settings_file.refuse_changes(defaults, stored, given)
    resume = {"resume": stored["resume"]} if stored else {}
    config = _build(defaults, stored | given | resume, frozenset(given))
    if typed.get("print_config"):
        sys.stdout.write(json.dumps(settings(config), indent=2, ensure_ascii=False) + "\n")
        raise SystemExit(0)
    return config


def parse_known(config_class: type[C], argv: list[str]) -> C:
    """Like `parse`, for the settings of `config_class` alone; all others are passed over."""
    defaults = config_class()
    typed = flags.read_known(defaults, argv)
    path = typed.get("config")
    given = typed
    if path and path.suffix != ".py":  # which a recipe reads itself
        given = settings_file.read_known(defaults, path) | typed
    return _build(defaults, given, frozenset(given))


def parse_own(
    config_class: type[C], argv: list[str] | None = None, usage: str | None = None
) -> tuple[C, list[str]]:
    """Like `parse`, and the words that belong to none of its settings, for another program.

    Only --help prints; a settings file is that program's.
    """
    defaults = config_class()
    typed, rest = flags.read_own(defaults, sys.argv[1:] if argv is None else argv, usage)
    return _build(defaults, typed, frozenset(typed)), rest


def _build(defaults: C, given: dict[str, Any], typed: frozenset[str]) -> C:
    """`defaults` with the flat `given` values in their places. Raises UserError."""
    changes: dict[str, Any] = {}
    own = own_leaves(defaults)
    for item in dataclasses.fields(typing.cast(Any, defaults)):
        value = getattr(defaults, item.name)
        if dataclasses.is_dataclass(value):
            below = {name: given[name] for name in given.keys() - own_names(defaults)}
            changes[item.name] = _build(value, below, typed)
        elif item.name == "typed":
            changes[item.name] = typed
    changes |= {name: in_range(own[name], given[name]) for name in own.keys() & given.keys()}
    try:
        return dataclasses.replace(typing.cast(Any, defaults), **changes)
    except ValueError as error:
        raise UserError(one_line(error)) from None
