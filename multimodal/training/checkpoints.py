"""The files in outputs/checkpoints, readable by a plain `torch.load`; models out of them.

    best_model.pt             the lowest validation loss of the last stage reached
    final_model.pt            the end of training
    checkpoint_epoch_N.pt     everything a run needs to go on from there (--resume PATH)

Each holds `model_state_dict`, which fits into `create_model(**checkpoint["model"])`, as CPU tensors
and plain values. None is ever deleted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from multimodal.model import MultimodalModel, create_model
from multimodal.pairs import samples
from multimodal.pairs.samples import collate
from multimodal.training.losses import Learner
from multimodal.training.schedule import Span
from shared import checkpoint, distributed, seed, weights
from shared.checkpoint import Parts, Position
from shared.distributed import World
from shared.errors import UserError, one_line
from shared.images import Skipped
from shared.loader import make_eval_loader
from shared.precision import Amp

SCHEMA = 1
BEST, FINAL = "best_model.pt", "final_model.pt"


def epoch_file(epoch: int) -> str:
    """The name of the checkpoint after `epoch` epochs."""
    return f"checkpoint_epoch_{epoch}.pt"


class CheckpointFiles:
    """Writes them; rank 0 alone does. Every rank calls every method.

    about: what create_model needs (`model`), the order of the keywords (`keywords`), settings.
    """

    def __init__(self, directory: Path, learner: Learner, about: dict[str, Any], world: World):
        self._directory, self._learner = directory, learner
        self._about, self._world = about, world
        if world.is_main:
            directory.mkdir(parents=True, exist_ok=True)

    def write_weights(self, name: str, **values: Any) -> None:
        """Weights alone, with `values` (epoch, stage, val_loss …) beside them."""
        if self._world.is_main:
            self._write(name, self._weights(to_cpu(self._learner.state_dict())) | values)

    def write_state(self, name: str, parts: Parts, position: Position, **values: Any) -> None:
        """Weights, and the whole state of the run."""
        generators = distributed.gather_objects(seed.get_state(), self._world)
        if self._world.is_main:
            state = to_cpu(checkpoint.snapshot(parts, position, generators))
            self._write(name, state | self._weights(state["parts"]["learner"]) | values)

    def write_epoch(
        self,
        parts: Parts,
        position: Position,
        span: Span,
        val_loss: float,
        *,
        is_best: bool,
        every: int,
    ) -> None:
        """The files that are due when an epoch of the stage `span` is over."""
        about = {"epoch": position.epoch, "stage": span.name, "val_loss": val_loss}
        if is_best:
            self.write_weights(BEST, **about)
        if position.epoch % every == 0 or position.epoch == span.end:
            self.write_state(epoch_file(position.epoch), parts, position, **about)

    def _weights(self, learner: dict[str, Tensor]) -> dict[str, Any]:
        """The model's and the keyword head's part of a learner's state; no tensor is copied."""
        return {
            "schema": SCHEMA,
            **self._about,
            "model_state_dict": _below(learner, "model."),
            "keyword_head": _below(learner, "keyword_head."),
        }

    def _write(self, name: str, state: dict[str, Any]) -> None:
        path = self._directory / name
        with checkpoint.beside(path):
            checkpoint.save(path, state, keep=1)


