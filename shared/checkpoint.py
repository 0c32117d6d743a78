"""Checkpoints: files that are whole or not there, and the parts of a run that they hold.

A checkpoint holds plain types only, so torch's default (safe) loading reads it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shared import pickles
from shared.errors import UserError, one_line
from shared.files import check_regular, write_atomic

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """What a checkpoint can hold: models, optimizers, schedulers, Amp, EarlyStopping, Mean …"""

    def state_dict(self) -> dict[str, Any]:
        """The state as plain types and tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Put back what `state_dict` gave."""
        ...


@runtime_checkable
class Spread(Protocol):
    """A part of which every rank holds its own piece: sums, sharded class centres."""

    def collect(self) -> None:
        """Bring to rank 0, whose state is saved for all, what belongs into it; a collective."""
        ...


Parts = dict[str, Stateful]
_BYTES_A_RANK = 20_000  # generator states and the archive's frame, beside the tensors


@dataclass
class Position:
    """Where training is: optimizer steps done, the epoch (from 0), and its batches done."""

    step: int = 0
    epoch: int = 0
    batch: int = 0

    def advance(self) -> None:
        """One optimizer step more."""
        self.step += 1
        self.batch += 1

    def next_epoch(self) -> None:
        """The epoch is over, its validation and decisions too."""
        self.epoch += 1
        self.batch = 0


class DamagedError(Exception):
    """A checkpoint file that cannot be read whole."""


def save(path: Path, state: dict[str, Any], keep: int = 2) -> None:
    """Put `state` at `path` in one step; the `keep - 1` checkpoints before it stay as path.1, …

    A kill at any moment leaves a whole checkpoint at `path`. Raises OSError when the disk is full;
    what was at `path` is then still there.
    """
    write_atomic(
        path,
        lambda stream: _serialise(state, stream),
        before_replacing=lambda: _rotate(path, keep),
    )


@contextlib.contextmanager
def beside(what: Path) -> Iterator[None]:
    """For a file that a run writes beside its checkpoint: a disk that refuses it costs a warning.

    with beside(path): save(path, state, keep=1)
    """
    try:
        yield
    except OSError as error:
        log.warning("%s was not written: %s; training continues", what, one_line(error))


def _serialise(state: dict[str, Any], stream: IO[bytes]) -> None:
    """torch.save, with the disk's own error in place of torch's consequence of it."""
    try:
        torch.save(state, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _rotate(path: Path, keep: int) -> None:
    """Move each checkpoint one back; the newest gets a second name: `path` never is missing."""
    if keep < 2 or not path.exists():
        return
    for number in range(keep - 1, 1, -1):
        if previous(path, number - 1).exists():
            previous(path, number - 1).replace(previous(path, number))
    previous(path, 1).unlink(missing_ok=True)
    try:
        previous(path, 1).hardlink_to(path)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, previous(path, 1))


def previous(path: Path, number: int) -> Path:
    """The name of the checkpoint `number` saves before the one at `path`: last.pt → last.1.pt."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}") if number else path


def older(path: Path) -> list[int]:
    """The numbers of the checkpoints that stand before the one at `path`, newest first."""
    names = [found.name for found in path.parent.glob(f"{path.stem}.*{path.suffix}")]
    numbers = [name[len(path.stem) + 1 : -len(path.suffix)] for name in names]
    return sorted(int(number) for number in numbers if number.isdigit())


def load(path: Path) -> dict[str, Any]:
    """The state in `path`, on the CPU. Every byte is checked (the archive's CRCs).

    Raises DamagedError for a torn or foreign file, UserError for one that would run code.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
            if torn:
                raise DamagedError(f"{path}: {torn} is damaged")
            pickles.check_archive(archive)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise DamagedError(f"{path}: {one_line(error) or 'not a checkpoint'}") from None
    except Exception as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise UserError(
                f"{path} holds more than tensors and plain values and was not opened: loading it "
                "could run code; use a checkpoint written by this toolkit"
            ) from None
        raise DamagedError(f"{path}: {one_line(error)}") from None
    if not isinstance(state, dict):
        raise DamagedError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    return state


def find(path: Path, *, explicit: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint at `path` or, unless it was named explicitly, the newest whole one before it.

    Damaged ones are named in the log. Raises UserError for an explicit one that cannot be read.
    """
    if explicit:
        try:
            return path, load(path)
        except DamagedError as error:
            raise UserError(
                f"{error}; give another checkpoint, or --resume auto for the newest whole one"
            ) from None
    for candidate in (previous(path, number) for number in [0, *older(path)]):
        try:
            return candidate, load(candidate)
        except DamagedError as error:
            log.warning("checkpoint passed over: %s", error)
    return None


def collect(parts: Parts) -> None:
    """Let the parts that lie on several ranks come together on rank 0; every rank calls it.

    Such a part has a method `collect`, which its `state_dict` counts on.
    """
    for part in parts.values():
        if isinstance(part, Spread):
            part.collect()


def snapshot(parts: Parts, position: Position, generators: list[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint holds. generators: the random states of every rank."""
    return {
        "position": asdict(position),
        "world_size": len(generators),
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "generators": generators,
    }


def load_parts(parts: Parts, states: dict[str, Any], path: Path) -> None:
    """Put each state into its part. Raises UserError listing keys and shapes that do not fit."""
    missing = sorted(parts.keys() - (states.keys() if isinstance(states, dict) else set()))
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it was written by another kind of run")
    for name, part in parts.items():
        try:
            if isinstance(part, nn.Module):
                _check_shapes(name, part, states[name], path)
            part.load_state_dict(states[name])
        except (ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: {name} does not fit: {one_line(error)}") from None


def size_of(value: Any) -> int:
    """Bytes of the tensors inside nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(size_of(item) for item in value.values())
    return sum(size_of(item) for item in value) if isinstance(value, (list, tuple)) else 0


def expected_size(parts: Parts, world_size: int) -> int:
    """Bytes that a checkpoint of `parts` will take once the optimizers have their moments.

    An optimizer without state yet is counted with two tensors a parameter, as Adam keeps.
    """
    size = size_of({name: part.state_dict() for name, part in parts.items()})
    size += _BYTES_A_RANK * world_size
    for part in parts.values():
        if isinstance(part, torch.optim.Optimizer) and not part.state:
            size += 2 * size_of([group["params"] for group in part.param_groups])
    return size


def check_space(directory: Path, checkpoint_bytes: int, keep: int) -> None:
    """Raise UserError when `keep` checkpoints and one being written will not fit on the disk.

    Checkpoints that are there already make room for those that follow them.
    """
    there = sum(path.stat().st_size for path in directory.glob("last*.pt*"))
    needed = max(checkpoint_bytes, checkpoint_bytes * (keep + 1) - there)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for {keep} "
            f"checkpoints of {checkpoint_bytes / 1e9:.2f} GB and one being written; free some "
            "space, lower --keep, or choose another --run-dir"
        )


def _check_shapes(name: str, module: nn.Module, state: dict[str, Any], path: Path) -> None:
    own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    stored = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    wrong = [
        f"{key}: {stored.get(key, 'absent')} → {own.get(key, 'absent')}"
        for key in sorted(own.keys() | stored.keys())
        if own.get(key) != stored.get(key)
    ]
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(f"{path}: {name} does not fit this model: {shown}")
