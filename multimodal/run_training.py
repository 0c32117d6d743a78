"""Train one model on pictures, texts and sounds, in three stages.

python run_training.py --model-size base --batch-size 8 --epochs 100
python run_training.py --resume outputs/checkpoints/checkpoint_epoch_50.pt   all else as it was
python run_training.py --estimate --model-size large                         memory, no training
torchrun --nproc_per_node=4 run_training.py                                  four processes
python run_training.py --demo                                                built-in data

Defaults come from config.yaml. The stages: each modality alone, pairs finding each other, and all
of the model together; they share the epochs 30/40/30.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
sys.path.sort(key=lambda path: path == str(Path(__file__).resolve().parent))  # datasets.py last

from shared import replay, stop

if __name__ == "__main__":
    stop.listen()

from shared.config import RunOptions, free, option, parse, parse_known
from shared.errors import UserError, one_line, shown
from shared.files import open_lock
from shared.launch import launch, world_size
from shared.settings import (
    Count,
    Positive,
    Range,
    Share,
    ShareBelowOne,
    Size,
    Workers,
    differing,
    leaves,
    number,
    plain,
)

if TYPE_CHECKING:  # torch comes after the input is checked
    from torch import Tensor, nn

    from multimodal.datasets import Batch, Sources, Task
    from multimodal.model import MultimodalModel
    from multimodal.training.losses import LossOptions
    from multimodal.training.memory import Step
    from multimodal.training.report import Report
    from multimodal.training.schedule import Stage
    from shared.amp import Amp
    from shared.distributed import World
    from shared.run import Run

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
NUM_LABELS = 80  # COCO's categories; keywords of sounds at most
MOST_TESTED = 1000  # items of a test split for the run's result; evaluate.py takes all


@dataclass(frozen=True)
class Config:
    """Settings of the training."""

    data_root: Path = free(HERE / "data", "where the data sets lie")
    output_dir: Path = free(HERE / "outputs", "for checkpoints, logs and reports")
    model_size: Literal["tiny", "small", "base", "large", "nano"] = option(
        "base", "15, 35, 80 or 200 million parameters; nano for tests"
    )
    batch_size: Count = option(8, "samples computed at once on each process")
    epochs: Count = option(100, "epochs of all stages; how they are divided is part of a run")
    lr: Positive = option(1e-4, "highest learning rate")
    config: Path = free(HERE / "config.yaml", "YAML file with the defaults")

    embed_dim: Size = option(512, "width of all features")
    use_checkpoint: bool = free(True, "compute activations again to save memory")
    dropout: ShareBelowOne = option(0.0, "share of each block's outputs that is dropped")
    activation: Literal["gelu", "quick_gelu"] = option("gelu", "quick_gelu for OpenAI's weights")
    pretrained: str = option(
        "auto",
        "word embeddings to start from: auto (the open_clip file in <data root>/pretrained, else "
        "one that is fetched), random, or a FILE, whose towers are taken too where they fit",
        aliases=("--init",),
    )

    gradient_accumulation_steps: Count = option(
        4, "batches a step; gradients as of one large batch"
    )
    micro_batch: Count | None = free(
        None, "samples computed at once in place of --batch-size: the same step in other pieces"
    )
    use_amp: bool = option(True, "bf16 where the GPU has it, else fp16; off on the CPU")
    stage_epochs: str = option("30/40/30", "how the stages share the epochs")
    datasets: tuple[str, ...] = option((), "train on these alone; default: all that are there")
    audio_pretraining: Literal["auto", "keywords", "spectrogram"] = option(
        "auto", "sounds alone: keywords where there are any, else hidden parts filled in"
    )
    loss: Literal["infonce", "sigmoid"] = option("infonce", "how pairs are told from strangers")
    local_loss: bool = option(False, "each process scores its own rows alone; saves memory")
    label_weight: float = option(0.2, "of labels beside pairs, in the last stage")
    modality_dropout: ShareBelowOne = option(
        0.3, "share of pairs shown one modality, in the last stage"
    )
    balance: Share = option(0.5, "1: data sets by their size; 0: all alike; between: between")
    warmup: ShareBelowOne = option(0.05, "share of each stage in which the learning rate rises")
    tower_lr: float = option(0.1, "learning rate of the towers in the last stage, of --lr")
    weight_decay: float = option(0.1, "AdamW's, without gains, biases and temperatures")
    clip_norm: Positive = option(1.0, "largest norm of the gradients")
    clip_seconds: Annotated[float, Range(0, 3600, above=True)] = option(
        10.0, "length of the sounds in training"
    )
    eval_batch_size: Count = free(64, "samples of a validation batch")
    checkpoint_every: Count = free(10, "epochs between checkpoint_epoch_N.pt")
    max_steps: Count | None = option(None, "stop after so many steps", scope="length")
    workers: Workers = free(4, "loader workers a process and data set")
    feature_cache: Path | None = free(None, "keep the sounds' features there")
    estimate: bool = free(False, "print the memory that training takes, stop")
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        from multimodal.pairs.sources import check_names

        check_names(self.datasets)
        _ = self.shares

    @property
    def shares(self) -> list[float]:
        """How the three stages share the epochs."""
        try:
            parts = self.stage_epochs.split("/")
            shares = [number("a share", part, float, Range()) for part in parts]
        except UserError:
            shares = []
        if len(shares) != 3 or sum(shares) <= 0:
            raise ValueError(f"stage_epochs must be like 30/40/30, got {shown(self.stage_epochs)}")
        return shares

    @property
    def run_dir(self) -> Path:
        """Where status, metrics, checkpoints, logs and reports go."""
        return self.run.run_dir or self.output_dir

    @property
    def tensorboard(self) -> Path:
        """Where TensorBoard's events go."""
        return self.run_dir / "logs" / "tensorboard"

    @property
    def step_rows(self) -> int:
        """Samples of an optimizer step on each process."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def at_once(self) -> int:
        """Samples that are computed at once."""
        return min(self.micro_batch or self.batch_size, self.step_rows)

    @property
    def model_options(self) -> dict[str, Any]:
        """create_model's arguments."""
        names = ("embed_dim", "use_checkpoint", "dropout", "activation")
        own = {name: getattr(self, name) for name in names}
        return {"size": self.model_size, "num_classes": NUM_LABELS, **own}

    @property
    def losses(self) -> LossOptions:
        """How losses are taken."""
        from multimodal.training.losses import LossOptions

        return LossOptions(self.loss, self.local_loss, self.label_weight)

    @property
    def amp(self) -> str:
        """The mode of mixed precision."""
        return self.run.amp if self.run.amp != "off" else "auto" if self.use_amp else "off"


