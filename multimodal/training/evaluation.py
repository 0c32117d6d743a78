"""A trained model out of outputs/checkpoints, its features of many files, and figures of these."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from multimodal.datasets import AnyDataSet, AudioCaps, Clotho, Coco, VoxCeleb
from multimodal.model import MultimodalModel, create_model
from multimodal.pairs import samples
from multimodal.pairs.samples import collate
from shared import retrieval, stop, weights
from shared.amp import Amp
from shared.distributed import World
from shared.errors import UserError, one_line
from shared.images import Skipped
from shared.loader import make_eval_loader
from shared.retrieval import Positives

log = logging.getLogger(__name__)

_EVERY_SECONDS = 10.0  # between lines of progress
_TEXTS = 256  # captions at once

Kind = Literal["images", "audio"]


@dataclass(frozen=True)
class Trained:
    """A model with what its checkpoint says of it, ready to be asked.

    keywords: what the outputs of keyword_head mean; both empty where none were learnt.
    """

    model: MultimodalModel
    path: Path
    settings: dict[str, Any]
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
        model.to(device).eval(), path, settings, keywords,
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

    @torch.no_grad()
    def files(
        self, kind: Kind, load: Callable[[int], Tensor], names: Sequence[object], *, logits: bool
    ) -> Features:
        """Features of pictures or sounds by their names.

        load(i): (3, S, S) or (T, 80); raises ValueError for a file that is then left out.
        """
        total = len(names)
        loader = make_eval_loader(
            _Loads(kind, load, total), self._batch_size, self._world,
            workers=self._workers, collate=_collate,
        )  # fmt: skip
        found = Features(torch.empty(0), [], None, Skipped("files"))
        rows, scores = list[Tensor](), list[Tensor]()
        for kept, batch, problems in _with_progress(loader, kind, total):
            stop.check()  # in a training; a script of its own has ended by itself
            for index, reason in problems:
                found.skipped.add(str(names[index]), reason)
            if not kept:
                continue
            moved = {key: value.to(self._world.device) for key, value in batch.items()}
            with self._amp.autocast():
                features, scored = self._ask(kind, moved, with_logits=logits)
            rows.append(features.float().cpu())
            if scored is not None:
                scores.append(scored.float().cpu())
            found.kept += kept
        if not rows:
            raise UserError(f"none of the {total} files can be read: see the log")
        found.skipped.refuse_above(0.5, total)
        found.rows, found.logits = torch.cat(rows), torch.cat(scores) if scores else None
        return found

    def _ask(
        self, kind: Kind, batch: dict[str, Tensor], *, with_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        model, head = self.trained.model, self.trained.keyword_head
        if kind == "images":
            if not with_logits:
                return model.encode_image(**batch), None
            found = model(**batch)
            return found["image_features"], found["logits"]
        if head is None or not with_logits:
            return model.encode_audio(**batch), None
        found = model(**batch)
        return found["audio_features"], head(found["fused_features"])


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


# --- retrieval both ways, and mAP -----------------------------------------------------------------

RECALL_AT = (1, 5, 10)
MAP_AT = (10,)


@dataclass(frozen=True)
class Direction:
    """One way of a retrieval. metrics: R@1, R@5, R@10, mAP@10 in [0, 1], and R@1 by chance."""

    name: str
    metrics: dict[str, float]
    queries: int
    gallery: int


def both_ways(
    names: tuple[str, str], items: Tensor, captions: Tensor, owners: Sequence[int]
) -> list[Direction]:
    """Items find their captions, and captions their item.

    items: (N, D), captions: (M, D), rows of unit norm. owners: (M,) the item of each caption.
    R@k counts a query as found when at least one of what belongs to it is among its k nearest, as
    clip_benchmark does. mAP@k divides by all that belong to it.
    """
    item, caption = names
    of_items = [list[int]() for _ in range(len(items))]
    for place, owner in enumerate(owners):
        of_items[owner].append(place)
    there = _search(items, captions, Positives.listed(of_items, len(captions)))
    back = _search(captions, items, Positives.listed([[o] for o in owners], len(items)))
    share = len(captions) / len(items) / len(captions)
    return [
        Direction(f"{item} to {caption}", there | {"chance": share}, len(items), len(captions)),
        Direction(f"{caption} to {item}", back | {"chance": 1 / len(items)}, len(captions),
                  len(items)),
    ]  # fmt: skip


def same_group(
    names: tuple[str, str], rows: Tensor, others: Tensor, groups: Sequence[str]
) -> list[Direction]:
    """Rows find others of their group and back: (N, D) each, row i of both belongs to groups[i]."""
    positives = Positives.same_id(groups, groups)
    chance = float(positives.counts().double().mean()) / len(rows)
    return [
        Direction(f"{one} to {other}", _search(a, b, positives) | {"chance": chance},
                  len(a), len(b))
        for (one, a), (other, b) in (
            ((names[0], rows), (names[1], others)),
            ((names[1], others), (names[0], rows)),
        )
    ]  # fmt: skip


def _search(
    queries: Tensor, gallery: Tensor, positives: Positives, exclude: Tensor | None = None
) -> dict[str, float]:
    found = retrieval.evaluate(
        queries, gallery, positives, World(), exclude=exclude, recall_at=RECALL_AT, map_at=MAP_AT
    ).metrics
    wanted = {f"Recall@{k}": f"R@{k}" for k in RECALL_AT} | {f"mAP@{k}": f"mAP@{k}" for k in MAP_AT}
    return {short: found[name] for name, short in wanted.items()}


def same_voice(rows: Tensor, speakers: Sequence[str]) -> Direction:
    """Sounds find others of the same speaker, themselves left out; rows: (N, D) of unit norm."""
    positives = Positives.same_id(speakers, speakers)
    chance = (float(positives.counts().double().mean()) - 1) / (len(rows) - 1)
    own = torch.arange(len(rows))
    found = _search(rows, rows, positives, exclude=own)
    return Direction("voice to voice", found | {"chance": chance}, len(rows), len(rows) - 1)


def mean_average_precision(scores: Tensor, labels: Tensor) -> tuple[float, int]:
    """Mean over the labels that occur of the average precision, and how many labels these are.

    scores: (N, C), higher is surer. labels: (N, C), 1 where the item has the label. Average
    precision is the precision at each threshold times the gain in recall there, summed; items of
    equal score share a threshold.
    """
    occurring = labels.bool().any(0)
    columns = occurring.nonzero().flatten().tolist()
    values = [_average_precision(scores[:, c], labels[:, c].bool()) for c in columns]
    return (sum(values) / len(values) if values else 0.0), len(values)


def _average_precision(scores: Tensor, positive: Tensor) -> float:
    order = scores.argsort(descending=True)
    ordered, hits = scores[order], positive[order].double().cumsum(0)
    last = torch.ones_like(positive)  # of the items of equal score
    last[:-1] = ordered[:-1] != ordered[1:]
    hits, ranks = hits[last], last.nonzero().flatten().double() + 1
    gains = hits.diff(prepend=hits.new_zeros(1)) / hits[-1]
    return float((gains * hits / ranks).sum())


# --- the figures of a data set --------------------------------------------------------------------


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
        """Rows of the retrieval table, metrics in [0, 1]."""
        return [
            {
                **{"data set": self.data_set, "split": self.split, "direction": way.name},
                **{name: round(value, 4) for name, value in way.metrics.items()},
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

    def mean(self, metric: str) -> float:
        """The mean of a metric over the directions."""
        return sum(way.metrics[metric] for way in self.directions) / len(self.directions)


def figures_of(name: str, data: AnyDataSet, embed: Embedder) -> Result:
    """The figures of a split of the data set `name`."""
    result = Result(name, data.counts.split)
    if isinstance(data, VoxCeleb):
        _people(result, data, embed)
    else:
        _captioned(result, data, embed)
    return result


def _captioned(result: Result, data: Coco | Clotho | AudioCaps, embed: Embedder) -> None:
    """Fill in the retrieval of items and their captions, both ways, and the mAP of labels."""
    if isinstance(data, Coco):
        kind, labels = "image", "categories" if data.label_names else ""
    else:
        known = list(getattr(data, "label_names", ()))
        kind, labels = "audio", "keywords" if known and known == embed.trained.keywords else ""
    found = _features(data, embed, "images" if kind == "image" else "audio", logits=bool(labels))
    captions = [(place, text) for place, i in enumerate(found.kept) for text in data.captions(i)]
    texts = embed.texts([text for _, text in captions])
    owners = [place for place, _ in captions]
    result.directions = both_ways((kind, "text"), found.rows, texts, owners)
    result.counts = {
        "items": len(found.kept),
        "captions": len(captions),
        "listed": data.counts.expected,
        "skipped": data.counts.skipped | found.skipped.reasons,
    }
    if found.logits is not None and not isinstance(data, AudioCaps):
        truth = torch.stack([data.labels(index) for index in found.kept])
        value, occurring = mean_average_precision(found.logits, truth)
        result.labels[f"mAP of {labels}"] = value
        result.counts[labels] = occurring


def _people(result: Result, data: VoxCeleb, embed: Embedder) -> None:
    """Faces find voices of the same person and back; without faces voices others of theirs."""
    voices = _features(data, embed, "audio")
    if data.has_faces:
        faces = _features(data, embed, "images")
        both = sorted(set(voices.kept) & set(faces.kept))
        people = [data.group_of(index) for index in both]
        rows, others = (_rows_of(found, both) for found in (faces, voices))
        result.directions = same_group(("face", "voice"), rows, others, people)
    else:
        people = [data.group_of(index) for index in voices.kept]
        result.directions = [same_voice(voices.rows, people)]
    result.counts = {"items": len(people), "speakers": len(set(people))}


def _features(data: Any, embed: Embedder, kind: Kind, *, logits: bool = False) -> Features:
    """The features of all items' pictures or sounds."""
    load = data.image if kind == "images" else data.sound
    return embed.files(kind, load, [data.path(i) for i in range(len(data))], logits=logits)


def _rows_of(found: Features, indices: list[int]) -> Tensor:
    place = {index: row for row, index in enumerate(found.kept)}
    return found.rows[[place[index] for index in indices]]
