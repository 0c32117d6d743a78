"""The training of knowledge_distillation.py: its loop, and what ends an epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lavic.src.distillation_setup import Data, Learner, precision, sum_gradients
from lavic.src.distillation_state import Best, Tally
from lavic.src.sample_choice import Found, SameSamples, refuse_unusable
from shared import checkpoint, distributed, seed
from shared.distributed import World
from shared.early_stopping import has_stalled
from shared.errors import UserError
from shared.files import write_text
from shared.images import Skipped
from shared.precision import Amp
from shared.reporter import Plan
from shared.run import Run
from shared.sampling import steps_per_epoch

if TYPE_CHECKING:
    from lavic.src.knowledge_distillation import Config

log = logging.getLogger(__name__)

CLIP_NORM = 1.0
MOST_LEFT_OUT = 0.5  # share of an epoch's samples


@dataclass
class Session:
    """What a training works with."""

    cfg: Config
    world: World
    learner: Learner
    amp: Amp
    data: Data
    tally: Tally
    best: Best
    skipped: Skipped


def train(cfg: Config, found: Found) -> int:
    """Train the adapter; the exit code."""
    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    with Run(cfg, world, cfg.run_dir, "lavic", tensorboard=cfg.log_dir) as run:
        code = _train(cfg, found, world, run)
    distributed.cleanup(world)
    return code


def _train(cfg: Config, found: Found, world: World, run: Run) -> int:
    """The model, its data, and the loop; the exit code."""
    refuse_unusable(found.train, "training")
    refuse_unusable(found.valid, "validation")
    steps = steps_per_epoch(len(found.train), cfg.samples_per_step, world.size)
    dtype, mode = precision(cfg, world.device)
    seed.seed_all(cfg.run.seed)  # the same adapter on every process
    learner = Learner(cfg, world, dtype)
    seed.seed_all(cfg.run.seed, world.rank)  # and dropout of its own
    amp = Amp(mode, world.device, max_bad_steps=cfg.run.max_bad_steps)
    if cfg.reuse_prompt:
        learner.keep_start(amp.autocast())
    data, tally = Data(cfg, world, found, learner), Tally(world.device)
    session = Session(cfg, world, learner, amp, data, tally, Best(), Skipped("samples"))
    samples = cfg.samples_per_step * world.size
    counts = {"training samples": len(found.train), "validation samples": len(found.valid)}
    log.info("%d sample(s) a step, %d steps an epoch, weights in %s", samples, steps, dtype)
    plan = Plan(cfg.num_epochs * steps, samples, data=counts)
    return _loop(session, run, plan, SameSamples(found.train))


def _loop(session: Session, run: Run, plan: Plan, samples: SameSamples) -> int:
    cfg, world, learner, amp = session.cfg, session.world, session.learner, session.amp
    trained, tally, best = learner.parameters, session.tally, session.best
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
    parts = {"adapter": learner, "optimizer": optimizer, "amp": amp, "samples": samples}
    parts |= {"tally": tally, "best": best}
    position = run.restore(parts, plan)
    if cfg.validate_before_training and position.step == 0:
        best.before = _validate(session, run)
    while position.epoch < cfg.num_epochs and not has_stalled(
        best.epoch, position.epoch, cfg.patience
    ):
        for step in session.data.training(position):
            labels = int(distributed.total(torch.tensor(step.num_labels), world))
            loss, norm = torch.zeros((), device=world.device), 0.0
            for batch in step.batches:
                with amp.autocast():
                    part = learner.nll(batch.to(world.device)) / labels
                amp.backward(part)
                loss += part.detach()
            if labels:  # of all processes: the same decision on each
                sum_gradients(trained, world)
                norm = amp.step(optimizer, trained, clip_norm=CLIP_NORM)
            tally.add(loss * labels, step)
            _note(step.left_out, session.skipped)
            position.advance()
            # run.log takes the mean over the processes, of which these are sums
            shown = {"train_loss": loss * world.size, "skipped": tally.left_out * world.size}
            run.log(shown | {"lr": cfg.lr, "grad_norm": norm})
            stop = run.should_stop()
            if stop or position.step % cfg.run.save_every == 0:
                tally.share(world)
                run.save(parts)
            if stop:
                return run.finish()
        _conclude_epoch(session, run)
        position.next_epoch()
        run.save(parts)
    return run.finish(result=best.result, outputs=[str(cfg.adapter_dir)])


def _note(left_out: Sequence[tuple[str, str]], skipped: Skipped) -> None:
    for name, reason in left_out:
        skipped.add(name, reason)


@torch.no_grad()
def _validate(session: Session, run: Run) -> float:
    """The mean loss of a token over the validation samples of all processes; written everywhere.

    Raises UserError when not one sample could be used.
    """
    learner, world = session.learner, session.world
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # of losses, of tokens
    learner.eval()
    for step in session.data.validation():
        _note(step.left_out, session.skipped)
        for batch in step.batches:
            with session.amp.autocast():
                sums[0] += learner.nll(batch.to(world.device))
            sums[1] += batch.num_labels
    learner.train()
    sums = distributed.total(sums, world)
    if not sums[1]:
        raise UserError("no validation sample could be used: see the reasons above")
    loss = float(sums[0] / sums[1])
    run.log({"val_loss": loss, "val_perplexity": perplexity(loss)}, split="val")
    log.info("val_loss %.4f | val_perplexity %.4f", loss, perplexity(loss))
    return loss


def perplexity(loss: float) -> float:
    """The exponential of the loss; infinite where that says nothing any more."""
    return math.exp(loss) if loss < 20 else math.inf


def _conclude_epoch(session: Session, run: Run) -> None:
    """Validate, write the epoch's figures, keep the adapter if it is the best."""
    cfg, world, best, number = session.cfg, session.world, session.best, run.position.epoch + 1
    mean, seen, left_out = session.tally.conclude(world)
    if left_out > MOST_LEFT_OUT * seen:
        raise UserError(
            f"{left_out} of the epoch's {seen} samples could not be used: see the reasons above, "
            "and fetch the pictures again with src/crawl_images.py"
        )
    log.info("epoch %d/%d | train_loss %.4f | %d left out", number, cfg.num_epochs, mean, left_out)
    loss = _validate(session, run)
    if world.is_main:
        figures = f"Val Loss: {loss}\nVal PPL: {perplexity(loss)}\n"
        path = cfg.run_dir / f"val_metrics_epoch_{number}.txt"
        with checkpoint.beside(path):
            write_text(path, figures)
    if best.update(loss, number):
        run.log({"val_loss": loss, "epoch": number}, split="best")
        if world.is_main:
            with checkpoint.beside(cfg.adapter_dir):
                session.learner.save(cfg.adapter_dir)
                log.info("Best LoRA adapter saved.")
                log.info("it is in %s", cfg.adapter_dir)
    distributed.barrier(world)