DEMO = {  # what suits 640 pictures, 344 sounds and a model of 2 million parameters
    "model_size": "nano",
    "batch_size": 32,
    "gradient_accumulation_steps": 1,
    "epochs": 24,
    "lr": 1e-3,
    "tower_lr": 1.0,
    "clip_seconds": 2.0,
    "use_checkpoint": False,
    "checkpoint_every": 10,
    "workers": 0,
    "pretrained": "random",
}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train; the exit code."""
    from multimodal.pairs.sources import own_weights, start_of_words

    cfg = _read_settings(sys.argv[1:] if argv is None else argv)
    if cfg.run.demo:
        cfg = _with_demo(cfg)
    if cfg.run.replay:
        cfg = replace(cfg, run=replay.settle(cfg, cfg.run_dir))
    if cfg.estimate:
        from multimodal.training import memory

        print(memory.text(step_of(memory.fitted(cfg, step_of, world_size())), world_size()))
        return 0
    _check_batch(cfg, world_size())
    _check_data(cfg)
    own = own_weights(cfg.pretrained, cfg.data_root)
    if cfg.run.fit:
        from multimodal.training import memory

        cfg = memory.fitted(cfg, step_of, world_size())
    if cfg.run.dry_run:
        print(_plan(cfg, own))
        return 0
    if cfg.run.prove:
        return _prove(cfg)
    if not cfg.run.is_explicit_resume:
        start_of_words(cfg.pretrained, cfg.data_root)  # fetched now, or refused
    os.close(open_lock(cfg.run_dir))  # better refused now than after the data sets were read
    return train(cfg)


def train(cfg: Config) -> int:
    """The whole training; the exit code."""
    from multimodal.datasets import DataOptions, open_all
    from multimodal.model import create_model
    from multimodal.pairs.batches import BatchOptions, epoch_of
    from multimodal.training import memory, report, schedule, weights
    from multimodal.training.losses import Learner
    from shared import distributed, seed
    from shared.amp import Amp, EarlyStopping, Mean
    from shared.memory import explained_out_of_memory
    from shared.reporter import Plan
    from shared.run import Run
    from shared.settings import settings

    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    with (
        Run(cfg, world, cfg.run_dir, "multimodal", tensorboard=cfg.tensorboard) as run,
        _log_file(cfg.run_dir, world),
    ):
        # the model, the data sets, and which of them each stage learns from
        seed.seed_all(cfg.run.seed)
        model = create_model(**cfg.model_options)
        sources = open_all(cfg.data_root, cfg.datasets, DataOptions(
            model.image_size, cfg.clip_seconds, cfg.feature_cache, cfg.audio_pretraining
        ))  # fmt: skip
        stages = schedule.plan(sources, cfg.epochs, cfg.shares, cfg.batch_size,
                               cfg.gradient_accumulation_steps, world)  # fmt: skip
        start = _start(cfg, model)
        learner = Learner(model, NUM_LABELS if sources.keywords else 0, cfg.loss,
                          fills_in=sources.fills_in).to(world.device)  # fmt: skip

        optimizer = schedule.optimizer_for(learner, cfg.lr, cfg.weight_decay)
        amp = Amp(cfg.amp, world.device, max_bad_steps=cfg.run.max_bad_steps)
        best, mean_loss, history = EarlyStopping(sys.maxsize), Mean(world), report.History()
        parts = {"learner": learner, "optimizer": optimizer, "amp": amp, "best": best,
                 "history": history, "mean_loss": mean_loss}  # fmt: skip
        batches = BatchOptions(cfg.step_rows, cfg.run.seed, cfg.workers, cfg.balance,
                               cfg.modality_dropout, cfg.clip_seconds)  # fmt: skip
        steps = sum(stage.total_steps for stage in stages)
        total = min(steps, cfg.max_steps or steps)
        about = {"model": cfg.model_options, "keywords": sources.keywords,
                 "settings": settings(cfg)}  # fmt: skip
        files = weights.CheckpointFiles(cfg.run_dir / "checkpoints", learner, about, world)
        _announce(cfg, world, amp, stages)
        with (
            report.Report(cfg.run_dir, _facts(cfg, world, model, sources, start),
                          enabled=world.is_main) as told,
            explained_out_of_memory(lambda: memory.text(step_of(cfg), world.size)),
        ):  # fmt: skip
            words = f"{start['words']} ({start['file'] or 'as asked'})"
            plan = Plan(total, cfg.step_rows * world.size,
                        data=sources.sizes | {"word embeddings": words})  # fmt: skip
            position = run.restore(parts, plan)
            if position.step == 0:
                with run.for_all():
                    history.before = _tested(cfg, sources, world, model)
            for stage in [one for one in stages if one.span.end > position.epoch]:
                net = schedule.enter(stage, learner, world)
                if (position.epoch, position.batch) == (stage.span.first, 0):
                    optimizer.state.clear()
                    best.reset()  # the loss is another one from here on
                for epoch in run.epochs(stage.span.end):
                    if position.step == total:
                        break
                    for task, batch in epoch_of(
                        stage.sources, batches, world, stage.span, position
                    ):
                        rate = schedule.set_rate(
                            optimizer, stage, epoch, position.batch,
                            peak=cfg.lr, warmup=cfg.warmup, towers=cfg.tower_lr,
                        )  # fmt: skip
                        labels = batch.get("labels")
                        loss, tags = _backward(cfg, net, task, batch, amp, world)
                        if run.replays:
                            run.show(model, _samples(learner, task, batch, labels, world))
                        amp.step(optimizer, learner.parameters(), clip_norm=cfg.clip_norm)
                        model.clamp_temperatures()
                        mean_loss.add(loss)
                        run.step({"loss": loss, **tags, "lr": rate, "stage": stage.span.stage + 1})
                        if position.step == total:
                            break
                    run.save()  # a stop in the validation loses nothing
                    val_loss, best_files = _close_epoch(cfg, run, stage, parts, amp, world)
                    told.update(stages=history.stages)
                    mean_loss.reset()
                    position.next_epoch()
                    files.write_epoch(parts, position, stage.span, val_loss, best=best_files,
                                      every=cfg.checkpoint_every)  # fmt: skip
                    run.save()
            files.write_weights(weights.FINAL, epoch=position.epoch, stage=stages[-1].span.name)
            with run.for_all():
                after = _tested(cfg, sources, world)
            _finish(run, told, history.before, after)
    return run.exit_code


# --- a step, an epoch, the end --------------------------------------------------------------------


def _backward(
    cfg: Config, net: nn.Module, task: Task, batch: Batch, amp: Amp, world: World
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add a batch's gradients to those of `net`; its loss, and the parts of it for the charts."""
    from multimodal.pairs.batches import labels_of, split
    from multimodal.training import grad_cache
    from multimodal.training.losses import loss_of

    labels, tags = labels_of(batch, world.device), dict[str, "Tensor"]()

    def whole(outputs: dict[str, Tensor]) -> Tensor:
        loss, parts = loss_of(task, outputs, labels, cfg.losses, world)
        tags.update({f"{task.name}/{name}": part for name, part in parts.items()})
        return loss

    chunks = split(batch, cfg.at_once, task, world.device)
    loss, outputs = grad_cache.backward(net, chunks, whole, amp)
    if "scale" in outputs:
        tags[f"{task.name}/scale"] = outputs["scale"]
    return loss, tags


