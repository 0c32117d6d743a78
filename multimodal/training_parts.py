"""What run_training.py's loop works with: model, data, optimizer, and what is said of them."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from typing import TYPE_CHECKING, Any

from multimodal import pretrained, stages
from multimodal.audio import FRAMES_PER_SECOND
from multimodal.batches import BatchOptions
from multimodal.history import History
from multimodal.learner import Learner, LossOptions
from multimodal.model import FRAMES_A_TOKEN, create_model
from multimodal.pair_sources import DataOptions, Sources, open_all
from multimodal.report import environment
from multimodal.samples import NUM_LABELS
from shared.distributed import World
from shared.early_stopping import EarlyStopping
from shared.metrics import Mean
from shared.precision import Amp
from shared.settings import settings

if TYPE_CHECKING:
    from multimodal.run_training import Config

log = logging.getLogger(__name__)


class Training:
    """Everything that the loop works with."""

    def __init__(self, cfg: Config, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.model_options = {
            "size": cfg.model_size, "num_classes": NUM_LABELS, "embed_dim": cfg.embed_dim,
            "use_checkpoint": cfg.use_checkpoint, "attention": cfg.attention,
            "dropout": cfg.dropout, "activation": cfg.activation,
        }  # fmt: skip
        model = create_model(**self.model_options)
        data = DataOptions(
            model.image_size, cfg.clip_seconds, cfg.feature_cache, cfg.audio_pretraining
        )
        self.sources: Sources = open_all(cfg.data_root, cfg.datasets, data)
        self.stages = stages.plan(cfg, self.sources, world)
        file = pretrained.find(cfg.pretrained, cfg.data_root / "pretrained")
        self.start = pretrained.load(model, file)
        hears = any(source.target == "keywords" for source in self.sources.found)
        fills_in = any(source.alone == "spectrogram" for source in self.sources.found)
        self.learner = Learner(model, NUM_LABELS if hears else 0, cfg.loss, fills_in=fills_in)
        self.learner.to(world.device)
        self.optimizer = stages.optimizer_for(self.learner, cfg)
        self.amp = Amp(cfg.amp, world.device, max_bad_steps=cfg.run.max_bad_steps)
        self.best, self.history = EarlyStopping(sys.maxsize), History()
        self.mean_loss = Mean(world.device)
        self.losses = LossOptions(cfg.loss, cfg.local_loss, cfg.label_weight)
        self.batches = BatchOptions(
            cfg.step_rows,
            cfg.run.seed,
            cfg.workers,
            cfg.balance,
            cfg.modality_dropout,
            round(cfg.clip_seconds * FRAMES_PER_SECOND) // FRAMES_A_TOKEN + 1,
        )

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "learner": self.learner, "optimizer": self.optimizer, "amp": self.amp,
            "best": self.best, "history": self.history, "mean_loss": self.mean_loss,
        }  # fmt: skip

    @property
    def total_steps(self) -> int:
        """Of the whole run."""
        steps = sum(stage.total_steps for stage in self.stages)
        return min(steps, self.cfg.max_steps or steps)

    @property
    def rows(self) -> int:
        """Samples of a step, over all processes."""
        return self.cfg.step_rows * self.world.size

    @property
    def keywords(self) -> list[str]:
        """The names behind the keyword head's outputs."""
        for source in self.sources.found:
            if source.target == "keywords":
                return list(source.training.label_names)
        return []

    def announce(self) -> None:
        """Log what is going to happen."""
        cfg, world = self.cfg, self.world
        log.info(
            "%d samples a step = %d process(es) x batch %d x accumulation %d; model %s on %s",
            self.rows,
            world.size,
            cfg.batch_size,
            cfg.gradient_accumulation_steps,
            cfg.model_size,
            world.device,
        )
        if cfg.amp == "auto":
            off = "; it is off on the CPU" if self.amp.mode == "off" else ""
            log.info("mixed precision: %s%s", self.amp.mode, off)
        for stage in self.stages:
            chance = f", contrast at chance {math.log(self.rows):.3f}" if stage.span.stage else ""
            log.info(
                "stage %s: epochs %d to %d, %d steps each, from %s%s",
                stage.span.name,
                stage.span.first + 1,
                stage.span.end,
                stage.steps,
                ", ".join(source.name for source in stage.sources),
                chance,
            )

    def facts(self) -> dict[str, Any]:
        """What a report knows at the start."""
        model = self.learner.model
        sizes = {
            name: sum(p.numel() for p in getattr(model, name).parameters())
            for name in ("image", "text", "audio", "fusion", "classifier")
        }
        return {
            "command": shlex.join(sys.argv),
            "data": self.sources.notes,
            "pretrained": self.start,
            "model": {
                **self.model_options,
                "parameters": sum(p.numel() for p in model.parameters()),
                **{f"{name} parameters": count for name, count in sizes.items()},
            },
            "environment": environment(self.world.device),
            "config": settings(self.cfg),
        }
