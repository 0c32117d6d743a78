"""The files in outputs/checkpoints: what the document names, readable by a plain `torch.load`.

    best_model.pt             the lowest validation loss of the last stage reached
    final_model.pt            the end of training
    checkpoint_epoch_N.pt     everything a run needs to go on from there (--resume PATH)

Each holds `model_state_dict`, which fits into `create_model(**checkpoint["model"])`, as CPU tensors
and plain values. None is ever deleted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from multimodal.learner import Learner
from shared import checkpoint, distributed, seed
from shared.checkpoint import Parts, Position
from shared.distributed import World

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