def _samples(
    learner: nn.Module, task: Task, batch: Batch, labels: Tensor | None, world: World
) -> list[replay.Sample]:
    """Each sample of this process with its losses, its partner looked for among them."""
    import torch

    from multimodal.pairs.batches import on_device
    from multimodal.pairs.samples import caption_of
    from multimodal.training.losses import of_rows

    learner.eval()
    with torch.no_grad():
        outputs = learner(on_device(batch, world.device), task)
        found = of_rows(task, outputs, None if labels is None else labels.to(world.device))
    samples = []
    for row in range(len(next(iter(batch.values())))):
        losses = {name: float(values[row]) for name, values in found.items()}
        text = caption_of(batch["input_ids"][row]) if "input_ids" in batch else ""
        picture = replay.png(batch["images"][row]) if "images" in batch else b""
        samples.append(replay.Sample(losses, f"{task.name}: {text}", picture))
    return samples


def _close_epoch(
    cfg: Config, run: Run, stage: Stage, parts: dict[str, Any], amp: Amp, world: World
) -> tuple[float, list[str]]:
    """Validate and log the epoch just trained: its loss, and the files of which it is the best."""
    from multimodal.training import validation
    from multimodal.training.weights import BEST, RETRIEVAL

    mean, best, history = parts["mean_loss"], parts["best"], parts["history"]
    train_loss = mean.value()
    found = validation.losses(
        parts["learner"], stage.work, cfg.eval_batch_size, cfg.losses, world, amp, run
    )
    # without held-out samples the training's own loss decides
    value = sum(found.values()) / len(found) if found else train_loss
    relative = history.relative(stage.span, found or {"training": train_loss})
    improved = best.update(relative)
    best_files = [BEST] if improved else []
    tags, shown_1 = {f"val/{name}": loss for name, loss in found.items()}, ""
    # pairs are told from strangers from the second stage on
    sources = stage.sources if stage.span.stage else ()
    pairs = validation.recall_at_1(parts["learner"], sources, cfg.eval_batch_size, world, amp, run)
    if pairs:
        tags["val/R@1"] = sum(one["R@1"] for one in pairs.values()) / len(pairs)
        chance_1 = sum(one["chance"] for one in pairs.values()) / len(pairs)
        shown_1 = f" | R@1 {100 * tags['val/R@1']:.1f} % (chance {100 * chance_1:.1f} %)"
        best_files += [RETRIEVAL] if history.is_best_recall(tags["val/R@1"]) else []
    run.log(
        {"epoch/loss": train_loss, "val/loss": value, "val/relative": relative, **tags},
        split="epoch",
    )
    rows = cfg.step_rows * world.size
    chance = math.log(rows) if stage.span.stage else math.nan
    history.add_epoch(
        stage.span, run.position.batch, rows, train_loss, value, chance, is_best=improved
    )
    run.log({"val/loss": history.best_loss, "val/relative": best.best}, split="best")
    log.info(
        "epoch %d/%d | %s | training loss %.4f | %s loss %.4f%s%s",
        run.position.epoch + 1, cfg.epochs, stage.span.name, train_loss,
        "validation" if found else "(no validation) training", value, shown_1,
        " | best" if improved else "",
    )  # fmt: skip
    return value, best_files


