"""The training of train_distill.py: what it is built from, and its loop."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from face_distill.distill import students
from face_distill.distillation import Distiller, build
from face_distill.face_batches import FaceBatches, open_batches
from shared import distributed, seed
from shared.distributed import World
from shared.early_stopping import EarlyStopping
from shared.metrics import Mean
from shared.precision import Amp
from shared.reporter import Plan
from shared.run import Run
from shared.sampling import steps_per_epoch

if TYPE_CHECKING:
    from face_distill.train_distill import Config

log = logging.getLogger(__name__)


def train(cfg: Config) -> int:
    """Train the adapters and the ArcFace head; the exit code."""
    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    with Run(
        cfg, world, cfg.run_dir, "face_distill", last="last.pth", tensorboard=cfg.tensorboard
    ) as run:
        code = _train(cfg, world, run)
    distributed.cleanup(world)
    return code


def _train(cfg: Config, world: World, run: Run) -> int:
    """The faces, the student, and the loop; the exit code."""
    seed.seed_all(cfg.run.seed)
    data = open_batches(cfg)
    distiller = build(cfg, data, world)
    data.input_size = distiller.student.image_size
    steps = steps_per_epoch(data.num_training, cfg.batch_size // world.size, world.size)
    plan = Plan(cfg.epochs * steps, cfg.batch_size, data=data.counts)
    return _loop(cfg, world, run, plan, distiller, data)


def _loop(
    cfg: Config, world: World, run: Run, plan: Plan, distiller: Distiller, data: FaceBatches
) -> int:
    student, wrapped = distiller.student, distributed.wrap(distiller, world)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=cfg.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=cfg.epochs)
    amp = Amp(cfg.run.amp, world.device, max_bad_steps=cfg.run.max_bad_steps)
    stopping, mean_loss = EarlyStopping(cfg.patience), Mean(world.device)
    parts = {"optimizer": optimizer, "schedule": schedule, "amp": amp, "stopping": stopping}
    parts |= {"student": students.Trainable(student), "mean_loss": mean_loss}
    position = run.restore(parts, plan)
    before = students.verify_before(cfg, world, student, position.step)
    while position.epoch < cfg.epochs and not stopping.should_stop:
        arc_only = position.epoch < cfg.warmup_epochs
        for batch in data.training(cfg, world, position):
            with amp.autocast():
                terms = wrapped(*batch)
            loss = distiller.total(terms, arc_only=arc_only)
            amp.backward(loss)
            amp.step(optimizer, trainable, clip_norm=cfg.largest_norm)
            mean_loss.add(loss)
            position.advance()
            if position.step == 1:
                log.info(distiller.describe(terms))
            run.log(_tags(loss, terms, float(schedule.get_last_lr()[0])))
            stop = run.should_stop()
            if stop or position.step % cfg.run.save_every == 0:
                # rank 0's state is saved for all: let each hold an equal share of the sums
                mean_loss.sums = distributed.mean(mean_loss.sums, world)
                run.save(parts)
            if stop:
                return run.finish()
        monitored = _monitored(cfg, world, distiller, data, mean_loss, arc_only=arc_only)
        if position.epoch <= cfg.warmup_epochs:
            stopping.reset()  # until here the loss had another composition
        improved = stopping.update(monitored)
        _report(cfg, run, monitored, stopping)
        students.save_epoch(cfg, world, student, position.epoch + 1, is_best=improved)
        schedule.step()
        mean_loss.reset()
        position.next_epoch()
        run.save(parts)
    return run.finish(**students.conclude(cfg, world, student, before, stopping))


def _monitored(
    cfg: Config,
    world: World,
    distiller: Distiller,
    data: FaceBatches,
    loss: Mean,
    *,
    arc_only: bool,
) -> float:
    """What decides about the best epoch: the mean loss over the held-out images of all processes,
    relations within each batch; without such images the training's own, `loss`.
    """
    if not data.val_set:
        return loss.of(distributed.total(loss.sums, world))
    held_out = Mean(world.device)
    distiller.eval()
    with torch.no_grad():
        for batch in data.validation(cfg, world):
            terms = distiller.terms(*batch)
            held_out.add(distiller.total(terms, arc_only=arc_only), weight=len(batch[0]))
    distiller.train()
    return held_out.of(distributed.total(held_out.sums, world))


def _tags(loss: Tensor, terms: dict[str, Tensor], lr: float) -> dict[str, Any]:
    return {"Loss/Total": loss, **{f"Loss/{name}": term for name, term in terms.items()}, "LR": lr}


def _report(cfg: Config, run: Run, monitored: float, stopping: EarlyStopping) -> None:
    run.log({"epoch/loss": monitored}, split="epoch")
    run.log({"epoch/lowest_loss": stopping.best}, split="best")
    kind = "validation" if cfg.val_fraction else "training"
    log.info(
        "epoch %d/%d | %s loss %.4f | lowest %.4f | %d of %d epochs without a lower one",
        run.position.epoch + 1,
        cfg.epochs,
        kind,
        monitored,
        stopping.best,
        stopping.bad,
        cfg.patience,
    )
