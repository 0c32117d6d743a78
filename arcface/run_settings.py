"""From a command line to the recipe of a run, and what its config.json keeps of it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcface import config_options, config_reader
from arcface.partition import LIST, Partition, read_partition
from arcface.pipeline import build_pipeline
from arcface.recipe import Recipe, deciding
from arcface.recipe_reader import KNOWN, read_recipe
from arcface.schedule import learning_rate_factor
from shared.config import RunOptions, option
from shared.errors import UserError
from shared.files import read_json
from shared.run_status import flat
from shared.settings import differing

_SHOWN = 5  # settings that differ, in one message


@dataclass(frozen=True)
class RunSettings:
    """What config.json keeps of a run; the first three make it the same run or another.

    changed: dotted key → the file's value, of what options changed (None: not in the file).
    """

    recipe: str = option("", "digest of the settings that decide the numbers")
    init: str = option("pretrained", "what the encoder started from")
    epochs: int = option(0, "passes over the training pictures", scope="length")
    configuration: dict[str, Any] = field(default_factory=dict, metadata={"scope": "free"})
    changed: dict[str, Any] = field(default_factory=dict, metadata={"scope": "free"})
    run: RunOptions = field(default_factory=RunOptions)

    def departures(self) -> dict[str, Any]:
        """What options changed in the configuration, with the file's values."""
        flags = {} if self.init == "pretrained" else {"init": "pretrained"}
        return flags | {f"configuration.{name}": value for name, value in self.changed.items()}


@dataclass(frozen=True)
class Settings:
    """A checked recipe.

    roots: the directory of each data set, by its loader's key. remarks: what the user should know.
    cwd: what relative paths of weights are relative to. changed: see RunSettings.
    """

    configuration: dict[str, Any]
    recipe: Recipe
    roots: dict[str, Path]
    remarks: list[str]
    cwd: Path
    changed: dict[str, Any] = field(default_factory=dict)

    def for_run(self, run: RunOptions, init: str) -> RunSettings:
        """What goes into config.json."""
        digest = hashlib.blake2b(_text(deciding(self.configuration)).encode(), digest_size=8)
        return RunSettings(
            digest.hexdigest(), init, self.recipe.epochs, _plain(self.configuration),
            _plain(self.changed), run,
        )  # fmt: skip


@dataclass(frozen=True)
class Overrides:
    """What a command line lays over a configuration: --cfg-options and the flags beside.

    data_root: of every split. scale_lr: the learning rate follows the batch size. strict: what is
    not understood is refused, not remarked on.
    """

    options: tuple[str, ...] = ()
    data_root: Path | None = None
    scale_lr: bool = False
    strict: bool = False


def load(name: str, overrides: Overrides, cwd: Path) -> Settings:
    """The settings of the configuration file `name`, as found from `cwd`, under `overrides`.

    Raises UserError for anything not understood and for data that is not there.
    """
    file = config_reader.find_config(name, cwd)
    return _settle(config_reader.read_config(file), overrides, cwd)


def load_stored(run_dir: Path, overrides: Overrides, cwd: Path) -> Settings:
    """The settings of the run in `run_dir` under further overrides. Raises UserError as `load`."""
    return _settle(stored_configuration(run_dir), overrides, cwd)


def directory_of(checkpoint: Path) -> Path:
    """The run directory of a checkpoint, or the directory itself."""
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def stored_configuration(run_dir: Path) -> dict[str, Any]:
    """The configuration of the run in `run_dir`. Raises UserError where none is."""
    written = read_json(run_dir / "config.json")
    settings = written.get("settings") if isinstance(written, dict) else None
    configuration = settings.get("configuration") if isinstance(settings, dict) else None
    if not isinstance(configuration, dict):
        raise UserError(
            f"{run_dir / 'config.json'} is missing or is not of a run of this recipe; name the "
            "configuration file with --config"
        )
    return configuration


