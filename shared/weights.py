"""Weights from files, whole or not at all: .pth, .safetensors and sharded directories.

`read` gives plain tensors and runs no code of the file; `load_strict` fills every parameter of a
model or says which ones it could not.
"""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared import pickles
from shared.errors import UserError, did_you_mean
from shared.files import is_file

# In a directory the first of these that is there is read; an index names its shards.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_PARTIAL_SUFFIXES = (".part", ".incomplete", ".aria2", ".crdownload", ".tmp")
# Where training programs put the state dict when the file also holds an epoch or an optimizer.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "state_dict_backbone")
_NAMES_SHOWN = 3


def read(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors in `path` whose names start with `prefix`, under their names without it.

    path: a .pth, .pt or .bin file (read without running pickled code), a .safetensors file, or a
    directory with `model.safetensors.index.json` or `model.safetensors` (or their
    `pytorch_model.bin` forms). Of a sharded directory only the shards that hold wanted names are
    opened. Tensors lie on the CPU and are mapped, not read, where the format allows it.
    A state dict wrapped as {"state_dict": …, "epoch": …} is unwrapped.
    Raises UserError when the file is missing, partial, truncated, not a weight file, needs pickled
    code, or holds no name with `prefix`.
    """
    path = Path(path)
    state = _read_directory(path, prefix) if path.is_dir() else _read_file(path, prefix)
    if not state:
        wanted = f"tensor whose name starts with {prefix!r}" if prefix else "tensor"
        raise UserError(f"{path} holds no {wanted}: check that it is the right checkpoint")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def load_strict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    prefix: str = "",
    only: Collection[str] | None = None,
    source: str | Path = "the given state",
) -> None:
    """Fill `model` from the names in `state` that start with `prefix`; all of it or an error.

    only: the names (without prefix) that `state` must fill, when it is not the whole model.
    source: the file that `state` came from, for the error.
    A parameter on the meta device becomes the tensor of `state` itself, so loading a model built
    under `torch.device("meta")` needs no memory beyond `state`; the model's dtype is kept.
    Raises UserError with the missing, unexpected and misshapen names; the model is then untouched.
    Raises ValueError when something of the model stays on the meta device, because no file holds
    it (a non-persistent buffer): build that part outside the meta device.
    """
    own = model.state_dict()
    wanted = own if only is None else {name: own[name] for name in only}
    given = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
    problems = _differences(wanted, given)
    if problems:
        raise UserError(
            f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Give the checkpoint that was saved from this architecture and configuration"
        )
    on_meta = {name for name, tensor in wanted.items() if tensor.is_meta}
    assigned = {name: given[name].to(wanted[name].dtype) for name in on_meta}
    copied = {name: tensor for name, tensor in given.items() if name not in on_meta}
    model.load_state_dict(assigned, strict=False, assign=True)
    model.load_state_dict(copied, strict=False)
    if only is None:
        _refuse_meta_leftovers(model)


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the `module.` (DDP) and `_orig_mod.` (torch.compile) parts of its names."""
    stripped = {}
    for name, tensor in state.items():
        parts = name.split(".")
        while len(parts) > 1 and parts[0] in ("module", "_orig_mod"):
            parts = parts[1:]
        stripped[".".join(part for part in parts if part != "_orig_mod")] = tensor
    return stripped


def _differences(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What keeps `given` from filling `wanted`, one phrase for each kind of difference."""
    shapes = [
        f"{name} is {tuple(given[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    kinds = (
        ("missing", [name for name in wanted if name not in given]),
        ("unexpected", [name for name in given if name not in wanted]),
        ("of another shape", shapes),
    )
    return [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds if names]


def _first(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")


def _refuse_meta_leftovers(model: nn.Module) -> None:
    left = [name for name, tensor in model.named_buffers() if tensor.is_meta]
    left += [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if left:
        raise ValueError(
            f"{type(model).__name__} still has {len(left)} tensors without values, which no "
            f"checkpoint holds ({_first(left)}): build these outside the meta device"
        )


def _read_directory(directory: Path, prefix: str) -> dict[str, Tensor]:
    """The wanted tensors of a checkpoint directory, from as few of its files as possible."""
    for name in _INDEXES:
        if (directory / name).is_file():
            return _read_shards(directory / name, prefix)
    for name in _SINGLE_FILES:
        if (directory / name).is_file():
            return _read_file(directory / name, prefix)
    partial = [p.name for p in sorted(directory.rglob("*")) if p.suffix in _PARTIAL_SUFFIXES]
    if partial:
        raise UserError(
            f"{directory} holds a download that has not finished ({_first(partial)}): "
            "run the download again, it continues where it stopped"
        )
    raise UserError(
        f"{directory} holds no weights: expected one of {', '.join(_INDEXES + _SINGLE_FILES)}"
    )


def _read_shards(index: Path, prefix: str) -> dict[str, Tensor]:
    """The wanted tensors of the shards that `index` names."""
    shard_of = {
        name: shard for name, shard in _weight_map(index).items() if name.startswith(prefix)
    }
    shards = sorted(set(shard_of.values()))
    _refuse_missing_shards(index, shards)
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= _read_file(index.parent / shard, prefix)
    lacking = [name for name in shard_of if name not in state]
    if lacking:
        raise UserError(
            f"{index} promises {len(lacking)} tensors that its shards lack ({_first(lacking)}): "
            "index and shards come from different versions; download them again"
        )
    return state


def _refuse_missing_shards(index: Path, shards: list[str]) -> None:
    missing = [shard for shard in shards if not is_file(index.parent / shard)]
    if missing:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} shards that {index.name} "
            f"names ({_first(missing)}): run the download again, it continues where it stopped"
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Which shard of the directory holds each tensor, by the `weight_map` of the index file."""
    _refuse_impostors(index)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = dict(weight_map)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{index} is not a weight index (no readable weight_map): download it again"
        ) from error
    # A shard is a file beside its index: a path that leads elsewhere is not followed.
    foreign = [
        shard
        for shard in entries.values()
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.isprintable()
    ]
    if foreign:
        raise UserError(f"{index} names {foreign[0]!r} as a shard, which is not a plain file name")
    return entries


def _read_file(path: Path, prefix: str) -> dict[str, Tensor]:
    """The wanted tensors of one file, under their full names."""
    if not is_file(path):
        raise UserError(_why_missing(path))
    _refuse_impostors(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, prefix)
    state = _unwrap(_read_pickled(path), path)
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _why_missing(path: Path) -> str:
    """What to tell about a weight file that is not there."""
    for suffix in _PARTIAL_SUFFIXES:
        if is_file(path.with_name(path.name + suffix)):
            return (
                f"{path} has not been downloaded completely (only {path.name}{suffix} is there): "
                "run the download again, it continues where it stopped"
            )
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"{path} is missing: download it or give another path{did_you_mean(path.name, there)}"


def _refuse_impostors(path: Path) -> None:
    """Raise UserError when `path` is known by its name or first bytes to hold no weights."""
    if path.suffix in _PARTIAL_SUFFIXES:
        raise UserError(
            f"{path} is a download that has not finished: run the download again, "
            "then give the path without the suffix"
        )
    try:
        with path.open("rb") as stream:
            start = stream.read(256).lstrip()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check its permissions"
        ) from error
    if not start:
        raise UserError(f"{path} is empty: download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git-LFS pointer, not the weights: run `git lfs pull` in its repository, "
            "or download the file itself"
        )
    if start[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(
            f"{path} is a web page, not the weights (a login or error page was saved): "
            "download it again"
        )


def _read_safetensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """The wanted tensors of a .safetensors file, mapped from the disk."""
    from safetensors import SafetensorError, safe_open

    _refuse_truncated_safetensors(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from error


def _refuse_truncated_safetensors(path: Path) -> None:
    """Raise UserError with the sizes when the file ends before the tensors its header lists."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        header = stream.read(length) if length <= size else b""
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        needed = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a safetensors file, or is cut off in its header ({size:,} bytes): "
            "download it again"
        ) from error
    if size < needed:
        raise UserError(
            f"{path} is truncated: {size:,} of {needed:,} bytes are there; "
            "run the download again, it continues where it stopped"
        )


def _read_pickled(path: Path) -> Any:
    """What a .pth file holds, read by torch's weights-only unpickler."""
    with path.open("rb") as stream:
        starts_as_zip = stream.read(2) == b"PK"
    try:
        is_zip = zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        is_zip = False
    if starts_as_zip and not is_zip:  # a zip archive ends with its table of contents
        raise UserError(_cut_off(path))
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                pickles.check_archive(archive)
        else:
            with path.open("rb") as stream:
                pickles.check_stream(stream)
        # Only the zip format can be mapped; files of torch before 1.6 are read whole.
        with warnings.catch_warnings(), pickles.harmless():
            warnings.simplefilter("ignore")  # about a pickle that is refused in a moment
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise UserError(_why_refused(path, str(error))) from error
    except Exception as error:  # a damaged file fails in any of a dozen ways, none of them a bug
        raise UserError(_cut_off(path)) from error


def _cut_off(path: Path) -> str:
    return (
        f"{path} is truncated or damaged ({path.stat().st_size:,} bytes): "
        "compare its size with the source and download it again"
    )


def _why_refused(path: Path, message: str) -> str:
    """What to tell when the weights-only unpickler stops: the class it met, or damage."""
    _, found, rest = message.partition("Unsupported global: GLOBAL ")
    if not found:
        return f"{path} is not a weight file, or is damaged: download it again"
    return (
        f"{path} holds a pickled {rest.split(' ')[0]}, which could run code and is not loaded: "
        "save the plain state dict (model.state_dict()) in the environment that wrote the file"
    )


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in `content`, which may stand beside an epoch or an optimizer's state."""
    if _is_state(content):
        return dict(content)
    wrapped = [content[k] for k in _WRAPPERS if isinstance(content, dict) and k in content]
    for candidate in wrapped:
        if _is_state(candidate):
            return dict(candidate)
    keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else "no names"
    raise UserError(
        f"{path} holds no state dict (found {type(content).__name__}: {keys}): "
        f"expected names with tensors, at the top or under one of {', '.join(_WRAPPERS)}"
    )


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )
