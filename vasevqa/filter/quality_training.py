"""The training of model.py: what it is built from, and its loop."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from shared import checkpoint, distributed, seed
from shared.distributed import World
from shared.early_stopping import EarlyStopping
from shared.images import Skipped
from shared.loader import make_eval_loader
from shared.metrics import Mean
from shared.precision import Amp
from shared.reporter import Plan
from shared.run import Run
from shared.sampling import steps_per_epoch
from vasevqa.filter import quality_data, quality_net
from vasevqa.filter.quality_data import Splits
from vasevqa.filter.quality_measure import Measured, measure
from vasevqa.filter.quality_net import ImageQualityNet
from vasevqa.filter.quality_results import History, conclude

if TYPE_CHECKING:
    from vasevqa.filter.model import Config

log = logging.getLogger(__name__)

_FILTER = Path(__file__).resolve().parent
_PLACES = (_FILTER, _FILTER / "model")  # for weights that were put there by hand


def train(cfg: Config, device: str) -> int:
    """Train; the exit code."""
    world = distributed.setup(device, cfg.run.timeout)
    with Run(cfg, world, cfg.run_dir, "vasevqa/filter") as run:
        _train(cfg, world, run)
    return run.exit_code


def _train(cfg: Config, world: World, run: Run) -> None:
    """The pictures, the network, and the loop."""
    seed.seed_all(cfg.run.seed)
    found = quality_data.find_labelled(cfg.data_dir)
    start = quality_net.starting_weights(cfg.pretrained, cfg.arch, _PLACES)
    good, skipped = quality_data.leave_out_unreadable(
        cfg.data_dir, found, world, workers=cfg.workers, allowed=cfg.max_unreadable
    )
    splits = quality_data.split(good, cfg.split_seed)
    batch = _batch_size(cfg, len(splits.train), world)
    net = ImageQualityNet(arch=cfg.arch)
    if start:
        quality_net.start_from(net, start)
    log.info("starting from %s", start or "random weights, as asked")
    steps = steps_per_epoch(len(splits.train), batch, world.size)
    log.info("%d + %d pictures to train with, %d steps an epoch, %d pictures a step = %d "
             "process(es) x %d", *splits.counts, steps, batch * world.size, world.size,
             batch)  # fmt: skip
    plan = Plan(cfg.num_epochs * steps, batch * world.size, data=splits.sizes)
    if world.size > 1 and world.device.type == "cuda":  # it refuses tensors of a CPU
        synced: Any = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        net = synced
    started_from = str(start or "random weights")
    found = (splits, batch, skipped, started_from)
    _loop(cfg, world, run, plan, net.to(world.device), found)


class Learner:
    """Net, loss, optimizer and schedule, as they are trained together."""

    def __init__(
        self, cfg: Config, net: ImageQualityNet, class_weights: Tensor, world: World
    ) -> None:
        self.net, self._device = net, world.device
        self._wrapped = distributed.wrap(net, world)
        self.optimizer = torch.optim.Adam(
            net.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, T_max=cfg.num_epochs
        )
        self.class_weights, self._world = class_weights.to(world.device), world
        self.amp = Amp(cfg.run.amp, world.device, max_bad_steps=cfg.run.max_bad_steps)

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
        """One optimizer step on images (B, 3, S, S) and labels (B,); its loss, a scalar.

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
        self.amp.step(self.optimizer, self.net.parameters())
        return loss