def refuse_changes(before: dict[str, Any], now: dict[str, Any], resume: str) -> None:
    """Raise UserError when a run with configuration `before` cannot go on with `now`."""
    changed = differing(*(_flat(configuration) for configuration in (before, now)))
    if changed:
        more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise UserError(
            f"--resume {resume} cannot continue with {'; '.join(changed[:_SHOWN])}{more}; leave "
            "these settings as they were, or start anew without --resume"
        )


def changes(run_dir: Path, now: dict[str, Any]) -> list[str]:
    """What of `now` differs from the run in `run_dir`, 'name: old → new'; [] without one."""
    try:
        return differing(_flat(stored_configuration(run_dir)), _flat(now))
    except UserError:
        return []


def check_data(settings: Settings) -> list[str]:
    """A remark for each oddity of the lists of pictures. Raises UserError for what is wrong.

    Lists, pipelines and learning rates are looked at before torch is loaded.
    """
    recipe, read = settings.recipe, dict[Path, Partition]()
    for loader in (recipe.train, recipe.query, recipe.gallery):
        path = settings.roots[loader.name] / str(loader.dataset.get("ann_file", LIST))
        read[path] = read.get(path) or read_partition(path)
        read[path].split(str(loader.dataset.get("split", "train")))
        build_pipeline(loader.dataset.get("pipeline"), f"{loader.name}.dataset.pipeline")
    learning_rate_factor(recipe.schedule, 1, recipe.optimizer.lr)
    return [remark for partition in read.values() for remark in partition.remarks()]


def check_weights(settings: Settings, init: str) -> None:
    """Raise UserError for a path of weights where there is no file; names of weights pass."""
    encoder: Any = settings.recipe.encoder
    first = encoder[0] if isinstance(encoder, list | tuple) and encoder else encoder
    init_cfg = first.get("init_cfg") if isinstance(first, dict) and init == "pretrained" else None
    named = {
        "model.image_encoder.0.init_cfg.checkpoint": (init_cfg or {}).get("checkpoint"),
        "load_from": settings.recipe.load_from,
    }
    for key, name in named.items():
        if not isinstance(name, str) or "://" in name:
            continue
        is_path = "/" in name or name.endswith((".pth", ".pt", ".bin", ".safetensors"))
        if is_path and not (settings.cwd / Path(name).expanduser()).exists():
            raise UserError(
                f"{key}: {settings.cwd / Path(name).expanduser()} is missing: give a weight "
                "file's path"
            )


def _settle(configuration: dict[str, Any], overrides: Overrides, cwd: Path) -> Settings:
    """Put the overrides over the configuration and read what comes out."""
    before = flat(_plain(configuration))
    configuration, remarks = config_options.with_options(
        configuration, overrides.options, known=KNOWN, strict=overrides.strict
    )
    if overrides.data_root is not None:
        configuration = config_options.with_data_root(configuration, str(overrides.data_root))
    if overrides.scale_lr:
        scaling = configuration.get("auto_scale_lr") or {}
        configuration["auto_scale_lr"] = {**scaling, "enable": True}
    after = flat(_plain(configuration))
    names = before.keys() | after.keys()
    changed = {n: before.get(n) for n in sorted(names) if before.get(n) != after.get(n)}
    recipe, unread = read_recipe(configuration, cwd)
    if overrides.strict and unread:
        raise UserError(f"{unread[0]} (--strict-cfg refuses it)")
    typed = " ".join(remarks)
    remarks += [line for line in unread if line.split(" ")[0] not in typed]  # once is enough
    roots = config_options.data_roots(configuration, cwd)
    for key, path in roots.items():  # to be found again from elsewhere
        option = f"{key}.dataset.data_root={str(path)!r}"
        configuration, _ = config_options.with_options(configuration, [option])
    return Settings(configuration, recipe, roots, remarks, cwd, changed)


def _flat(configuration: dict[str, Any]) -> dict[str, Any]:
    return json.loads(_text(deciding(configuration)))


def _text(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: keys as text, numbers that are not finite as text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