def _tested(
    cfg: Config, sources: Sources, world: World, model: MultimodalModel | None = None
) -> dict[str, dict[str, Any]]:
    """R@1 of the test splits as evaluate.py finds it, by `model` or the run's best_model.pt.

    Of at most 1,000 items a set; {} on every process but the first, and for sets without the split.
    """
    from multimodal.datasets import open_split
    from multimodal.training import evaluation

    if not world.is_main:
        return {}
    if model is None:
        trained = evaluation.open_trained(evaluation.checkpoint_at(cfg.run_dir), world.device)
    else:
        trained = evaluation.Trained(model.eval(), cfg.run_dir, {}, [], None)
    embed = evaluation.Embedder(trained, world.device, "off", cfg.eval_batch_size, cfg.workers)
    size, found = trained.model.image_size, {}
    for name in (source.name for source in sources.found):
        try:
            data = open_split(name, cfg.data_root, "test", size, train=False, limit=MOST_TESTED)
            result = evaluation.figures_of(name, data, embed)
        except UserError as error:
            log.warning("%s: no figure of a test split: %s", name, one_line(error))
            continue
        found[name] = {
            "split": result.split, "items": result.counts["items"],
            "R@1": result.mean("R@1"), "chance": result.mean("chance"),
        }  # fmt: skip
    if model is not None:
        model.train()
    return found


