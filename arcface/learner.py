"""Encoder, ArcFace head and their optimizers, in one process or several.

B images of a process, D width of the embedding, C classes, K sub-centres.
"""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from arcface import optimizers
from arcface.encoders import Encoder
from arcface.optimizers import LearningRate
from arcface.recipe import Recipe
from arcface.schedule import learning_rate_factor
from shared import distributed
from shared.centre_rows import CentreRows
from shared.checkpoint import Parts
from shared.class_centres import ClassCentres
from shared.distributed import World, gather_with_grad
from shared.errors import UserError
from shared.margins import adaptive_margins
from shared.precision import Amp

log = logging.getLogger(__name__)

# Each rank keeps its own buffers until the end of an epoch; torch 2.15 has renamed the option.
_NAMES = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_BUFFERS_OF_RANK_0 = next(
    name for name in ("forward_sync_buffers", "broadcast_buffers") if name in _NAMES
)
_ENCODER, _HEAD = "image_encoder.0", "head"  # as the configuration calls them


class WithHead(nn.Module):
    """Images and labels → this process's mean loss: what DDP wraps, whose mean is that of all."""

    def __init__(self, encoder: Encoder, head: ClassCentres) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """From images (B, 3, S, S), normalised, and labels (B,) to a scalar."""
        return self.head(self.encoder(images), labels)


