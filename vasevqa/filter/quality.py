"""The quality classifier: its network, its pictures, its optimizer step, measures, result files.

predict = ImageQualityPredictor("best_image_quality_model.pth")
label, confidence = predict("vase.jpg")            0 or 1, and how sure

B pictures of side S; classes 0 (low) and 1 (high).
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms import v2

from shared import checkpoint, distributed, hub, images, memory, weights
from shared.amp import Amp
from shared.checkpoint import DamagedError
from shared.device import present_gpus, visible_gpus
from shared.distributed import World
from shared.errors import UserError, one_line
from shared.files import write_atomic
from shared.images import Skipped, find_images
from shared.loader import make_eval_loader
from shared.recompute import recompute

log = logging.getLogger(__name__)

KINDS = images.SUFFIXES | {".tif", ".tiff"}
CLASSES = ("low", "high")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_ARCH = re.compile(r"(wide_)?resne(x)?t\d+(_\d+x?\d*d?)?")
_LABELS = (0, 1)
_FEWEST = 3  # pictures a class: one for each split
_TRAIN, _VAL = 0.8, 0.1  # the rest is the test split

Labelled = tuple[str, int]  # (name below the data directory, label)


# --- the device -----------------------------------------------------------------------------------


def device_for(
    gpu: int, device: str, typed: Collection[str], processes: int, environ: Mapping[str, str]
) -> str:
    """The name of the device: that of `gpu` where it is there and nothing else was typed.

    Without it the first visible GPU, or the CPU, with one line; several processes take a GPU each.
    Raises UserError for a typed --gpu that is not there.
    """
    if "device" in typed or processes > 1:
        return device
    visible = visible_gpus(environ, present_gpus())
    if 0 <= gpu < visible:
        return f"cuda:{gpu}"
    if "gpu" in typed:
        have = f"0 to {visible - 1}" if visible else "none: no GPU is visible, type --device cpu"
        raise UserError(f"--gpu {gpu} is not there; allowed: {have}")
    if visible:
        log.info("DEFAULT_GPU %d is not among the %d visible: using cuda:0", gpu, visible)
        return "cuda:0"
    return device


# --- the network ----------------------------------------------------------------------------------


class ImageQualityNet(nn.Module):
    """Images (B, 3, S, S), normalised → logits (B, num_classes); weights at `resnet.*`.

    again: in training the blocks keep their inputs alone, and are computed again.
    """

    def __init__(
        self, num_classes: int = 2, arch: str = "resnet50", *, again: bool = False
    ) -> None:
        super().__init__()
        self.resnet = _backbone(arch)
        features = self.resnet.fc.in_features
        self.resnet.fc = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(features, 512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(256, num_classes),
        )
        if again:
            recompute(m for m in self.modules() if isinstance(m, BasicBlock | Bottleneck))

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, num_classes)."""
        return self.resnet(images)


def _backbone(arch: str) -> ResNet:
    """A ResNet with random weights; resnet10 has one plain block a stage."""
    if arch == "resnet10":
        return ResNet(BasicBlock, [1, 1, 1, 1])
    build = getattr(models, arch, None) if _ARCH.fullmatch(arch) else None
    if build is None:
        raise UserError(f"{arch} is no ResNet of torchvision: name resnet10, resnet18, resnet50 …")
    return build(weights=None)


def start_from(net: ImageQualityNet, path: Path) -> None:
    """Fill the backbone from ImageNet weights, or the whole net from one trained before.

    Raises UserError when the file does not fit.
    """
    state = weights.strip_wrappers(weights.read(path))
    if any(name.startswith("resnet.fc.6") for name in state):
        weights.load_strict(net, state, source=path)
    else:
        body = {k.removeprefix("resnet."): v for k, v in state.items() if "fc." not in k}
        names = [name for name in net.resnet.state_dict() if not name.startswith("fc.")]
        weights.load_strict(net.resnet, body, only=names, source=path)


def starting_weights(pretrained: str, arch: str, places: Sequence[Path]) -> Path | None:
    """The file that `--pretrained` names; None for random weights.

    auto: the newest `{arch}*.pth` in `places`, else torchvision's first ones of ImageNet (V1, the
    original's `pretrained=True`), fetched into torch's own cache when they are not there.
    """
    if pretrained != "auto":
        return None if pretrained == "none" else Path(pretrained)
    found = (path for place in places for path in place.glob(f"{arch}*"))
    own = sorted(path for path in found if path.suffix in (".pth", ".safetensors"))
    if own:
        return own[-1]
    if arch == "resnet10":
        raise UserError("resnet10 has no published weights: type --pretrained none, or a file")
    published = models.get_model_weights(arch)["IMAGENET1K_V1"]
    return hub.fetched_weights(published.url, Path(torch.hub.get_dir()) / "checkpoints")