def _loop(
    cfg: Config,
    world: World,
    run: Run,
    plan: Plan,
    net: ImageQualityNet,
    data: tuple[Splits, int, Skipped, str],
) -> None:
    splits, batch, skipped, started_from = data
    pictures = quality_data.training_pictures(cfg.data_dir, splits, cfg.image_size)
    learner, stopping = (
        Learner(cfg, net, splits.class_weights, world),
        EarlyStopping(cfg.patience or sys.maxsize),
    )
    mean_loss, history = Mean(world), History()
    parts = learner.parts | {"stopping": stopping, "mean_loss": mean_loss, "history": history}
    position = run.restore(parts, plan)
    if position.step == 0:
        history.before = measure(net, _fixed(cfg, splits.test, world), world).accuracy
        _move_best_aside(cfg, world)
    for epoch in run.epochs(cfg.num_epochs):
        if stopping.should_stop:
            break
        net.train()
        for images, labels in run.batches(pictures, batch, workers=cfg.workers):
            loss = learner.step(images, labels)
            mean_loss.add(loss, len(labels))
            run.step({"loss": loss, "lr": learner.lr})
        run.save()  # a stop in the validation loses nothing
        _share_statistics(net, world)
        held_out = run.watched(_fixed(cfg, splits.val, world), "validation: batch")
        measured = measure(net, held_out, world, learner.class_weights)
        improved = stopping.update(1 - measured.accuracy)
        _report(cfg, run, history, measured, mean_loss, learner.lr)
        if improved:
            _save_best(cfg, world, net, learner.optimizer, epoch, measured.accuracy)
        learner.schedule.step()
        mean_loss.reset()
    tested = _test_best(cfg, run, splits, world, net)
    data_of_run = (splits, skipped, started_from)
    run.finish(**conclude(cfg, world, history, tested, data_of_run))


def _test_best(cfg: Config, run: Run, splits: Splits, world: World, last: nn.Module) -> Measured:
    """The saved model on pictures that nothing was chosen by; `last` where none was written."""
    best = last
    if cfg.best.exists():
        best, _ = quality_net.load_trained(cfg.best, world.device)
    return measure(best, run.watched(_fixed(cfg, splits.test, world), "test: batch"), world)


def _fixed(
    cfg: Config, items: list[quality_data.Labelled], world: World
) -> DataLoader[tuple[Tensor, Tensor]]:
    """This rank's share of a split to measure on."""
    size = max(1, cfg.batch_size // world.size)
    pictures = quality_data.fixed_pictures(cfg.data_dir, items, cfg.image_size)
    workers = cfg.workers if len(items) > size else 0
    return make_eval_loader(pictures, size, world, workers=workers)


def _batch_size(cfg: Config, num_training: int, world: World) -> int:
    """Pictures a process and step; less than asked for when the training split is smaller."""
    wanted = cfg.batch_size // world.size
    batch = min(wanted, num_training // world.size)
    if 0 < batch < wanted:
        log.info("batch size %d instead of %d: there are %d pictures to train with",
                 batch * world.size, cfg.batch_size, num_training)  # fmt: skip
    return max(batch, 1)


def _share_statistics(net: nn.Module, world: World) -> None:
    """Give every rank the running statistics of rank 0, which the checkpoint holds too."""
    if world.size > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


def _move_best_aside(cfg: Config, world: World) -> None:
    """Give the best model of an earlier run another name: this run will write its own."""
    if world.is_main and cfg.best.exists():
        number = 1
        while (aside := checkpoint.previous(cfg.best, number)).exists():
            number += 1
        cfg.best.rename(aside)
        log.info("the model of an earlier run is now %s", aside)


def _save_best(
    cfg: Config, world: World, net: nn.Module, optimizer: torch.optim.Optimizer, epoch: int,
    accuracy: float,
) -> None:  # fmt: skip
    """Write what classifier.py loads."""
    if world.is_main:
        state = {
            "epoch": epoch,
            "model_state_dict": net.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "val_acc": accuracy,
            "arch": cfg.arch,
            "image_size": cfg.image_size,
        }
        with checkpoint.beside(cfg.best):
            cfg.output_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.save(cfg.best, state, keep=1)
    distributed.barrier(world)


def _report(
    cfg: Config, run: Run, history: History, measured: Measured, mean_loss: Mean, lr: float,
) -> None:  # fmt: skip
    """Note the epoch in the history, the metrics and the log."""
    train_loss = mean_loss.value()
    history.add(train_loss, measured, lr)
    run.log({"val/loss": measured.loss, "val/accuracy": measured.accuracy}, split="val")
    run.log({"val/accuracy": max(history.columns["val_acc"])}, split="best")
    log.info("epoch %d/%d | loss %.4f | validation loss %.4f, accuracy %.4f | best %.4f",
             run.position.epoch + 1, cfg.num_epochs, train_loss, measured.loss, measured.accuracy,
             max(history.columns["val_acc"]))  # fmt: skip