def _finish(
    run: Run, told: Report, before: dict[str, Any], after: dict[str, dict[str, Any]]
) -> None:
    """Close run and report with what was reached."""
    from multimodal.training.weights import BEST, FINAL

    rows = [
        {"pairs": name, "split": found["split"], "R@1 before": before.get(name, {}).get("R@1"),
         "R@1 after": found["R@1"], "chance": found["chance"], "items": found["items"]}
        for name, found in after.items()
    ]  # fmt: skip
    for row in rows:
        before_it = "" if row["R@1 before"] is None else f"{100 * row['R@1 before']:.1f} % before, "
        log.info(
            "%s R@1 (%s): %s%.1f %% after; by chance %.1f %%, among %d items",
            row["pairs"], row["split"], before_it, 100 * row["R@1 after"], 100 * row["chance"],
            row["items"],
        )  # fmt: skip
    result = None
    if rows:
        first = rows[0]
        kind = "image-text" if first["pairs"] == "coco" else first["pairs"]
        result = {"name": f"{kind} R@1", "before": first["R@1 before"], "after": first["R@1 after"],
                  "unit": "share", "higher_is_better": True, "chance": first["chance"],
                  "n": first["items"], "split": first["split"]}  # fmt: skip
    told.update(summary=rows)
    outputs = [str(told.checkpoints / name) for name in (BEST, FINAL)]
    run.finish(result=result, outputs=outputs)
    told.close("done", f"{run.position.step} steps in {run.position.epoch} epochs")