def for_training(size: int) -> v2.Transform:
    """uint8 (3, H, W) → a varied (3, size, size): mirrored, turned, other colours, normalised."""
    return v2.Compose(
        [
            v2.Resize((size, size), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation([-10, 10]),
            v2.ColorJitter(0.2, 0.2, 0.2, 0.1),
            *_normalised(),
        ]
    )


def for_evaluation(size: int) -> v2.Transform:
    """uint8 (3, H, W) → (3, size, size), normalised; always the same."""
    return v2.Compose([v2.Resize((size, size), antialias=True), *_normalised()])


def _normalised() -> list[nn.Module]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def load_trained(path: Path, device: torch.device) -> tuple[ImageQualityNet, dict[str, Any]]:
    """A net that model.py saved, in evaluation mode, and what else its file says.

    Raises UserError when it cannot be read whole.
    """
    try:
        content = checkpoint.load(path)
    except (DamagedError, UserError):
        content = {"model_state_dict": weights.read(path)}  # another format, or the reason in words
    state: Any = content.get("model_state_dict", content)
    net = ImageQualityNet(arch=str(content.get("arch", "resnet50")))
    weights.load_strict(net, weights.strip_wrappers(state), source=path)
    return net.eval().to(device), {k: v for k, v in content.items() if not k.endswith("_dict")}


class ImageQualityPredictor:
    """The net of one file, on a device."""

    def __init__(self, model_path: str | Path, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.net, self.about = load_trained(Path(model_path), self.device)
        self.prepare = for_evaluation(int(self.about.get("image_size", 224)))

    @torch.inference_mode()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """Prepared pictures (B, 3, S, S) → how likely each is of high quality (B,), on the CPU."""
        return self.net(pixels.to(self.device)).float().softmax(1)[:, 1].cpu()

    def predict(self, path: str | Path) -> tuple[int, float]:
        """The likelier label of a picture, and its probability. Raises ValueError for no image."""
        pixels = self.prepare(images.read_rgb(Path(path)))
        high = float(self.probabilities(pixels[None])[0])
        return (1, high) if high >= 0.5 else (0, 1 - high)

    __call__ = predict


# --- the pictures ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """The pictures of each split; no picture is in two."""

    train: list[Labelled]
    val: list[Labelled]
    test: list[Labelled]

    @property
    def counts(self) -> list[int]:
        """Training pictures of each label."""
        return [sum(label == own for _, label in self.train) for own in _LABELS]

    @property
    def sizes(self) -> dict[str, int]:
        """How many pictures each split has, for the run's status."""
        splits = (("training", self.train), ("validation", self.val), ("test", self.test))
        return {f"{name} pictures": len(pictures) for name, pictures in splits}

    @property
    def class_weights(self) -> Tensor:
        """What a picture of each label counts, (2,), so that both count the same in all."""
        counts = torch.tensor(self.counts, dtype=torch.float32)
        return counts.sum() / (len(_LABELS) * counts)


def find_labelled(root: Path) -> list[Labelled]:
    """The pictures of root/0 and root/1, any depth. Raises UserError when a label has too few."""
    found: list[Labelled] = []
    for label in _LABELS:
        names = find_images(root / str(label), KINDS)
        if len(names) < _FEWEST:
            raise UserError(
                f"{root / str(label)} holds {len(names)} picture(s) ({' '.join(sorted(KINDS))}): "
                f"at least {_FEWEST} are needed, one for each split"
            )
        found += [(f"{label}/{name}", label) for name in names]
    return found


def leave_out_unreadable(
    root: Path, found: list[Labelled], world: World, *, workers: int, allowed: float
) -> tuple[list[Labelled], Skipped]:
    """`found` without what cannot be decoded, and what that is; every rank looks at its share.

    Raises UserError when more than the share `allowed` cannot be decoded, or a label has too few.
    """
    share = make_eval_loader(_Problems(root, found), 16, world, workers=workers, collate=list)
    own = [pair for batch in share for pair in batch if pair[1]]
    skipped = Skipped("pictures")
    for name, reason in sorted(p for part in distributed.gather_objects(own, world) for p in part):
        skipped.add(name, reason)
    skipped.refuse_above(allowed, len(found))
    good = [(name, label) for name, label in found if name not in skipped.names]
    for label in _LABELS:
        if sum(own == label for _, own in good) < _FEWEST:
            raise UserError(f"{root / str(label)}: fewer than {_FEWEST} pictures can be read")
    return good, skipped


class _Problems(Dataset[tuple[str, str]]):
    """(name, why it cannot be decoded or '')."""

    def __init__(self, root: Path, found: list[Labelled]) -> None:
        self._root, self._found = root, found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int) -> tuple[str, str]:
        name = self._found[index][0]
        return name, images.problem(self._root / name) or ""


def split(found: Sequence[Labelled], seed: int) -> Splits:
    """80 % to train with, 10 % to validate, 10 % to test, of each label; the same for a seed."""
    parts: list[list[Labelled]] = [[], [], []]
    for label in _LABELS:
        own = sorted(item for item in found if item[1] == label)
        random.Random(f"{seed} {label}").shuffle(own)
        num_val = max(1, round(_VAL * len(own)))
        num_test = max(1, round((1 - _TRAIN - _VAL) * len(own)))
        num_train = len(own) - num_val - num_test
        ends = (num_train, num_train + num_val)
        for part, items in zip(
            parts, (own[: ends[0]], own[ends[0] : ends[1]], own[ends[1] :]), strict=True
        ):
            part += items
    return Splits(*parts)


class QualityPictures(Dataset[tuple[Tensor, int]]):
    """(prepared picture, label). Each split has its own, hence its own preparation."""

    def __init__(self, root: Path, items: list[Labelled], prepare: Any) -> None:
        self._root, self._items, self._prepare = root, items, prepare

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name, label = self._items[index]
        return self._prepare(images.read_rgb(self._root / name)), label


# --- the optimizer step ---------------------------------------------------------------------------


class Learner:
    """Net, loss, optimizer and schedule, as they are trained together."""

    def __init__(
        self,
        net: ImageQualityNet,
        class_weights: Tensor,
        world: World,
        *,
        epochs: int,
        lr: float,
        weight_decay: float,
        amp: str = "off",
        max_bad_steps: int = 10,
    ) -> None:
        """class_weights: (2,). max_bad_steps: in a row, with gradients that are not finite."""
        self.net, self._device = net, world.device
        self._wrapped = distributed.wrap(net, world)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=epochs)
        self.class_weights, self._world = class_weights.to(world.device), world
        self.amp = Amp(amp, world.device, max_bad_steps=max_bad_steps)

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        own = {"model": self.net, "optimizer": self.optimizer, "schedule": self.schedule}
        return own | {"amp": self.amp}

    @property
    def lr(self) -> float:
        """The learning rate of the step that comes next."""
        return float(self.schedule.get_last_lr()[0])

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimizer step on images (B, 3, S, S) and labels (B,); its loss, a scalar."""
        loss = self.backward(images, labels)
        self.amp.step(self.optimizer, self.net.parameters())
        return loss

    def backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add the gradients of images (B, 3, S, S) and labels (B,); their loss, a scalar.

        The loss is the class-weighted mean over the pictures of all processes: its mean over the
        processes, as DDP takes of the gradients, is that of one process with all the pictures.
        """
        labels = labels.to(self._device)
        with self.amp.autocast():
            logits = self._wrapped(images.to(self._device, non_blocking=True))
            summed = cross_entropy(logits, labels, self.class_weights, reduction="sum")
        weight = distributed.mean(self.class_weights[labels].sum(), self._world)
        loss = summed / weight
        self.amp.backward(loss)
        return loss


