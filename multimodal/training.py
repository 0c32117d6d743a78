"""The training of run_training.py: what it is built from, and its loop."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from multimodal import grad_cache, memory, stages, validation
from multimodal.batches import epoch_of, labels_of, split
from multimodal.checkpoint_files import BEST, FINAL, CheckpointFiles, epoch_file
from multimodal.learner import Batch, Task, loss_of
from multimodal.report import Report
from multimodal.stages import Stage
from multimodal.training_parts import Training
from shared import distributed, logs, seed
from shared.distributed import World
from shared.memory import explained_out_of_memory
from shared.reporter import Plan
from shared.run import Run
from shared.settings import settings

if TYPE_CHECKING:
    from multimodal.run_training import Config

log = logging.getLogger(__name__)


def train(cfg: Config) -> int:
    """Train through the stages; the exit code."""
    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    with (
        Run(cfg, world, cfg.run_dir, "multimodal", tensorboard=cfg.tensorboard) as run,
        _log_file(cfg.run_dir, world),
    ):
        seed.seed_all(cfg.run.seed)
        training = Training(cfg, world)
        training.announce()
        reports, metrics = cfg.run_dir / "reports", cfg.run_dir / "metrics.jsonl"
        facts = training.facts()
        with (
            Report(reports, facts, metrics, enabled=world.is_main) as report,
            explained_out_of_memory(lambda: memory.text(cfg, world.size)),
        ):
            code = _loop(training, run, report)
    distributed.cleanup(world)
    return code


def _loop(training: Training, run: Run, report: Report) -> int:
    cfg, world, parts = training.cfg, training.world, training.parts
    plan = Plan(training.total_steps, training.rows, data=training.sources.sizes)
    position = run.restore(parts, plan)
    files = _checkpoint_files(training)
    if position.step == 0:
        training.history.before = _recalls(training)
    for stage in stages.left(training.stages, position.epoch):
        learner = stages.enter(stage, training.learner, world)
        if (position.epoch, position.batch) == (stage.span.first, 0):
            training.optimizer.state.clear()
            training.best.reset()  # the loss is another one from here on
        while position.epoch < stage.span.end and position.step < training.total_steps:
            for task, batch in epoch_of(
                stage.sources, training.batches, world, stage.span, position
            ):
                rate = stages.set_rate(
                    training.optimizer, cfg, stage, position.epoch, position.batch
                )
                loss, tags = _step(training, learner, task, batch)
                training.mean_loss.add(loss)
                position.advance()
                run.log({"loss": loss, **tags, "lr": rate, "stage": stage.span.stage + 1})
                stop = run.should_stop()
                if stop or position.step % cfg.run.save_every == 0:
                    # rank 0's state is saved for all: let each hold an equal share of the sums
                    training.mean_loss.sums = distributed.mean(training.mean_loss.sums, world)
                    run.save(parts)
                if stop:
                    return _stopped(training, run, report)
                if position.step == training.total_steps:
                    break
            _close_epoch(training, stage, run, report, files)
            run.save(parts)
    files.write_weights(FINAL, epoch=position.epoch, stage=training.stages[-1].span.name)
    return _finish(training, run, report)


def _step(
    training: Training, learner: nn.Module, task: Task, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimizer step; its loss, and the parts of it for the charts."""
    cfg, world = training.cfg, training.world
    labels, tags = labels_of(batch, world.device), dict[str, Tensor]()

    def whole(outputs: dict[str, Tensor]) -> Tensor:
        loss, parts = loss_of(task, outputs, labels, training.losses, world)
        tags.update({f"{task.name}/{name}": part for name, part in parts.items()})
        return loss

    chunks = split(batch, cfg.batch_size, task, world.device)
    loss, outputs = grad_cache.backward(learner, chunks, whole, training.amp)
    training.amp.step(training.optimizer, learner.parameters(), clip_norm=cfg.clip_norm)
    training.learner.model.clamp_temperatures()
    if "scale" in outputs:
        tags[f"{task.name}/scale"] = outputs["scale"]
    return loss, tags