# --- what is said of a run ------------------------------------------------------------------------


def _announce(cfg: Config, world: World, amp: Amp, stages: list[Stage]) -> None:
    """Log what is going to happen."""
    rows = cfg.step_rows * world.size
    log.info(
        "%d samples a step = %d process(es) x batch %d x accumulation %d; model %s on %s",
        rows, world.size, cfg.batch_size, cfg.gradient_accumulation_steps, cfg.model_size,
        world.device,
    )  # fmt: skip
    if cfg.amp == "auto":
        off = "; it is off on the CPU" if amp.mode == "off" else ""
        log.info("mixed precision: %s%s", amp.mode, off)
    for stage in stages:
        chance = f", contrast at chance {math.log(rows):.3f}" if stage.span.stage else ""
        log.info(
            "stage %s: epochs %d to %d, %d steps each, from %s%s",
            stage.span.name, stage.span.first + 1, stage.span.end, stage.steps,
            ", ".join(source.name for source in stage.sources), chance,
        )  # fmt: skip


def _start(cfg: Config, model: MultimodalModel) -> dict[str, Any]:
    """Fill in what the model starts from; what that is, for log, report and status."""
    from multimodal.pairs.sources import start_of_words
    from multimodal.training import weights

    if cfg.run.is_explicit_resume:
        return {"file": str(cfg.run.resume), "words": "those of the checkpoint"}
    path = start_of_words(cfg.pretrained, cfg.data_root)
    return weights.load(model, path, towers=cfg.pretrained != "auto")


def _facts(
    cfg: Config, world: World, model: MultimodalModel, sources: Sources, start: dict[str, Any]
) -> dict[str, Any]:
    """What a report knows at the start."""
    from multimodal.training.report import environment
    from shared.settings import settings

    names = ("image", "text", "audio", "fusion", "classifier")
    sizes = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in names}
    return {
        "command": shlex.join(sys.argv),
        "data": sources.notes,
        "pretrained": start,
        "model": {
            **cfg.model_options,
            "parameters": sum(p.numel() for p in model.parameters()),
            **{f"{name} parameters": count for name, count in sizes.items()},
        },
        "environment": environment(world.device),
        "config": settings(cfg),
    }


@contextlib.contextmanager
def _log_file(run_dir: Path, world: World) -> Iterator[None]:
    """Log lines also go to <run directory>/logs/training_<time>.log."""
    from shared import logs

    if not world.is_main:
        yield
        return
    with logs.copied_to(run_dir / "logs" / time.strftime("training_%Y%m%d_%H%M%S.log")):
        yield


def step_of(cfg: Config) -> Step:
    """What decides about the memory of a step."""
    from multimodal.training.memory import Step

    return Step(cfg.model_options, cfg.step_rows, cfg.at_once, cfg.clip_seconds, cfg.datasets,
                cfg.losses, cfg.amp)  # fmt: skip


# --- settings, data, weights ----------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """Where the settings file is."""

    config: Path = option(Config.config, "")


def _read_settings(argv: list[str]) -> Config:
    """The settings of flags, of the run that is resumed, of the file and of the code, in turn."""
    from multimodal.training import settings_file

    processes = leaves(Config().run.processes)  # the launcher reads these before any file
    known = {name: leaf for name, leaf in leaves(Config()).items() if name not in processes}
    path = parse_known(_File, argv).config
    values = settings_file.read(path, known)
    cfg = parse(cast(Any, lambda: _default(values)), argv, __doc__, DEMO)
    if cfg.run.is_explicit_resume and "config" in cfg.run.typed:
        now = {name: plain(leaf.value) for name, leaf in leaves(cfg).items()}
        asked = {name: plain(value) for name, value in values.items() if name not in cfg.run.typed}
        changed = [name for name in asked if known[name].scope == "result"]
        other = differing({n: now[n] for n in changed}, {n: asked[n] for n in changed})
        if other:
            raise UserError(
                f"--resume {cfg.run.resume} cannot continue with {path}: {'; '.join(other)}; leave "
                "--config out, or start anew with --resume never"
            )
    if "amp" in cfg.run.typed:  # a resumed run finds what was meant, not both flags
        cfg = replace(cfg, use_amp=cfg.run.amp != "off")
    return cast(Config, cfg)