class Learner:
    """What is trained: `loss` and `step` of a batch, `parts` for a checkpoint.

    The head goes into DDP with the encoder, or, sharded or sampled (Partial FC), beside it: then
    each rank has centres of its own and an optimizer for them, and the loss is that of all ranks.
    """

    def __init__(self, recipe: Recipe, encoder: Encoder, margins: Tensor, world: World, seed: int):
        """`encoder` on its device. margins: radians, (C,) or one for all."""
        head = recipe.head
        if head.in_channels != encoder.dim:
            raise UserError(
                f"model.head.in_channels is {head.in_channels}, the encoder gives {encoder.dim}"
            )
        self.encoder, self._world, self._is_separate = encoder, world, head.is_separate
        self._clip_norm = recipe.optimizer.clip_norm or math.inf
        alone = World(device=world.device)
        self.head = ClassCentres(
            head.num_classes, head.in_channels, world if head.is_separate else alone,
            margins=margins, scale=head.scale, easy_margin=head.easy_margin,
            sub_centres=head.sub_centres, sample_rate=head.sample_rate,
            init_std=(3 * head.in_channels) ** -0.5,  # as a linear layer's: how fast lr turns them
            seed=seed,
        ).to(world.device)  # fmt: skip
        self._build_optimizers(recipe)
        inner = encoder if head.is_separate else WithHead(encoder, self.head)
        self._wrapped = distributed.wrap(
            inner, world, gradient_as_bucket_view=True, **{_BUFFERS_OF_RANK_0: False}
        )

    def _build_optimizers(self, recipe: Recipe) -> None:
        lr = recipe.lr_for(recipe.train.batch_size * self._world.size)
        encoder, head = (_ENCODER, self.encoder.backbone), (_HEAD, self.head)
        for key in optimizers.unused_keys(recipe.optimizer, [encoder, head]):
            log.warning("optim_wrapper.paramwise_cfg.custom_keys.%s: no parameter has it", key)
        first = [encoder] if self._is_separate else [encoder, head]
        self.optimizer = optimizers.build_optimizer(recipe.optimizer, first, lr)
        self.rows: CentreRows | None = None
        if self._is_separate:
            self._head_optimizer = optimizers.build_optimizer(recipe.optimizer, [head], lr)
            self.rows = CentreRows(self.head, self._head_optimizer)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the encoder with a head of few classes, and of one that is sharded or sampled."""
        return [self.optimizer, *([self._head_optimizer] if self._is_separate else [])]

    def learning_rate(self, recipe: Recipe, steps_per_epoch: int) -> LearningRate:
        """The schedule of the optimizers, as they are before anything is restored."""
        lr = recipe.lr_for(recipe.train.batch_size * self._world.size)
        factor = learning_rate_factor(recipe.schedule, steps_per_epoch, lr)
        return LearningRate(self.optimizers, factor)

    def train(self) -> None:
        """Set training mode."""
        self._wrapped.train()
        self.head.train()

    def loss(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The mean loss of this process's images or, with a head beside DDP, of all images.

        images (B, 3, S, S) normalised, labels (B,) int64; `step` decides what a sampled head draws.
        Either way DDP's gradients are those of the mean over all images.
        """
        if self.rows is None:
            return self._wrapped(images, labels)
        self.rows.sample(labels, step)
        return self.head(self._wrapped(images), labels)

    def step(self, amp: Amp) -> None:
        """Clip by the norm of encoder and head, step, clear the gradients.

        Nothing moves where they are not finite.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        sharded = (self._head_optimizer, self._world) if self._is_separate else None
        amp.step(self.optimizer, parameters, clip_norm=self._clip_norm, sharded=sharded)

    def parts(self) -> Parts:
        """What a checkpoint holds of it."""
        parts: Parts = {"encoder": self.encoder, "optimizer": self.optimizer}
        parts["statistics"] = self.statistics = RankBuffers(self.encoder, self._world)
        parts["head"] = self.rows or self.head
        return parts

    def collect(self) -> None:
        """Bring what lies on other ranks to rank 0, before each save; every rank."""
        self.statistics.collect()
        if self.rows is not None:
            self.rows.collect()

    def weights(self) -> dict[str, Tensor]:
        """Encoder and centres on the CPU under the names of one module; rank 0, after `collect`."""
        state = {f"encoder.{n}": t.cpu() for n, t in self.encoder.state_dict().items()}
        centres = self.rows.state_dict()["centres"] if self.rows else self.head.weight.detach()
        return state | {"head.weight": centres.cpu()}


class RankBuffers:
    """Every rank's batch norm statistics, as a part of a checkpoint.

    They differ between ranks within an epoch and are averaged at its end; a run that is stopped in
    between goes on as if it had not been.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        self._buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self._world = world
        self._rows = self._own()[None].cpu()

    def average(self) -> None:
        """Give every rank the mean over the ranks."""
        if self._buffers and self._world.size > 1:
            self._put(distributed.mean(self._own(), self._world))

    def collect(self) -> None:
        """Note the statistics of all ranks; every rank, before each save."""
        if self._buffers:
            with torch.no_grad():
                self._rows = gather_with_grad(self._own()[None], self._world).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Of every rank a row, as `collect` found them."""
        return {"rows": self._rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's row or, of another number of ranks, the mean."""
        rows = state["rows"]
        if not self._buffers:
            return
        fits = len(rows) == self._world.size
        self._put((rows[self._world.rank] if fits else rows.mean(0)).to(self._world.device))

    def _own(self) -> Tensor:
        flat = [buffer.detach().flatten() for buffer in self._buffers]
        return torch.cat(flat) if flat else torch.zeros(0, device=self._world.device)

    def _put(self, row: Tensor) -> None:
        sizes = [buffer.numel() for buffer in self._buffers]
        with torch.no_grad():
            for buffer, values in zip(self._buffers, row.split(sizes), strict=True):
                buffer.copy_(values.view_as(buffer))


def class_margins(recipe: Recipe, labels: Tensor) -> Tensor:
    """The margins of all classes, (C,) or one: given, or by how often each is in `labels` (N,)."""
    adaptive = recipe.head.adaptive
    if adaptive is None:
        return torch.tensor(recipe.head.margins, dtype=torch.float64)
    counts = torch.bincount(labels, minlength=recipe.head.num_classes)
    return adaptive_margins(counts, adaptive.low, adaptive.high, adaptive.power)
