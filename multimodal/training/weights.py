"""Weights in and out: a start from an open_clip file, and the files in outputs/checkpoints.

    best_model.pt             the lowest validation loss (val/relative) of the last stage reached
    best_retrieval.pt         the highest mean R@1 of the held-out pairs, stages 2 and 3
    final_model.pt            the end of training
    checkpoint_epoch_N.pt     everything a run needs to continue from there (--resume PATH)

A plain `torch.load` reads each. They hold `model_state_dict`, which fits into
`create_model(**checkpoint["model"])`, as CPU tensors and plain values. None is ever deleted.

Of an open_clip file the word table goes row by row, since the vocabulary is the same; for a
narrower table its best approximation of that width is taken (truncated SVD). A tower is taken when
its width, depth and patch are the model's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.model import MultimodalModel
from multimodal.training.losses import Learner
from multimodal.training.schedule import Span
from shared import checkpoint, distributed, seed, weights
from shared.checkpoint import Parts, Position
from shared.distributed import World
from shared.errors import UserError

SCHEMA = 1
BEST, RETRIEVAL, FINAL = "best_model.pt", "best_retrieval.pt", "final_model.pt"


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
        best: Sequence[str],
        every: int,
    ) -> None:
        """The files that are due when an epoch of the stage `span` is over, and those of `best`."""
        about = {"epoch": position.epoch, "stage": span.name, "val_loss": val_loss}
        for name in best:
            self.write_weights(name, **about)
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


# --- a start from open_clip's weights -------------------------------------------------------------

log = logging.getLogger(__name__)

LEAST_SHARE = 0.9  # of a tower's values that a file must fill
_WORDS = "token_embedding.weight"


def load(model: MultimodalModel, path: Path | None, *, towers: bool = False) -> dict[str, Any]:
    """Fill the word table from the file, and with `towers` the towers that fit; what was filled.

    Without a file all stays random. Raises UserError for a file without open_clip's word table, and
    for a tower that fits in shape and of which less than 90 % is there.
    """
    if path is None:
        log.info("starting from random word embeddings, as asked")
        return {"file": None, "words": "random"}
    state = weights.strip_wrappers(weights.read(path))
    report: dict[str, Any] = {"file": str(path), "words": _load_words(model, state, path)}
    if towers:
        text = {n: t for n, t in state.items() if not n.startswith(("visual.", "logit_"))}
        text.pop(_WORDS)
        image = {n[7:]: t for n, t in state.items() if n.startswith("visual.")}
        report["image"] = _load_tower("image", model.image, image, path)
        report["text"] = _load_tower("text", model.text, text, path)
    found = "; ".join(f"{name} {_phrase(said)}" for name, said in report.items() if name != "file")
    log.info("starting from %s: %s", path, found)
    return report


def _phrase(found: Any) -> str:
    return found if isinstance(found, str) else f"{found['share']:.0%} of the tower"


def _load_words(model: MultimodalModel, state: dict[str, Tensor], path: Path) -> str:
    """Fill the word table; how, in words."""
    own = model.text.token_embedding.weight
    given = state.get(_WORDS)
    if given is None or given.ndim != 2 or len(given) != len(own):
        shape = "is missing" if given is None else f"is {tuple(given.shape)}"
        raise UserError(
            f"{path}: {_WORDS} {shape}, expected ({len(own)}, width): give a checkpoint of an "
            "open_clip model with its own tokenizer (ViT-S-16, ViT-B-16 …)"
        )
    given = given.float()
    if given.shape[1] == own.shape[1]:
        _copy(own, given)
        return "copied"
    if given.shape[1] < own.shape[1]:
        raise UserError(
            f"{path}: {_WORDS} is {given.shape[1]} wide, the model's is {own.shape[1]}: give a "
            "larger checkpoint, choose a smaller --model-size, or type --init random"
        )
    reduced, directions, kept = truncated(given, own.shape[1])
    _copy(own, reduced)
    widen = model.text.widen
    if isinstance(widen, nn.Linear) and widen.out_features == given.shape[1]:
        _copy(widen.weight, directions)  # back into the file's own coordinates
    return f"reduced from {given.shape[1]} to {own.shape[1]} dimensions, {kept:.0%} of the variance"


def truncated(table: Tensor, width: int) -> tuple[Tensor, Tensor, float]:
    """The rows (V, D) in their `width` best directions (V, width); these (D, width); what is kept.

    The last is the share of the squares. `reduced @ directions.T` is the nearest table of that rank
    (Eckart and Young 1936).
    """
    # of D × D, not V × D: the directions are the same
    values, vectors = torch.linalg.eigh(table.double().T @ table.double())
    best = vectors[:, -width:].flip(1)
    kept = float(values[-width:].sum() / values.sum())
    return (table.double() @ best).to(table.dtype), best.to(table.dtype), kept


def _load_tower(name: str, tower: nn.Module, given: dict[str, Tensor], path: Path) -> Any:
    """Fill a tower, or say why it does not fit."""
    own = {n: t for n, t in tower.state_dict().items() if not n.startswith("token_embedding")}
    body = {n: t for n, t in own.items() if n.startswith(("transformer.", "conv1."))}
    deep = {n for n in given if n.startswith("transformer.")}
    if not deep:
        return "absent"
    extra = sorted(deep - body.keys())
    wrong = [n for n, t in body.items() if n in given and given[n].shape != t.shape]
    if extra or wrong:
        return f"not of this size ({wrong[0] if wrong else extra[0]})"
    fitting = {n: t for n, t in given.items() if n in own and own[n].shape == t.shape}
    total = sum(t.numel() for t in own.values())
    share = sum(own[n].numel() for n in fitting) / total
    missing = sorted(own.keys() - fitting.keys())
    if share < LEAST_SHARE:
        raise UserError(
            f"{path}: only {share:.0%} of the {name} tower is in the file (missing: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); at least "
            f"{LEAST_SHARE:.0%} is needed: the file is cut or of another model"
        )
    tower.load_state_dict({n: t.to(own[n].dtype) for n, t in fitting.items()}, strict=False)
    unexpected = sorted(given.keys() - own.keys())
    return {"share": share, "loaded": len(fitting), "missing": missing, "unexpected": unexpected}


@torch.no_grad()
def _copy(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)
