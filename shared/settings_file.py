"""Settings from files: YAML or JSON of --config, and config.json of a run that is resumed.

Standard library only, and PyYAML when a file is read.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, Literal

from shared import gone
from shared.errors import UserError, did_you_mean, one_line, shortened, shown
from shared.files import read_json, read_text
from shared.settings import Setting, from_plain, in_range, leaves, plain, reader_of, without_none

RESUME_WORDS = ("auto", "latest", "never")
_MOST_BRACKETS = 1_000  # in a file of settings
_ONE_CALL = ("dry_run", "print_config", "config", "allow_reshard")  # asked for anew each time


def read(defaults: Any, path: Path | None) -> dict[str, Any]:
    """The settings of a YAML or JSON file, checked like flags. Raises UserError."""
    known = leaves(defaults)
    given: dict[str, Any] = {}
    for written, value in (load_file(path) if path else {}).items():
        name = written.replace("-", "_")
        if name not in known:
            gone.refuse(["--" + name.replace("_", "-")])
            near = did_you_mean(name, known)
            raise UserError(
                f"{path}: unknown setting {shortened(written)}{near or '; --help lists the names'}"
            )
        given[name] = checked(known[name], value, path)
    return given


def read_known(defaults: Any, path: Path) -> dict[str, Any]:
    """Like `read`, for these settings alone; all others are passed over."""
    known = leaves(defaults)
    file = ((written.replace("-", "_"), value) for written, value in load_file(path).items())
    return {name: checked(known[name], value, path) for name, value in file if name in known}


def load_file(path: Path) -> dict[str, Any]:
    """The names and values of a YAML or JSON file, unchecked. Raises UserError."""
    import yaml

    try:
        text = read_text(path, "utf-8-sig")
        if text.count("[") + text.count("{") > _MOST_BRACKETS:  # yaml's time grows with the square
            raise ValueError("it nests too deeply")
        loaded = yaml.safe_load(text) or {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} cannot be read: {one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise UserError(
            f"--config {path} must hold `name: value` lines, found {type(loaded).__name__}"
        )
    return {name if isinstance(name, str) else shown(name): value for name, value in loaded.items()}


def checked(setting: Setting, value: Any, path: Path | None) -> Any:
    """`value` from a file as its setting's type; a wrong one is refused by name."""
    kind, name = without_none(setting.kind), setting.field.name
    if value is None and kind is not setting.kind:
        return None
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(f"{path}: {name} is {shown(value)}, expected a list of texts")
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        value = "off" if value is False and "off" in allowed else value  # YAML reads off as false
        if value not in allowed:
            raise UserError(f"{path}: {name} is {shown(value)}, allowed: {', '.join(allowed)}")
        return value
    accepted = {bool: (bool,), int: (int,), float: (int, float, str), str: (str, int, float)}
    if isinstance(value, bool) is (kind is bool) and isinstance(value, accepted.get(kind, (str,))):
        try:
            read = reader_of(kind)(value)
        except (ValueError, OverflowError):
            pass  # YAML reads 5e-4 as text, which float() accepts; any other text ends below
        else:
            return _in_range(setting, read, path)
    raise UserError(f"{path}: {name} is {shown(value)}, expected {kind.__name__}")


def _in_range(setting: Setting, value: Any, path: Path | None) -> Any:
    try:
        return in_range(setting, value)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_stored(defaults: Any, resume: str | None) -> dict[str, Any]:
    """The settings of the run that wrote the checkpoint PATH; {} for auto, latest and never."""
    if resume is None or resume in RESUME_WORDS:
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
        name: from_plain(leaf.kind, stored[name]) for name, leaf in kept.items() if name in stored
    }


def refuse_changes(defaults: Any, stored: dict[str, Any], given: dict[str, Any]) -> None:
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
