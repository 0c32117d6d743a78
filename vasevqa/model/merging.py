"""Which adapter is merged into which base, and whether the result is what it should be.

A run notes what its base's files were (`runs.describe`). After GRPO on output/checkpoint-merged the
next merge replaces that directory; the old one is kept under another name and found again by its
files, so that no adapter is ever added to a model it was not trained on.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import open_regular, read_json
from vasevqa.model import runs
from vasevqa.model.needs import broken_safetensors, weights
from vasevqa.model.paths import is_local
from vasevqa.model.runs import Checkpoint, files_of

NOTE = "merged_from.json"  # in a merged directory: what it was made of
_NOT_THE_MODEL = ("optimizer", "scheduler", "rng_state", "trainer_state", "training_args")


@dataclass(frozen=True)
class Merge:
    """What is merged: the adapter, its base (a path or a hub's id), the place of the result."""

    adapter: Path
    base: str
    target: Path

    @property
    def note(self) -> dict[str, Any]:
        """What merged_from.json holds."""
        return {
            "adapter": str(self.adapter),
            "adapter_files": files_of(self.adapter),
            "base": self.base,
            "base_files": files_of(Path(self.base)),
        }

    @property
    def is_done(self) -> bool:
        """Whether the target was made of this very adapter."""
        note = read_json(self.target / NOTE)
        same = isinstance(note, dict) and note.get("adapter_files") == files_of(self.adapter)
        return same and not list(weights(self.target))


def choose(adapter: str | None, root: Path) -> Checkpoint:
    """The checkpoint to merge: the one that was named, else the newest below `root`.

    It may hold a whole model, which needs no merging. Raises UserError when there is none.
    """
    if adapter is not None:
        path = Path(adapter)
        if (path / "adapter_config.json").is_file() and not (path / "trainer_state.json").exists():
            return Checkpoint(path, 0)  # an adapter from elsewhere
        return runs.named(path)
    found = runs.newest(root)
    if found is None:
        raise UserError(
            f"no checkpoint below {root}: run ./sft.sh first, or type --adapters DIR (a "
            "checkpoint-N with adapter_config.json)"
        )
    return found


def plan(checkpoint: Checkpoint, target: Path) -> Merge:
    """The merge of an adapter. Raises UserError when its base is not to be had any more."""
    for name in ("adapter_model.safetensors",):
        if reason := broken_safetensors(checkpoint.path / name):
            raise UserError(f"{checkpoint.path / name} {reason}: choose another --adapters")
    base = _recorded_base(checkpoint.path)
    noted = _noted_files(checkpoint.path)
    if is_local(base) and noted and files_of(Path(base)) != noted:
        base = str(_find_again(Path(base), noted))
    if is_local(base) and not Path(base).is_dir():
        raise UserError(f"the base {base} of {checkpoint.path} is gone: put it back there")
    return Merge(checkpoint.path, base, target)


def model_files(directory: Path) -> list[Path]:
    """The files of a whole checkpoint that make the model, without those for going on training."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.startswith(_NOT_THE_MODEL)
    ]


def verify(merge: Merge, merged: Path) -> None:
    """Compare the merged weights with base and adapter: all there, and W + s·B·A where trained.

    Raises UserError naming the first that does not fit.
    """
    for problem in weights(merged):
        raise UserError(f"the merged model is not whole: {problem}")
    shapes = dict(_shapes(merged))
    if is_local(merge.base):
        missing = set(dict(_shapes(Path(merge.base)))) - set(shapes)
        if missing - {"lm_head.weight"}:  # a tied head may be written or left out
            raise UserError(f"{merged} lacks {sorted(missing)[0]} of the base {merge.base}")
    for name, difference in _differences(merge, merged):
        if difference > 0.02:  # bfloat16 has 8 bits
            raise UserError(f"{merged}: {name} is {difference:.1%} away from base + adapter")


def _recorded_base(adapter: Path) -> str:
    """The base that swift (args.json) or peft (adapter_config.json) noted with the adapter."""
    for name, key in (("args.json", "model"), ("adapter_config.json", "base_model_name_or_path")):
        found = read_json(adapter / name)
        if isinstance(found, dict) and found.get(key):
            return str(found[key])
    raise UserError(f"{adapter} does not say what it was trained on: type --model BASE")


def _noted_files(adapter: Path) -> list[Any] | None:
    """What the base's files were when the adapter's run began; None where nobody noted it."""
    for directory in (adapter.parent, adapter.parent.parent):
        config = read_json(directory / runs.CONFIG)
        if isinstance(config, dict) and config.get("base_files"):
            return config["base_files"]
    return None


def _find_again(base: Path, noted: list[Any]) -> Path:
    for other in sorted(base.parent.glob(f"{base.name}.*")):
        if files_of(other) == noted:
            return other
    raise UserError(
        f"{base} has changed since the adapter was trained on it, and no {base.name}.N is what it "
        "was: train again, or type --model BASE to merge into another model"
    )


def _shapes(directory: Path) -> Iterator[tuple[str, list[int]]]:
    for path in sorted(directory.glob("*.safetensors")):
        with open_regular(path) as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__" and isinstance(entry, dict):
                yield name, entry.get("shape", [])


def _differences(merge: Merge, merged: Path, count: int = 3) -> Iterator[tuple[str, float]]:
    """For a few trained matrices: their names, and how far they are from W + s·B·A (relative)."""
    import torch
    from safetensors import safe_open

    config = read_json(merge.adapter / "adapter_config.json") or {}
    if not is_local(merge.base) or config.get("use_rslora") or config.get("use_dora"):
        return
    scale = config.get("lora_alpha", 1) / config.get("r", 1)
    with safe_open(merge.adapter / "adapter_model.safetensors", "pt") as adapter:
        names = sorted(name for name in _names(adapter) if name.endswith("lora_A.weight"))
        for name in names[:: max(1, len(names) // count)][:count]:
            ending = name[name.find("layers.") :].replace("lora_A.weight", "weight")
            before, after = _tensor(Path(merge.base), ending), _tensor(merged, ending)
            if before is None or after is None or config.get("rank_pattern"):
                continue
            down = adapter.get_tensor(name).float()
            up = adapter.get_tensor(name.replace("lora_A", "lora_B")).float()
            expected = before.float() + scale * up @ down
            error = torch.linalg.norm(after.float() - expected) / torch.linalg.norm(expected)
            yield ending, float(error)


def _names(file: Any) -> list[str]:
    return list(file.keys())


def _tensor(directory: Path, ending: str) -> Any:
    """The one language-model tensor of a model whose name ends so; None when there is not one."""
    from safetensors import safe_open

    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in _names(file) if name.endswith(f".{ending}")]
            if len(names) == 1:
                return file.get_tensor(names[0])
    return None
