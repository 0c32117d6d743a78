"""config.yaml: the settings of run_training.py in the sections model, training and paths.

Standard library only, and PyYAML when a file is read: entry scripts look here first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared import settings
from shared.errors import UserError, did_you_mean
from shared.settings import Setting

MODEL = ("embed_dim", "use_checkpoint", "dropout", "activation", "pretrained")
MINIMUM_GB = {"tiny": 4, "small": 8, "base": 12, "large": 20}  # of GPU memory, as documented
PATHS = ("data_root", "output_dir", "feature_cache")
# The two names that differ from the flags'.
_FIELDS = {"model": {"size": "model_size"}, "training": {"learning_rate": "lr"}}
_NOT_HERE = ("config", "demo", "dry_run", "print_config", "estimate", "resume", "run_dir")


def read(path: Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """The file's settings by the names of the flags, checked.

    known: every setting that there is. Relative paths start in the recipe's directory.
    Raises UserError, with the nearest name, for what is not understood.
    """
    sections = _sections(known)
    found: dict[str, Any] = {}
    for section, content in settings.load_file(path).items():
        if section not in sections:
            near = did_you_mean(str(section), sections) or f"; expected {', '.join(sections)}"
            raise UserError(f"{path}: unknown section {section}{near}")
        if not isinstance(content, dict | None):
            raise UserError(f"{path}: {section} must hold `name: value` lines, found {content!r}")
        for name, value in (content or {}).items():
            field = sections[section].get(str(name).replace("-", "_"))
            if field is None:
                raise UserError(f"{path}: unknown setting {section}.{name}{_hint(name, sections)}")
            rooted = _rooted(known[field], value)
            found[field] = settings.read(known[field], rooted, f"{path}: {field}")
    return found


def _sections(known: Mapping[str, Setting]) -> dict[str, dict[str, str]]:
    """Section → name in the file → name of the flag."""
    placed = {*MODEL, *PATHS, *_NOT_HERE, "model_size", "lr"}
    names = {
        "model": MODEL,
        "training": [name for name in known if name not in placed],
        "paths": PATHS,
    }
    return {
        section: {name: name for name in of_section} | _FIELDS.get(section, {})
        for section, of_section in names.items()
    }


def _hint(name: str, sections: dict[str, dict[str, str]]) -> str:
    """Where the name belongs, or the nearest one there is."""
    full = {f"{section}.{one}": one for section, names in sections.items() for one in names}
    for place, one in full.items():
        if one == name:
            return f"; it belongs below {place.partition('.')[0]}"
    near = did_you_mean(str(name), full.values())
    return near or "; run_training.py --help lists the names"


def _rooted(setting: Setting, value: Any) -> Any:
    """A relative path from the recipe's directory on; any other value as it is."""
    if setting.field.name in PATHS and isinstance(value, str):
        if value.startswith("~"):
            return value  # the home directory is looked up where every path is read
        return str(Path(__file__).resolve().parents[1] / value)
    return value
