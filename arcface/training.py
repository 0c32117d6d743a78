"""The training of run_arcface.py: what it is built from, and its loop."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arcface import evaluation, splits
from arcface.encoders import Encoder, build_encoder
from arcface.epoch_files import EpochFiles, Record
from arcface.evaluation import Split
from arcface.learner import Learner, class_margins
from arcface.log_lines import TrainLines, in_percent, val_line
from arcface.recipe import Recipe
from arcface.run_settings import RunSettings, Settings
from arcface.splits import TrainingData
from arcface.weight_files import load_weights
from shared import distributed, seed
from shared.allocator import keep_freed_memory
from shared.checkpoint import Parts, Position
from shared.distributed import World
from shared.errors import UserError, shown
from shared.precision import Amp
from shared.reporter import Plan
from shared.retrieval import MAP_AT, RECALL_AT
from shared.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One run. stored: what goes into config.json, with the flags of the run."""

    settings: Settings
    stored: RunSettings
    run_dir: Path
    validate: bool

    @property
    def recipe(self) -> Recipe:
        """What the configuration asks for."""
        return self.settings.recipe


def train(job: Job) -> int:
    """Train, validate, save; the exit code."""
    options = job.stored.run
    _check_best(job.recipe)
    world = distributed.setup(options.device, options.timeout)
    with Run(job.stored, world, job.run_dir, "arcface") as run:
        code = _train(job, world, run)
    distributed.cleanup(world)
    return code


def _train(job: Job, world: World, run: Run) -> int:
    """What is trained on, the learner, and the loop; the exit code."""
    options, recipe = job.stored.run, job.recipe
    seed.seed_all(options.seed)
    torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    if world.device.type == "cpu":
        keep_freed_memory()
    data = TrainingData(job.settings, world, options.seed)
    test = splits.open_test(job.settings) if job.validate else None
    learner = _learner(job, data, world)
    total_batch = recipe.train.batch_size * world.size
    log.info(
        "%d pictures of %d items | %d a step = %d process(es) x %d | lr %.4g | %.1f M parameters",
        len(data.dataset),
        data.dataset.num_classes,
        total_batch,
        world.size,
        recipe.train.batch_size,
        recipe.lr_for(total_batch),
        sum(p.numel() for part in (learner.encoder, learner.head) for p in part.parameters()) / 1e6,
    )
    return _loop(job, world, run, learner, data, test)


def _counts(data: TrainingData, test: tuple[Split, Split] | None) -> dict[str, int]:
    """What there is, for the report."""
    found = {"training pictures": len(data.dataset), "items": data.dataset.num_classes}
    if test:
        found |= {"queries": len(test[0].dataset), "gallery pictures": len(test[1].dataset)}
    return found


def _loop(
    job: Job,
    world: World,
    run: Run,
    learner: Learner,
    data: TrainingData,
    test: tuple[Split, Split] | None,
) -> int:
    recipe, options = job.recipe, job.stored.run
    amp = _amp(job, world)
    rate, record = learner.learning_rate(recipe, data.steps_per_epoch), Record()
    lines = TrainLines(recipe.log_interval, data.steps_per_epoch, recipe.epochs, world)
    files = EpochFiles(job.run_dir, "last.pt", recipe.checkpoints, recipe.epochs)
    parts = {**learner.parts(), "amp": amp, "record": record}
    steps, batch = recipe.epochs * data.steps_per_epoch, recipe.train.batch_size * world.size
    plan = Plan(steps, batch, lines=False, data=_counts(data, test))  # log_lines.py has the lines
    position = run.restore(parts, plan)
    _settle(world, files, position, record, learner)
    if test and recipe.val_before_train and position.step == 0:
        record.before = _validate(recipe, world, run, learner, data, test, amp)
    while position.epoch < recipe.epochs:
        learner.train()
        lines.restart()
        for batch in data.epoch(position):
            lines.batch_arrived()
            lr = rate.set(position.step)
            images, labels = data.to_device(batch)
            with amp.autocast():
                loss = learner.loss(images, labels, position.step)
            amp.backward(loss)
            loss = loss.detach()  # its graph must not outlive the sampled centres
            learner.step(amp)
            position.advance()
            lines.step_done(position, loss, lr)
            run.log({"loss": loss, "lr": lr})
            stop = run.should_stop()
            if stop or position.step % options.save_every == 0:
                _save(run, learner, parts)
            if stop:
                return run.finish()
        learner.statistics.average()
        epoch = position.epoch + 1
        if test and _is_due(recipe, epoch):
            metrics = _validate(recipe, world, run, learner, data, test, amp)
            if record.update(metrics, epoch, recipe.checkpoints.best):
                run.log(in_percent(metrics), split="best")
        position.next_epoch()
        if _save(run, learner, parts) and world.is_main:
            files.epoch_done(epoch, record, learner.weights)
    return run.finish(result=_result(record), outputs=[str(path) for path in files.all()])


