"""Which samples a run trains on and validates with. `refuse_unusable` alone imports torch."""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lavic.src import sample_limit
from lavic.src.catalogue import Sample, read_samples
from shared.errors import UserError

if TYPE_CHECKING:
    from lavic.src.knowledge_distillation import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The samples of a run, in the files' order."""

    train: list[Sample]
    valid: list[Sample]


def open_samples(cfg: Config) -> Found:
    """The samples that the settings ask for. Raises UserError when there are none."""
    train = read_samples(cfg.train_data, cfg.train_images_dir)
    valid = read_samples(cfg.val_data, cfg.val_images_dir)
    log.info("training: %s", train.summary(cfg.train_images_dir))
    log.info("validation: %s", valid.summary(cfg.val_images_dir))
    chosen = choose(train.usable, cfg.max_samples, cfg.sample_seed)
    if len(chosen) < len(train.usable):
        how = "the first of the file" if cfg.sample_seed is None else "drawn at random"
        log.info("--max_samples %s: %d are trained on, %s", cfg.max_samples, len(chosen), how)
    return Found(chosen, valid.usable)


def choose(samples: list[Sample], most: str, seed: int | None) -> list[Sample]:
    """The first `most` samples (a number, or all); with a seed as many at random, in order."""
    limit = sample_limit.most(most)
    if limit is None or limit >= len(samples):
        return samples
    if seed is None:
        return samples[:limit]
    chosen = random.Random(seed).sample(range(len(samples)), limit)
    return [samples[index] for index in sorted(chosen)]


def refuse_unusable(samples: list[Sample], what: str) -> None:
    """Raise UserError when not one of the samples has a picture that can be decoded.

    The first that can be ends the search, so that this costs nothing where all is well.
    """
    from shared.images import problem

    reason = ""
    for sample in samples:
        reason = problem(sample.image_path) or ""
        if not reason:
            return
    raise UserError(
        f"none of the {len(samples)} {what} samples has a usable picture; the last is "
        f"{samples[-1].image_path} ({reason}): fetch them again with src/crawl_images.py"
    )


class SameSamples:
    """A part of checkpoints that refuses to continue on other samples than it was trained on."""

    def __init__(self, samples: list[Sample]) -> None:
        names = "\n".join(f"{s.image_path.name}\t{s.title}\t{s.description}" for s in samples)
        self._mark = {
            "samples": len(samples),
            "sha256": hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Their number and what they are."""
        return dict(self._mark)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare. Raises ValueError when they differ."""
        if state != self._mark:
            raise ValueError(
                f"{state['samples']} training samples then, {self._mark['samples']} now, or with "
                "other words: the order would be another one; start anew with --resume never, or "
                "put files and pictures back as they were"
            )
