"""Checkpoints that are whole or not there, and the decision which one a run continues from.

A checkpoint holds plain types only, so torch's default (safe) loading reads it.
"""

from __future__ import annotations

import logging
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shared import pickles
from shared.config import differing
from shared.errors import UserError, one_line
from shared.files import read_object, write_atomic

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
    """A part of which every rank holds its own piece (sharded class centres)."""

    def collect(self) -> None:
        """Bring the pieces to rank 0."""
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


@dataclass(frozen=True)
class Decision:
    """How a run begins: from `checkpoint` or afresh, `why`, and whether an older run makes room."""

    checkpoint: Path | None = None
    why: str = ""
    move_aside: bool = False
    is_named: bool = False  # the user named this file: no other will do


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


def load(path: Path) -> dict[str, Any]:
    """The state in `path`, on the CPU. Every byte is checked (the archive's CRCs).

    Raises DamagedError for a torn or foreign file, UserError for one that would run code.
    """
    try:
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
    for candidate in (previous(path, number) for number in [0, *sorted(_numbers(path))]):
        try:
            return candidate, load(candidate)
        except DamagedError as error:
            log.warning("checkpoint passed over: %s", error)
    return None


def decide(
    run_dir: Path, last: str, resume: str, identity: dict[str, Any], restarted: bool
) -> Decision:
    """Whether a run in `run_dir` continues, and from which checkpoint (the contract of --resume).

    identity: the settings that must be the same for an automatic continuation.
    restarted: the launcher started this process again after a crash; then always continue.
    """
    if restarted and (run_dir / last).exists():
        return Decision(run_dir / last)
    if resume not in ("auto", "latest", "never"):
        path = Path(resume)
        return Decision(path / last if path.is_dir() else path, is_named=path.is_file())
    if restarted:
        return Decision()
    status = read_object(run_dir / "status.json")
    if not _worth_keeping(run_dir, last, status):
        return Decision()
    if resume == "never":
        return Decision(None, "--resume never", move_aside=True)
    if not (run_dir / last).exists() and not _numbers(run_dir / last):
        return Decision(None, "no checkpoint there to continue from", move_aside=True)
    if status.get("state") == "done":
        return Decision(None, "the run there is finished", move_aside=True)
    stored = read_object(run_dir / "config.json").get("identity")
    changed = differing(stored if isinstance(stored, dict) else {}, identity)
    if changed:
        return Decision(
            None, f"the run there had other settings ({'; '.join(changed)})", move_aside=True
        )
    return Decision(run_dir / last)


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


def of_a_run(path: Path, state: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Both as they are. Raises UserError for weights alone, from which no run can continue."""
    if not {"position", "world_size", "parts", "generators"} <= state.keys():
        raise UserError(
            f"{path} holds weights and no state of a run (optimizer, position): give a checkpoint "
            "that was saved while training, or --resume auto"
        )
    return path, state


def check_world_size(path: Path, before: int, now: int, *, allowed: bool) -> None:
    """Raise UserError when another number of processes wrote the checkpoint, unless `allowed`."""
    if before == now:
        return
    if not allowed:
        raise UserError(
            f"{path} was written by {before} process(es), this run has {now}; use --nproc "
            f"{before}, or --allow-reshard to continue with another order of samples"
        )
    log.warning("%d → %d processes: not the same run to the bit from here", before, now)


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


def _worth_keeping(run_dir: Path, last: str, status: dict[str, Any]) -> bool:
    """Whether the directory holds anything besides the traces of a run that never took a step."""
    traces = {"run.lock", "status.json", "config.json", "metrics.jsonl", "tensorboard"}
    traces.add("report.html")
    others = [entry for entry in run_dir.iterdir() if entry.name not in traces]
    return bool(others) or bool(status.get("step"))


def _numbers(path: Path) -> list[int]:
    pattern = f"{path.stem}.*{path.suffix}"
    names = [
        found.name[len(path.stem) + 1 : -len(path.suffix)] for found in path.parent.glob(pattern)
    ]
    return [int(name) for name in names if name.isdigit()]