def _save(run: Run, learner: Learner, parts: Parts) -> bool:
    learner.collect()
    return run.save(parts)


def _settle(
    world: World, files: EpochFiles, position: Position, record: Record, learner: Learner
) -> None:
    """Put files and record in accord with the checkpoint; the same record on every rank."""
    learner.collect()
    is_lost = world.is_main and files.settle(position, record, learner.weights)
    if distributed.broadcast_object(is_lost, world):
        record.forget_best()


def _learner(job: Job, data: TrainingData, world: World) -> Learner:
    """The networks on their device with the weights to begin from, the same on every rank."""
    recipe, cwd = job.recipe, job.settings.cwd
    # a run that continues takes its weights from its own checkpoint, wherever the first came from
    init = "random" if job.stored.run.is_explicit_resume else job.stored.init
    encoder = build_encoder(recipe.encoder, init, cwd)
    _check_size(encoder, data)
    if recipe.sync_bn and world.size > 1:
        if world.device.type != "cuda":
            raise UserError("sync_bn works on GPUs alone: leave it out, or use one process")
        encoder.backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder.backbone)
    encoder.to(world.device).to(memory_format=torch.channels_last)
    margins = class_margins(recipe, data.dataset.labels)
    learner = Learner(recipe, encoder, margins, world, job.stored.run.seed)
    if recipe.load_from and not job.stored.run.is_explicit_resume:
        head = None if recipe.head.is_separate else learner.head
        load_weights(encoder, head, cwd / Path(recipe.load_from).expanduser())
    return learner


def _amp(job: Job, world: World) -> Amp:
    options = job.stored.run
    amp = Amp(options.amp, world.device, max_bad_steps=options.max_bad_steps)
    if amp.mode == "fp16" and job.recipe.head.is_separate:
        raise UserError(
            "a sharded or sampled head does not go with fp16's scaled gradients: use --amp bf16 or "
            "off, or leave out model.head.shard and sample_rate"
        )
    return amp


def _check_size(encoder: Encoder, data: TrainingData) -> None:
    size = (data.dataset.pipeline.height, data.dataset.pipeline.width)
    if encoder.image_size not in (None, size):
        raise UserError(
            f"train_dataloader.dataset.pipeline gives pictures of {size[0]} x {size[1]}, the "
            f"encoder needs {encoder.image_size[0]} x {encoder.image_size[1]}: change the crop_size"
        )


def _check_best(recipe: Recipe) -> None:
    best = recipe.checkpoints.best
    precision = {*MAP_AT, *recipe.map_at}
    names = [f"Recall@{k}" for k in sorted({*RECALL_AT, *recipe.recall_at})]
    names += [f"mAP@{k}{kind}" for k in sorted(precision) for kind in ("", "_min")]
    if best is not None and best not in names:
        allowed = ", ".join(f"retrieval/{name}" for name in names)
        raise UserError(
            f"default_hooks.checkpoint.save_best is {shown(best)}; allowed: auto, {allowed}"
        )


def _is_due(recipe: Recipe, epoch: int) -> bool:
    """Whether `epoch` (from 1) ends with a validation."""
    after = epoch >= recipe.val_begin and epoch % recipe.val_interval == 0
    return after or epoch == recipe.epochs


def _validate(
    recipe: Recipe,
    world: World,
    run: Run,
    learner: Learner,
    data: TrainingData,
    test: tuple[Split, Split],
    amp: Amp,
) -> dict[str, float]:
    """The figures of the encoder as it is, those that the configuration names first."""
    context = amp.autocast if recipe.val_amp else amp.full_precision
    outcome = evaluation.evaluate(
        learner.encoder,
        data.preprocess,
        *test,
        world,
        autocast=context,
        recall_at=recipe.recall_at,
        map_at=recipe.map_at,
    )
    first = [*(f"Recall@{k}" for k in recipe.recall_at), *(f"mAP@{k}" for k in recipe.map_at)]
    metrics = {name: outcome.metrics[name] for name in dict.fromkeys([*first, *outcome.metrics])}
    epoch = run.position.epoch + (run.position.step > 0)
    line = val_line(epoch, outcome.batches, metrics, waited=outcome.waited, seconds=outcome.seconds)
    log.info(line)
    run.log(in_percent(metrics), split="val")
    return metrics


def _result(record: Record) -> dict[str, Any] | None:
    """Recall@1 before and after, in percent."""
    if not record.last:
        return None
    before = record.before.get("Recall@1")
    return {
        "name": "Recall@1",
        "before": None if before is None else 100 * before,
        "after": 100 * record.last["Recall@1"],
        "higher_is_better": True,
    }