def memory_plan(
    arch: str, image_size: int, batch: int, processes: int, amp: str = "off", *,
    again: bool = False,
) -> memory.Plan:  # fmt: skip
    """What one of `processes` holds at the peak of a step on `batch` pictures.

    again: with gradient checkpointing.
    """
    with memory.counted() as live:
        net = ImageQualityNet(arch=arch, again=again)
        learner = Learner(net, torch.ones(2), World(), epochs=1, lr=1e-3, weight_decay=1e-4,
                          amp=memory.mode_of(amp))  # fmt: skip
        pixels = torch.empty(batch, 3, image_size, image_size)
        live.begin(net, learner.optimizer)
        learner.step(pixels, torch.zeros(batch, dtype=torch.long))
    title = f"{arch}, {batch} pictures of {image_size} pixels a process, amp {amp}"
    return live.plan(
        title,
        "pictures, and all that is kept of them" + ", recomputed" * again,
        wrapped=net,
        processes=processes,
    )


# --- measures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A classifier on labelled pictures. loss: the mean, NaN when not asked for.

    confusion[true][predicted]: numbers of pictures. report: precision, recall, f1 and support of
    each class, 0 where nothing is counted.
    """

    confusion: list[list[int]]
    report: list[dict[str, float]]
    loss: float = math.nan

    @property
    def count(self) -> int:
        """Pictures measured on."""
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """The share of pictures whose class is right."""
        return sum(self.confusion[label][label] for label in _LABELS) / self.count

    @property
    def majority(self) -> float:
        """The accuracy of naming the most frequent class for every picture."""
        return max(map(sum, self.confusion)) / self.count

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]], loss: float = math.nan) -> Measured:
        """The measures of at least one (label, prediction)."""
        from sklearn import metrics

        columns: Any = metrics.precision_recall_fscore_support(
            *zip(*pairs, strict=True),
            labels=_LABELS,
            zero_division=0.0,  # type: ignore[arg-type]
        )
        names = ("precision", "recall", "f1", "support")
        report: list[dict[str, float]] = [
            dict(zip(names, (c[n].item() for c in columns), strict=True)) for n in _LABELS
        ]
        confusion = metrics.confusion_matrix(*zip(*pairs, strict=True), labels=_LABELS)
        return cls(confusion.tolist(), report, loss)


@torch.no_grad()
def measure(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
    class_weights: Tensor | None = None,
) -> Measured:
    """`net` on all ranks' batches, which may differ in number: they exchange at the end.

    batches: pictures (B, 3, S, S) and labels (B,). class_weights: (classes,), what a picture of
    each label counts in the loss, which without them is not taken.
    """
    net.eval()
    pairs: list[tuple[int, int]] = []
    losses = torch.zeros(2, dtype=torch.float64, device=world.device)  # weighted sum, weights
    for pixels, labels in batches:
        logits = net(pixels.to(world.device, non_blocking=True)).float()
        pairs += zip(labels.tolist(), logits.argmax(1).tolist(), strict=True)
        if class_weights is not None:
            labels = labels.to(world.device)
            losses[0] += cross_entropy(logits, labels, class_weights, reduction="sum")
            losses[1] += class_weights[labels].sum()
    loss, weight = distributed.total(losses, world).tolist()
    every = [pair for share in distributed.gather_objects(pairs, world) for pair in share]
    return Measured.of(every, loss / weight if weight else math.nan)


# --- what a training leaves -----------------------------------------------------------------------


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


def results(
    history: History, tested: Measured, splits: Splits, skipped: Skipped, started_from: str
) -> dict[str, Any]:
    """The content of training_results.json. started_from: the weights before training."""
    accuracies = history.columns["val_acc"]
    return {
        "test_acc": tested.accuracy,
        "test_acc_before_training": history.before,
        "best_val_acc": max(accuracies),
        "best_epoch": accuracies.index(max(accuracies)) + 1,
        "confusion_matrix": tested.confusion,
        "classification_report": dict(zip(CLASSES, tested.report, strict=True)),
        "class_weights": splits.class_weights.tolist(),
        "pictures": {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test)},
        "left_out": skipped.names,
        "started_from": started_from,
        "history": {name: _finite(values) for name, values in history.columns.items()},
    }


def _finite(values: list[float]) -> list[float | None]:
    """None for NaN and infinity, which JSON does not have."""
    return [value if math.isfinite(value) else None for value in values]


def say(tested: Measured) -> None:
    """Log the confusion matrix with precision and recall."""
    log.info("held-out pictures, rows: what they are, columns: what the model says")
    log.info("%8s %8s %8s %10s %8s", "", *CLASSES, "precision", "recall")
    for name, counts, row in zip(CLASSES, tested.confusion, tested.report, strict=True):
        log.info("%8s %8d %8d %10.4f %8.4f", name, *counts, row["precision"], row["recall"])


def draw(path: Path, history: History, tested: Measured) -> None:
    """Draw the losses, the accuracy and the confusion matrix; a failure is one warning."""
    try:
        _draw(path, history, tested)
    except Exception as error:  # a picture is not worth a run
        log.warning("%s cannot be drawn: %s", path, one_line(error))


def _draw(path: Path, history: History, tested: Measured) -> None:
    from matplotlib.figure import Figure
    from sklearn import metrics

    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, accuracy, matrix = figure.subplots(1, 3)
    epochs = range(1, len(history.columns["val_acc"]) + 1)
    losses.plot(epochs, history.columns["train_loss"], label="training")
    losses.plot(epochs, history.columns["val_loss"], label="validation")
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    accuracy.plot(epochs, history.columns["val_acc"], color="C2")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy")
    shown = metrics.ConfusionMatrixDisplay(np.array(tested.confusion), display_labels=CLASSES)
    shown.plot(ax=matrix, cmap="Blues", colorbar=False)
    matrix.set(title="held-out pictures")
    write_atomic(path, lambda stream: figure.savefig(stream, format="png", dpi=110))
