"""What a training leaves for people: training_results.json and the picture of its course."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared import checkpoint
from shared.distributed import World
from shared.errors import one_line
from shared.files import write_atomic, write_json
from shared.images import Skipped
from vasevqa.filter.quality_data import Splits
from vasevqa.filter.quality_measure import Measured
from vasevqa.filter.quality_net import CLASSES

if TYPE_CHECKING:
    from vasevqa.filter.model import Config

log = logging.getLogger(__name__)


class History:
    """The course of a training, a value an epoch; belongs into checkpoints."""

    def __init__(self) -> None:
        self.before = 0.0  # accuracy on the test split before the first step
        self.columns: dict[str, list[float]] = {
            name: [] for name in ("train_loss", "val_loss", "val_acc", "lr")
        }

    def add(self, train_loss: float, measured: Measured, lr: float) -> None:
        """One epoch more."""
        values = (train_loss, measured.loss, measured.accuracy, lr)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def state_dict(self) -> dict[str, Any]:
        """The columns."""
        return {"before": self.before, "columns": {k: list(v) for k, v in self.columns.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.before = state["before"]
        self.columns = {name: list(values) for name, values in state["columns"].items()}


def conclude(
    cfg: Config, world: World, history: History, tested: Measured, data: tuple[Splits, Skipped, str]
) -> dict[str, Any]:
    """Write the results; what run.finish is to say of them."""
    accuracies = history.columns["val_acc"]
    best_epoch = accuracies.index(max(accuracies)) + 1
    outputs: list[Path] = []
    if world.is_main:
        outputs += draw(cfg.output_dir, history, tested)
        results = _results(history, tested, data) | {"best_epoch": best_epoch}
        path = cfg.output_dir / "training_results.json"
        with checkpoint.beside(path):
            write_json(path, results)
        outputs = [file for file in (cfg.best, *outputs, path) if file.exists()]
        _say(tested)
    return {
        "result": {
            "name": "accuracy on held-out pictures",
            "before": history.before,
            "after": tested.accuracy,
            "higher_is_better": True,
            "majority": tested.majority,
            "n": tested.count,
        },
        "outputs": [str(path) for path in outputs],
        "reason": f"{len(accuracies)} epochs, the best was {best_epoch}: accuracy "
        f"{max(accuracies):.4f} in validation, {tested.accuracy:.4f} on {tested.count} held-out "
        "pictures",
    }


def _results(
    history: History, tested: Measured, data: tuple[Splits, Skipped, str]
) -> dict[str, Any]:
    splits, skipped, started_from = data
    return {
        "test_acc": tested.accuracy,
        "test_acc_before_training": history.before,
        "best_val_acc": max(history.columns["val_acc"]),
        "confusion_matrix": tested.confusion,
        "classification_report": dict(zip(CLASSES, tested.report(), strict=True)),
        "class_weights": splits.class_weights.tolist(),
        "pictures": {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test)},
        "left_out": skipped.names,
        "started_from": started_from,
        "history": {name: _finite(values) for name, values in history.columns.items()},
    }


def _finite(values: list[float]) -> list[float | None]:
    """None for NaN and infinity, which JSON does not have."""
    return [value if math.isfinite(value) else None for value in values]


def _say(tested: Measured) -> None:
    log.info("held-out pictures, rows: what they are, columns: what the model says")
    log.info("%8s %8s %8s %10s %8s", "", *CLASSES, "precision", "recall")
    for name, counts, row in zip(CLASSES, tested.confusion, tested.report(), strict=True):
        log.info("%8s %8d %8d %10.4f %8.4f", name, *counts, row["precision"], row["recall"])


def draw(folder: Path, history: History, tested: Measured) -> list[Path]:
    """Draw training_history.png: its path, or nothing and a warning when that fails."""
    path = folder / "training_history.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _draw(path, history, tested)
    except Exception as error:  # a picture is not worth a run
        log.warning("%s cannot be drawn: %s", path, one_line(error))
        return []
    return [path]


def _draw(path: Path, history: History, tested: Measured) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, accuracy, matrix = figure.subplots(1, 3)
    epochs = range(1, len(history.columns["val_acc"]) + 1)
    losses.plot(epochs, history.columns["train_loss"], label="training")
    losses.plot(epochs, history.columns["val_loss"], label="validation")
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    accuracy.plot(epochs, history.columns["val_acc"], color="C2")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy")
    matrix.imshow(tested.confusion, cmap="Blues")
    matrix.set(xticks=(0, 1), yticks=(0, 1), xlabel="predicted", ylabel="true",
               xticklabels=CLASSES, yticklabels=CLASSES, title="held-out pictures")  # fmt: skip
    for row, counts in enumerate(tested.confusion):
        for column, count in enumerate(counts):
            matrix.text(column, row, str(count), ha="center", va="center")
    write_atomic(path, lambda stream: figure.savefig(stream, format="png", dpi=110))