def to_cpu(value: Any) -> Any:
    """`value` with the tensors inside its dictionaries, lists and tuples on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: to_cpu(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_cpu(item) for item in value)
    return value


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


# --- reading them ---------------------------------------------------------------------------------

log = logging.getLogger(__name__)

_EVERY_SECONDS = 10.0  # between lines of progress
_TEXTS = 256  # captions at once


@dataclass(frozen=True)
class Trained:
    """A model with what its checkpoint says of it, ready to be asked.

    keywords: what the outputs of keyword_head mean; both empty where none were learnt.
    """

    model: MultimodalModel
    path: Path
    settings: dict[str, Any]
    stage: str
    keywords: list[str]
    keyword_head: nn.Linear | None


def checkpoint_at(path: Path) -> Path:
    """The file that --checkpoint means: of an output directory the best model, else the final one.

    Raises UserError when there is none.
    """
    if path.is_file():
        return path
    names = ("best_model.pt", "final_model.pt")
    places = [folder / name for folder in (path, path / "checkpoints") for name in names]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(
            f"--checkpoint {path}: no such file, and no checkpoints/best_model.pt below it; train "
            "one by python run_training.py"
        )
    return found


def open_trained(path: Path, device: torch.device) -> Trained:
    """The model of a best_model.pt, final_model.pt or checkpoint_epoch_N.pt.

    Raises UserError for a file that is damaged, partial or of another program.
    """
    state = weights.read(path)  # names what is wrong with a file that is no checkpoint
    about = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(about.get("model"), dict) or "model_state_dict" not in about:
        raise UserError(f"{path} was not written by run_training.py: give one of its checkpoints")
    try:
        options = {n: value for n, value in about["model"].items() if n != "attention"}
        model = create_model(**options)  # first-edition files name a kernel
        head = _keyword_head(about.get("keyword_head") or {})
        settings, keywords = dict(about.get("settings") or {}), list(about.get("keywords") or [])
    except UserError:
        raise
    except Exception as error:  # what a damaged file says of the model fails in many ways
        raise UserError(
            f"{path} describes no model ({one_line(error)}): it is damaged, give another checkpoint"
        ) from None
    weights.load_strict(model, state, source=path)
    return Trained(
        model.to(device).eval(), path, settings, str(about.get("stage") or "unknown"), keywords,
        head.to(device).eval() if head else None,
    )  # fmt: skip


def _keyword_head(state: dict[str, Tensor]) -> nn.Linear | None:
    if not state:
        return None
    head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
    weights.load_strict(head, state)
    return head


@dataclass
class Features:
    """What a modality's files gave. rows: (N, D) unit norm. kept: which of the files they are.

    logits: (N, C) of the model for pictures, of the keyword head for sounds, where asked for.
    """

    rows: Tensor
    kept: list[int]
    logits: Tensor | None
    skipped: Skipped = field(default_factory=Skipped)


class Embedder:
    """Asks a model for features, batch after batch."""

    def __init__(
        self, trained: Trained, device: torch.device, amp: str, batch_size: int, workers: int
    ) -> None:
        self.trained, self._world = trained, World(device=device)
        self._amp = Amp(amp, self._world.device)
        self._batch_size, self._workers = batch_size, workers

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) of captions, on the CPU."""
        rows = []
        for start in range(0, len(texts), _TEXTS):
            ids, mask = samples.tokenise(texts[start : start + _TEXTS])
            used = int(mask.sum(1).max())  # the rest is padding
            device = self._world.device
            with self._amp.autocast():
                found = self.trained.model.encode_text(
                    ids[:, :used].to(device), mask[:, :used].to(device)
                )
            rows.append(found.float().cpu())
        return torch.cat(rows)

    def images(self, load: Callable[[int], Tensor], total: int, *, logits: bool) -> Features:
        """Features of pictures; load(i) gives (3, S, S) or raises ValueError."""

        def ask(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            if not logits:
                return self.trained.model.encode_image(batch["images"]), None
            found = self.trained.model(images=batch["images"])
            return found["image_features"], found["logits"]

        return self._all("images", load, total, ask)

    def sounds(self, load: Callable[[int], Tensor], total: int, *, logits: bool) -> Features:
        """Features of sounds; load(i) gives (T, 80) or raises ValueError."""
        head = self.trained.keyword_head if logits else None

        def ask(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            sounds = {name: batch[name] for name in ("audio", "audio_mask")}
            if head is None:
                return self.trained.model.encode_audio(**sounds), None
            found = self.trained.model(**sounds)
            return found["audio_features"], head(found["fused_features"])

        return self._all("audio", load, total, ask)

    @torch.no_grad()
    def _all(
        self,
        name: str,
        load: Callable[[int], Tensor],
        total: int,
        ask: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor | None]],
    ) -> Features:
        loader = make_eval_loader(
            _Loads(name, load, total), self._batch_size, self._world,
            workers=self._workers, collate=_collate,
        )  # fmt: skip
        found = Features(torch.empty(0), [], None, Skipped("files"))
        rows, logits = list[Tensor](), list[Tensor]()
        for kept, batch, problems in _with_progress(loader, name, total):
            for index, reason in problems:
                found.skipped.add(str(index), reason)
            if not kept:
                continue
            moved = {key: value.to(self._world.device) for key, value in batch.items()}
            with self._amp.autocast():
                features, scores = ask(moved)
            rows.append(features.float().cpu())
            if scores is not None:
                logits.append(scores.float().cpu())
            found.kept += kept
        if not rows:
            raise UserError(f"none of the {total} files can be read: see the log")
        found.skipped.refuse_above(0.5, total)
        found.rows, found.logits = torch.cat(rows), torch.cat(logits) if logits else None
        return found


class _Loads(Dataset[Any]):
    """(index, tensor) of every file, or (index, why not)."""

    def __init__(self, name: str, load: Callable[[int], Tensor], total: int) -> None:
        self._name, self._load, self._total = name, load, total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> tuple[int, dict[str, Tensor] | str]:
        try:
            return index, {self._name: self._load(index)}
        except ValueError as error:
            return index, str(error)


def _collate(
    items: list[tuple[int, dict[str, Tensor] | str]],
) -> tuple[list[int], dict[str, Tensor], list[tuple[int, str]]]:
    good = [(index, item) for index, item in items if not isinstance(item, str)]
    bad = [(index, item) for index, item in items if isinstance(item, str)]
    batch = collate([item for _, item in good]) if good else {}
    return [index for index, _ in good], batch, bad


def _with_progress(batches: Any, name: str, total: int) -> Iterator[Any]:
    """The batches; a line now and then says how far they are."""
    began = shown = time.monotonic()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[0]) + len(batch[2])
        if time.monotonic() - shown >= _EVERY_SECONDS:
            shown = time.monotonic()
            log.info("%s: %d of %d, %.4g a second", name, done, total, done / (shown - began))
