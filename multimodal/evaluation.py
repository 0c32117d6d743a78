"""What a trained model knows of held-out pictures and sounds, data set by data set."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from multimodal import scores
from multimodal.datasets import AudioCaps, Clotho, Coco, VoxCeleb
from multimodal.scores import Direction
from multimodal.trained import Embedder, Features

log = logging.getLogger(__name__)

SCHEMA = 1
Split = Literal["train", "val", "test"]


@dataclass
class Result:
    """Figures of a data set: retrieval both ways, mAP of its labels, what was evaluated."""

    data_set: str
    split: str
    directions: list[Direction] = field(default_factory=list)
    labels: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the retrieval table, metrics in percent."""
        return [
            {
                **{"data set": self.data_set, "split": self.split, "direction": way.name},
                **{name: round(100 * value, 2) for name, value in way.metrics.items()},
                **{"queries": way.queries, "gallery": way.gallery},
            }
            for way in self.directions
        ]

    @property
    def metrics(self) -> dict[str, float]:
        """Every figure in [0, 1] by a name like `coco/image_to_text/R@1`."""
        found = {
            f"{self.data_set}/{way.name.replace(' ', '_')}/{name}": value
            for way in self.directions
            for name, value in way.metrics.items()
        }
        return found | {f"{self.data_set}/{name}": value for name, value in self.labels.items()}


def evaluate(
    names: tuple[str, ...], data_root: Path, split: Split, embed: Embedder, limit: int | None
) -> list[Result]:
    """The results of the named data sets. Raises UserError for one that is not there."""
    return [_WAYS[name](data_root / name, split, embed, limit) for name in names]


def _coco(root: Path, split: Split, embed: Embedder, limit: int | None) -> Result:
    size = embed.trained.model.image_size
    data = Coco(root, split, image_size=size, train=False, limit=limit)
    log.info("%s", data.counts.text())
    found = embed.images(data.image, len(data), logits=bool(data.label_names))
    result = _captioned(Result("coco", data.counts.split), data, found, embed, "image")
    if found.logits is not None:
        labels = torch.stack([data.labels(index) for index in found.kept])
        _add_labels(result, "categories", found.logits, labels)
    return result


def _sounds(name: str, data: Clotho | AudioCaps, embed: Embedder) -> Result:
    log.info("%s", data.counts.text())
    has_labels = isinstance(data, Clotho) and list(data.label_names) == embed.trained.keywords
    found = embed.sounds(data.sound, len(data), logits=has_labels)
    result = _captioned(Result(name, data.counts.split), data, found, embed, "audio")
    if found.logits is not None and isinstance(data, Clotho):
        labels = torch.stack([data.labels(index) for index in found.kept])
        _add_labels(result, "keywords", found.logits, labels)
    return result


def _clotho(root: Path, split: Split, embed: Embedder, limit: int | None) -> Result:
    return _sounds("clotho", Clotho(root, split, train=False, limit=limit), embed)


def _audiocaps(root: Path, split: Split, embed: Embedder, limit: int | None) -> Result:
    return _sounds("audiocaps", AudioCaps(root, split, train=False, limit=limit), embed)


def _voxceleb(root: Path, split: Split, embed: Embedder, limit: int | None) -> Result:
    """Faces find voices of the same person and back; without faces there is nothing to find."""
    size = embed.trained.model.image_size
    data = VoxCeleb(root, split, image_size=size, train=False, limit=limit)
    log.info("%s", data.counts.text())
    result = Result("voxceleb", data.counts.split)
    if not data.has_faces:
        log.warning("voxceleb: no frames of faces there; voices alone have no pairs to evaluate")
        return result
    voices = embed.sounds(data.sound, len(data), logits=False)
    faces = embed.images(data.image, len(data), logits=False)
    both = sorted(set(voices.kept) & set(faces.kept))
    rows, others = (_rows_of(found, both) for found in (faces, voices))
    groups = [data.group_of(index) for index in both]
    result.directions = scores.same_group(("face", "voice"), rows, others, groups)
    result.counts = {"utterances": len(both), "speakers": len(set(groups))}
    return result


_WAYS = {"coco": _coco, "clotho": _clotho, "audiocaps": _audiocaps, "voxceleb": _voxceleb}


def _captioned(
    result: Result, data: Coco | Clotho | AudioCaps, found: Features, embed: Embedder, kind: str
) -> Result:
    """Fill in the retrieval of items and their captions, both ways."""
    captions = [(place, text) for place, i in enumerate(found.kept) for text in data.captions(i)]
    texts = embed.texts([text for _, text in captions])
    owners = [place for place, _ in captions]
    result.directions = scores.both_ways((kind, "text"), found.rows, texts, owners)
    result.counts = {
        "items": len(found.kept),
        "captions": len(captions),
        "listed": data.counts.expected,
        "skipped": data.counts.skipped | found.skipped.reasons,
    }
    return result


def _add_labels(result: Result, name: str, logits: Tensor, labels: Tensor) -> None:
    value, occurring = scores.mean_average_precision(logits, labels)
    result.labels[f"mAP of {name}"] = value
    result.counts[name] = occurring


def _rows_of(found: Features, indices: list[int]) -> Tensor:
    place = {index: row for row, index in enumerate(found.kept)}
    return found.rows[[place[index] for index in indices]]


def record(results: list[Result], checkpoint: Path, data: Path) -> dict[str, Any]:
    """Plain values for evaluation.json; metrics in [0, 1]."""
    return {
        "schema": SCHEMA,
        "metrics": {name: value for result in results for name, value in result.metrics.items()},
        "counts": {result.data_set: {"split": result.split} | result.counts for result in results},
        "retrieval": [row for result in results for row in result.rows],
        "checkpoint": str(checkpoint),
        "data": str(data),
    }


def text_table(results: list[Result]) -> str:
    """All figures in percent, aligned."""
    rows = [row for result in results for row in result.rows]
    lines = []
    if rows:
        columns = list(rows[0])
        cells = [columns, *([str(row[name]) for name in columns] for row in rows)]
        widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    for result in results:
        lines += [f"{result.data_set}: {n} {100 * v:.2f}" for n, v in result.labels.items()]
    return "\n".join(line.rstrip() for line in lines)