def _default(values: dict[str, Any]) -> Config:
    """The settings with those of a file in their places."""
    own = {name: value for name, value in values.items() if hasattr(Config, name)}
    below = {name: value for name, value in values.items() if name not in own}
    try:
        cfg = replace(Config(), **own)
        return replace(cfg, run=replace(cfg.run, **below))
    except ValueError as error:
        raise UserError(str(error)) from None


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the built-in data: its paths where none were typed."""
    from multimodal.demo_data import demo

    root = HERE / "demo"
    paths = demo.build(root)
    changes: dict[str, Any] = {
        "data_root": paths.data_root,
        "output_dir": root / "runs" / "outputs",
        "feature_cache": root / "features",
    }
    changes = {name: value for name, value in changes.items() if name not in cfg.run.typed}
    return replace(cfg, **changes)


def _check_batch(cfg: Config, processes: int) -> None:
    """Refuse a step of one pair where pairs are told from strangers: there is no stranger in it."""
    if cfg.step_rows * processes == 1 and sum(cfg.shares[1:]):
        raise UserError(
            "--batch-size 1 with --gradient-accumulation-steps 1 on one process: a step has one "
            "pair, and the last two stages need others to tell it from; use 2 or more of either, "
            "or --stage-epochs 1/0/0 for the first stage alone"
        )


def _check_data(cfg: Config) -> None:
    """Refuse a data root without data sets in one line, before anything slow is imported."""
    from multimodal.pairs.sources import NAMES

    wanted = cfg.datasets or NAMES
    missing = [name for name in wanted if not (cfg.data_root / name).is_dir()]
    if len(missing) == len(wanted) or (cfg.datasets and missing):
        raise UserError(
            f"{cfg.data_root} lacks {', '.join(missing)}: fetch the data by python "
            "download_datasets.py --datasets coco clotho audiocaps, or type --data-root PATH"
        )


def _prove(cfg: Config) -> int:
    """Hold the ways to take the same step against each other; the exit code.

    It is a step of the last stage, which has all losses.
    """
    from shared.prove import NEAR, Case, accumulated, prove

    batch = ("--batch-size", max(2, cfg.batch_size))
    times = ("--gradient-accumulation-steps", cfg.gradient_accumulation_steps)
    plain = ["--dropout", 0, "--amp", "off", "--stage-epochs", "0/0/1", *batch, *times]
    opposite = "--no-use-checkpoint" if cfg.use_checkpoint else "--use-checkpoint"
    cases = [
        *accumulated(cfg.run, plain, batch, times),
        Case("checkpointed = plain", plain, [*plain, opposite]),
        Case("bfloat16 near float32", plain, [*plain, "--amp", "bf16"], NEAR),
    ]
    return prove(cfg.run, cfg.run_dir, ("learner",), cases)


def _plan(cfg: Config, own: Path | None) -> str:
    from multimodal.pairs.sources import NAMES, RANDOM, WORDS

    there = [name for name in NAMES if (cfg.data_root / name).is_dir()]
    rows, count = cfg.step_rows, world_size()
    words = "random" if cfg.pretrained in RANDOM else own or WORDS
    return (
        f"{cfg.epochs} epochs, shared {cfg.stage_epochs}, of {', '.join(there)} in "
        f"{cfg.data_root}; {rows * count} samples a step = {count} process(es) x batch "
        f"{cfg.batch_size} x accumulation {cfg.gradient_accumulation_steps}; model {cfg.model_size}"
        f", word embeddings {words}; checkpoints, logs and reports in {cfg.run_dir}"
    )


if __name__ == "__main__":
    sys.exit(launch(main))
