"""What a run of this recipe is, and which keys of a configuration decide its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# What decides the numbers of a run, and what below it does not.
_DECIDING = (
    *("model.image_encoder", "model.head", "data_preprocessor", "train_dataloader"),
    *("optim_wrapper", "param_scheduler", "auto_scale_lr", "custom_hooks", "load_from", "sync_bn"),
)
_FREE = (
    *("num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "collate_fn"),
    *("data_root", "drop_last"),
)


@dataclass(frozen=True)
class AdaptiveMargins:
    """Margins by class frequency; see shared.margins.adaptive_margins."""

    low: float
    high: float
    power: float


@dataclass(frozen=True)
class Head:
    """ArcFace's class centres."""

    num_classes: int
    in_channels: int
    sub_centres: int
    scale: float
    margins: float | tuple[float, ...]  # radians; one for all classes, or one each
    easy_margin: bool
    adaptive: AdaptiveMargins | None
    sample_rate: float
    shard: bool

    @property
    def is_separate(self) -> bool:
        """Whether the centres stay outside DDP, each rank with its own."""
        return self.shard or self.sample_rate < 1


@dataclass(frozen=True)
class Loader:
    """Pictures of one split. batch_size: of one process."""

    name: str  # its key in the configuration
    batch_size: int
    workers: int
    dataset: dict[str, Any]


@dataclass(frozen=True)
class Optimizer:
    """Torch's optimizer and how it treats single parameters."""

    kind: str
    lr: float
    options: dict[str, Any]
    clip_norm: float | None
    norm_decay_mult: float
    bias_decay_mult: float
    custom_keys: tuple[tuple[str, float, float], ...]  # part of a name, lr_mult, decay_mult


@dataclass(frozen=True)
class Checkpoints:
    """Which files an epoch leaves. interval: epochs, 0 for none. keep: None for all."""

    interval: int
    keep: int | None
    best: str | None  # the metric, as Recall@1


@dataclass(frozen=True)
class Recipe:
    """A run's settings."""

    encoder: Any  # model.image_encoder; see encoders.build_encoder
    head: Head
    preprocess: Any  # data_preprocessor; see batches.open_preprocess
    train: Loader
    query: Loader
    gallery: Loader
    optimizer: Optimizer
    schedule: Any  # param_scheduler; see schedule.learning_rate_factor
    base_batch_size: int | None  # total batch that lr is meant for; None: lr as it is
    epochs: int
    val_interval: int
    val_begin: int
    val_before_train: bool
    val_amp: bool
    recall_at: tuple[int, ...]
    map_at: tuple[int, ...]
    log_interval: int
    checkpoints: Checkpoints
    amp: str | None
    seed: int | None
    cudnn_benchmark: bool
    sync_bn: bool
    load_from: str | None

    def lr_for(self, total_batch: int) -> float:
        """The learning rate for a total batch (Goyal et al. 2017, arXiv:1706.02677, 2.1)."""
        return self.optimizer.lr * total_batch / (self.base_batch_size or total_batch)


def deciding(configuration: dict[str, Any]) -> dict[str, Any]:
    """The dotted keys and values that decide the numbers of a run, but for its length."""
    found: dict[str, Any] = {}
    for name in _DECIDING:
        value: Any = configuration
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        found |= {key: leaf for key, leaf in _leaves(value, name) if not _is_free(key)}
    return found


def _is_free(key: str) -> bool:
    return any(part in _FREE for part in key.split("."))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every leaf below `value`, by its dotted key; what is None counts as missing."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{name}.{number}")
    elif value is not None:
        yield name, value