def _close_epoch(
    training: Training, stage: Stage, run: Run, report: Report, files: CheckpointFiles
) -> None:
    """Validate and report the epoch just trained, go on to the next, write its checkpoints."""
    cfg, world, mean = training.cfg, training.world, training.mean_loss
    train_loss = mean.of(distributed.total(mean.sums, world))
    found = validation.losses(
        training.learner, stage.work, cfg.eval_batch_size, training.losses, world, training.amp
    )
    # without held-out samples the training's own loss decides
    value = sum(found.values()) / len(found) if found else train_loss
    improved, position = training.best.update(value), run.position
    tags = {f"val/{name}": loss for name, loss in found.items()}
    run.log({"epoch/loss": train_loss, "val/loss": value, **tags}, split="epoch")
    run.log({"val/loss": training.best.best}, split="best")
    chance = math.log(training.rows) if stage.span.stage else math.nan
    steps = position.batch
    training.history.add_epoch(stage.span, steps, training.rows, train_loss, value, chance)
    log.info(
        "epoch %d/%d | %s | training loss %.4f | %s loss %.4f%s",
        position.epoch + 1,
        cfg.epochs,
        stage.span.name,
        train_loss,
        "validation" if found else "(no validation) training",
        value,
        " | best" if improved else "",
    )
    mean.reset()
    report.update(stages=training.history.stages)
    position.next_epoch()
    about = {"epoch": position.epoch, "stage": stage.span.name, "val_loss": value}
    if improved:
        files.write_weights(BEST, **about)
    if position.epoch % cfg.checkpoint_every == 0 or position.epoch == stage.span.end:
        files.write_state(epoch_file(position.epoch), training.parts, position, **about)


def _recalls(training: Training) -> dict[str, dict[str, float]]:
    return validation.recall_at_1(
        training.learner,
        training.sources.found,
        training.cfg.eval_batch_size,
        training.world,
        training.amp,
    )


def _stopped(training: Training, run: Run, report: Report) -> int:
    code = run.finish()
    reason = f"stopped at step {run.position.step} of {training.total_steps}, and saved"
    report.close("interrupted", reason, _directory(training))
    return code


def _finish(training: Training, run: Run, report: Report) -> int:
    """Measure what was reached and close run and report; the exit code."""
    after, before = _recalls(training), training.history.before
    rows = [
        {
            "pairs": name,
            "R@1 before": before.get(name, {}).get("R@1"),
            "R@1 after": found["R@1"],
            "chance": found["chance"],
            "held-out pairs": int(found["pairs"]),
        }
        for name, found in after.items()
    ]
    for row in rows:
        log.info("%s", ", ".join(f"{name} {value}" for name, value in row.items()))
    result = None
    if rows:
        kind = "image-text" if rows[0]["pairs"] == "coco" else rows[0]["pairs"]
        result = {"name": f"{kind} R@1", "before": rows[0]["R@1 before"]}
        result |= {"after": rows[0]["R@1 after"], "higher_is_better": True}
        result |= {"chance": rows[0]["chance"], "n": rows[0]["held-out pairs"]}
    report.update(summary=rows)
    reason = f"{run.position.step} steps in {run.position.epoch} epochs"
    outputs = [str(_directory(training) / name) for name in (BEST, FINAL)]
    code = run.finish(result=result, outputs=outputs)
    report.close("done", reason, _directory(training))
    return code


def _directory(training: Training) -> Path:
    return training.cfg.run_dir / "checkpoints"


def _checkpoint_files(training: Training) -> CheckpointFiles:
    about = {"model": training.model_options, "keywords": training.keywords}
    about["settings"] = settings(training.cfg)
    return CheckpointFiles(_directory(training), training.learner, about, training.world)


@contextlib.contextmanager
def _log_file(run_dir: Path, world: World) -> Iterator[None]:
    """Log lines also go to <run directory>/logs/training_<time>.log."""
    if not world.is_main:
        yield
        return
    path = run_dir / "logs" / time.strftime("training_%Y%m%d_%H%M%S.log")
    with logs.copied_to(path):
        yield
