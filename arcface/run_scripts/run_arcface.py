r"""Train an ArcFace image retriever on DeepFashion In-shop.

python run_scripts/run_arcface.py --launcher pytorch --nproc-per-node 4 \
    --config config/arcface/resnet50-arcface_8xb32_inshop.py --data-root DIR
python run_scripts/run_arcface.py --data-root DIR              In-shop, or <class>/<image>
python run_scripts/run_arcface.py --cfg-options train_cfg.max_epochs=10 …
python run_scripts/run_arcface.py --config … --resume          continue the run in its work dir
python run_scripts/run_arcface.py --demo                       built-in data, on any machine
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import logs, replay
from shared.config import ProcessOptions, RunOptions, dashed, free, option, parse, parse_known
from shared.device import present_gpus, visible_gpus
from shared.errors import UserError
from shared.files import open_lock
from shared.launch import launch, world_size

if TYPE_CHECKING:  # torch comes after the input is checked
    from torch import Tensor

    from arcface.inshop_retrieval.encoders import Encoder, Preprocess
    from arcface.inshop_retrieval.evaluation import Outcome, Split
    from arcface.inshop_retrieval.inshop import InShop
    from arcface.inshop_retrieval.partial_fc import PartialFC
    from arcface.inshop_retrieval.recipe import Recipe, Settings
    from shared.amp import Amp
    from shared.distributed import World
    from shared.run import Run

RECIPE = Path(__file__).resolve().parents[1]
CONFIG = "config/arcface/resnet50-arcface_8xb32_inshop.py"
DEMO_CONFIG = "config/arcface/resnet18-arcface_demo.py"
_SHOWN = 5  # settings that differ, in one message

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the command line; those of the training are in the configuration file."""

    config: str | None = option(
        None, f"configuration file, looked up here, then in arcface/; default: {CONFIG}"
    )
    cfg_options: tuple[str, ...] = option(
        (), "key=value pairs over the file, as train_cfg.max_epochs=10"
    )
    data_root: Path | None = option(None, "inshop, or <class>/<image>, for every data set at once")
    run_dir: Path | None = free(
        None,
        "where everything goes; default: arcface/work_dirs/<configuration's name>",
        aliases=("--work-dir",),
    )
    launcher: Literal["pytorch", "none", "slurm"] = free(
        "pytorch",
        "pytorch: a process a GPU, started here; none: one process; slurm: started by srun",
    )
    validate: bool = free(True, "queries against the gallery after epochs")
    auto_scale_lr: bool = option(
        False, "scale the learning rate by the total batch size (auto_scale_lr.enable=True)"
    )
    init: Literal["pretrained", "random"] = option(
        "pretrained", "the encoder's weights to begin with: init_cfg's, or none"
    )
    gradient_checkpointing: bool = free(False, "less memory for the encoder, more time")
    strict_cfg: bool = free(False, "refuse unknown settings in place of naming them")
    pin_memory: bool = free(True, "accepted; memory is pinned where there is a GPU")
    persistent_workers: bool = free(True, "accepted; loader workers start with each epoch")
    estimate: bool = free(False, "print how much memory a process needs, stop")
    run: RunOptions = field(default_factory=lambda: RunOptions(resume="never"))


@dataclass(frozen=True)
class RunSettings:
    """What config.json keeps of a run; the first three make it the same run or another.

    changed: dotted key → the file's value, of what options changed (None: not in the file).
    """

    recipe: str = option("", "digest of the settings that decide the numbers")
    init: str = option("pretrained", "what the encoder started from")
    epochs: int = option(0, "passes over the training pictures", scope="length")
    gradient_checkpointing: bool = free(False, "whether activations were computed again")
    configuration: dict[str, Any] = field(default_factory=dict, metadata={"scope": "free"})
    changed: dict[str, Any] = field(default_factory=dict, metadata={"scope": "free"})
    run: RunOptions = field(default_factory=RunOptions)

    def departures(self) -> dict[str, Any]:
        """What options changed in the configuration, with the file's values."""
        flags = {} if self.init == "pretrained" else {"init": "pretrained"}
        return flags | {f"configuration.{name}": value for name, value in self.changed.items()}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    cfg = parse(Config, words, __doc__)
    _check_launcher(cfg)
    if cfg.estimate:
        print(_estimate(cfg))
        return 0
    if cfg.run.demo:
        cfg = _with_demo(cfg)
    settings = _settings(cfg)
    recipe = settings.recipe
    if recipe.resume and "resume" not in cfg.run.typed:
        way = ["--resume", recipe.load_from or "auto"]
        return main([*words, *way, "--cfg-options", "resume=False", "load_from=None"])
    cfg = _with_file(cfg, recipe)
    if cfg.run.replay:
        options = replay.settle(_stored(cfg, settings), _run_dir(cfg))
        cfg = replace(cfg, run=options, run_dir=options.run_dir)
    remarks = _check_data(cfg, recipe)
    for remark in [*settings.remarks, *(remarks if cfg.run.dry_run else ())]:
        log.warning(remark)  # a run makes those of the data when it opens the lists
    _say_changes(cfg, recipe)
    if cfg.run.fit:
        from arcface import memory

        cfg = memory.fitted(cfg, recipe, world_size())
    if cfg.run.dry_run:
        print(_plan(cfg, recipe))
        return 0
    if cfg.run.prove:
        return _prove(cfg, recipe)
    os.close(open_lock(_run_dir(cfg)))  # better refused now than after torch was loaded
    from shared.memory import explained_out_of_memory

    with explained_out_of_memory(lambda: _memory(cfg, recipe)):
        return train(cfg, settings)


def train(cfg: Config, settings: Settings) -> int:
    """The whole training; the exit code."""
    from torch import nn

    from arcface.inshop_retrieval import encoders, epochs, evaluation, schedule
    from arcface.inshop_retrieval.inshop import collate
    from arcface.inshop_retrieval.partial_fc import CentreRows
    from shared import checkpoint, distributed
    from shared.loader import steps_per_epoch
    from shared.reporter import Plan
    from shared.run import Run

    recipe, run_dir = settings.recipe, _run_dir(cfg)
    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    with Run(_stored(cfg, settings), world, run_dir, "arcface") as run:
        _settle_torch(cfg, recipe, world)
        # data: pictures to train on, queries and gallery
        pictures = evaluation.open_split(recipe.train, cfg.run.seed).dataset
        test = [evaluation.open_split(part, cfg.run.seed)
                for part in (recipe.query, recipe.gallery) if cfg.validate]  # fmt: skip
        steps = steps_per_epoch(len(pictures), recipe.train.batch_size, world.size)
        batch_size = recipe.train.batch_size * world.size
        preprocess = encoders.Preprocess(recipe.mean, recipe.std).to(world.device)

        # the model: an encoder, and ArcFace's class centres; sharded ones stay outside DDP
        encoder = _encoder(cfg, recipe, pictures, world)
        head = build_head(recipe, _margins(recipe, pictures), world, cfg.run.seed)
        _load_from(cfg, recipe, encoder, head)
        _describe(recipe, world, pictures, encoder, head)
        lr = recipe.lr_for(batch_size)
        optimizer, head_optimizer = schedule.build_optimizers(recipe, encoder.backbone, head, lr)
        rows = CentreRows(head, head_optimizer) if head_optimizer else None
        embed = encoders.wrap(encoder, world)
        arcface = head if rows else encoders.wrap(head, world)
        factor = schedule.learning_rate_factor(recipe.schedule, steps, lr)
        rate = schedule.LearningRate([optimizer, *filter(None, [head_optimizer])], factor)

        amp, statistics = _amp(cfg, recipe, world), encoders.RankBuffers(encoder, world)
        record, files = epochs.Record(), epochs.EpochFiles(run_dir, recipe.keep, recipe.best)
        lines = epochs.TrainLines(recipe.log_interval, steps, recipe.epochs, world)
        parts = {"encoder": encoder, "optimizer": optimizer, "statistics": statistics,
                 "head": rows or head, "amp": amp, "record": record}  # fmt: skip
        score = partial(evaluation.evaluate, encoder, preprocess, *test, world,
                        autocast=amp.autocast if recipe.val_amp else amp.full_precision,
                        recall_at=recipe.depths("Recall"), map_at=recipe.depths("mAP"),
                        run=run)  # fmt: skip
        plan = Plan(recipe.epochs * steps, batch_size, lines=False, data=_counts(pictures, test))
        position = run.restore(parts, plan)
        checkpoint.collect(parts)
        weights = partial(encoders.weights_of, encoder, rows or head)
        if distributed.broadcast_object(
            world.is_main and files.settle(position, record, weights), world
        ):
            record.forget_best()
        if test and recipe.val_before_train and position.step == 0:
            record.before = _validated(run, score())

        for epoch in run.epochs(recipe.epochs):
            embed.train()
            arcface.train()
            lines.restart()
            for batch in run.batches(pictures, recipe.train.batch_size, collate=collate,
                                     workers=recipe.train.workers):  # fmt: skip
                lines.batch_arrived()
                images, labels, flipped = batch.on(world.device)
                lr = rate.set(position.step)
                if rows:
                    rows.sample(labels, position.step)
                with amp.autocast():
                    loss = arcface(embed(preprocess(images, flipped)), labels)
                amp.backward(loss)
                if run.replays:
                    shown = nn.ModuleDict({"encoder": encoder, "head": head})
                    run.show(shown, _samples(embed, arcface, preprocess, batch, pictures, world))
                loss = loss.detach()  # its graph must not outlive the sampled centres
                amp.step(optimizer, schedule.parameters(optimizer), clip_norm=recipe.largest_norm,
                         sharded=(head_optimizer, world) if head_optimizer else None)  # fmt: skip
                lines.step_done(position, loss, lr)
                run.step({"loss": loss, "lr": lr})

            is_validated = bool(test) and recipe.is_validated(epoch + 1)
            if is_validated:
                run.save()  # a stop in the validation loses nothing
            statistics.average()
            if is_validated:
                metrics = _validated(run, score())
                if record.update(metrics, epoch + 1, recipe.best):
                    run.log(epochs.in_percent(metrics), split="best")
            run.end_epoch()
            state = run.state()
            if world.is_main and recipe.is_saved(position.epoch):
                files.write_epoch(position, state)
            if world.is_main and record.best_epoch == position.epoch:
                files.write_best(record, weights)
        result = record.result(evaluation.by_chance(*test))
        run.finish(result=result, outputs=[str(path) for path in files.all()])
    return run.exit_code


# --- what the training is built from --------------------------------------------------------------


def build_head(recipe: Recipe, margins: Tensor, world: World, seed: int) -> PartialFC:
    """ArcFace's class centres on the device; sharded, or sampled, those of this rank.

    margins: radians, (C,) or one for all.
    """
    from arcface.inshop_retrieval.partial_fc import PartialFC
    from shared.distributed import World

    return PartialFC(
        recipe.num_classes, recipe.in_channels,
        world if recipe.is_sharded else World(device=world.device),
        margins=margins, scale=recipe.scale, easy_margin=recipe.easy_margin,
        sub_centres=recipe.sub_centres, sample_rate=recipe.sample_rate,
        init_std=(3 * recipe.in_channels) ** -0.5,  # as a linear layer's: how fast lr turns them
        seed=seed,
    ).to(world.device)  # fmt: skip


def _margins(recipe: Recipe, pictures: InShop) -> Tensor:
    """The margins of all classes, (C,) or one: given, or by how often each class occurs."""
    import torch

    from shared.margins import adaptive_margins

    if recipe.adaptive is None:
        return torch.tensor(recipe.margins, dtype=torch.float64)
    counts = torch.bincount(pictures.labels, minlength=recipe.num_classes)
    return adaptive_margins(counts, *recipe.adaptive)


def _encoder(cfg: Config, recipe: Recipe, pictures: InShop, world: World) -> Encoder:
    """The encoder on its device with the weights to begin from, the same on every rank."""
    import torch

    from arcface.inshop_retrieval import encoders

    # a run that continues takes its weights from its own checkpoint, wherever the first came from
    init = "random" if cfg.run.is_explicit_resume else cfg.init
    encoder = encoders.build_encoder(recipe.encoder, init)
    size = (pictures.pipeline.height, pictures.pipeline.width)
    if encoder.image_size not in (None, size):
        raise UserError(
            f"train_dataloader.dataset.pipeline gives pictures of {size[0]} x {size[1]}, the "
            f"encoder needs {encoder.image_size[0]} x {encoder.image_size[1]}: change the crop_size"
        )
    if encoder.dim != recipe.in_channels:
        raise UserError(
            f"model.head.in_channels is {recipe.in_channels}, the encoder gives {encoder.dim}"
        )
    if recipe.sync_bn and world.size > 1:
        if world.device.type != "cuda":
            raise UserError("sync_bn works on GPUs alone: leave it out, or use one process")
        encoder.backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder.backbone)
    if cfg.gradient_checkpointing:
        encoders.checkpoint_activations(encoder)
    return encoder.to(world.device).to(memory_format=torch.channels_last)


def _load_from(cfg: Config, recipe: Recipe, encoder: Encoder, head: PartialFC) -> None:
    from arcface.inshop_retrieval import encoders

    if recipe.load_from and not cfg.run.is_explicit_resume:
        path = encoders.located(recipe.load_from)
        encoders.load_weights(encoder, None if recipe.is_sharded else head, path)


def _amp(cfg: Config, recipe: Recipe, world: World) -> Amp:
    from shared.amp import Amp

    amp = Amp(cfg.run.amp, world.device, max_bad_steps=cfg.run.max_bad_steps)
    if amp.mode == "fp16" and recipe.is_sharded:
        raise UserError(
            "a sharded or sampled head does not go with fp16's scaled gradients: use --amp bf16 or "
            "off, or leave out model.head.shard and sample_rate"
        )
    return amp


def _settle_torch(cfg: Config, recipe: Recipe, world: World) -> None:
    """Seeds, and how torch works on this device."""
    import torch

    from shared import seed
    from shared.device import keep_freed_memory

    seed.seed_all(cfg.run.seed)
    torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    if world.device.type == "cpu":
        keep_freed_memory()


# --- what the log and the report say --------------------------------------------------------------


def _samples(
    embed: Any, arcface: Any, preprocess: Preprocess, batch: Any, pictures: InShop, world: World
) -> list[replay.Sample]:
    """Each picture of this process with its loss, the batch's statistics in its embedding."""
    import torch

    images, labels, flipped = batch.on(world.device)
    samples = []
    with torch.no_grad():
        embeddings = embed(preprocess(images, flipped))
        for row, index in enumerate(batch.indices.tolist()):
            one = slice(row, row + 1)
            losses = {"ArcFace": float(arcface(embeddings[one], labels[one]))}
            name = f"{pictures.items[index]}: {pictures.names[index]}"
            samples.append(replay.Sample(losses, name, replay.png(images[row])))
    return samples


def _describe(
    recipe: Recipe, world: World, pictures: InShop, encoder: Encoder, head: PartialFC
) -> None:
    batch_size = recipe.train.batch_size
    log.info(
        "%d pictures of %d items | %d a step = %d process(es) x %d | lr %.4g | %.1f M parameters",
        len(pictures), pictures.num_classes, batch_size * world.size, world.size, batch_size,
        recipe.lr_for(batch_size * world.size),
        sum(p.numel() for part in (encoder, head) for p in part.parameters()) / 1e6,
    )  # fmt: skip


def _counts(pictures: InShop, test: list[Split]) -> dict[str, int]:
    """What there is, for the report."""
    found = {"training pictures": len(pictures), "items": pictures.num_classes}
    for name, split in zip(("queries", "gallery pictures"), test, strict=False):
        found[name] = len(split.dataset)
    return found


def _validated(run: Run, outcome: Outcome) -> dict[str, float]:
    """The figures of a validation, logged."""
    from arcface.inshop_retrieval import epochs

    epoch = run.position.epoch + (run.position.step > 0)
    waited, seconds = outcome.waited, outcome.seconds
    line = epochs.val_line(epoch, outcome.batches, outcome.metrics, waited=waited, seconds=seconds)
    log.info(line)
    run.log(epochs.in_percent(outcome.metrics), split="val")
    return outcome.metrics


def _prove(cfg: Config, recipe: Recipe) -> int:
    """Hold the ways to take the same step against each other; the exit code."""
    from shared.prove import NEAR, Case, most_processes, prove

    number, why_not = most_processes(cfg.run)
    if recipe.sample_rate < 1:
        why_not = "each process samples its own classes"
    own, size = max(1, recipe.train.batch_size // number), "train_dataloader.batch_size"
    is_resnet = recipe.encoder[0].get("type") == "ResNet"
    frozen = ["model.image_encoder.0.norm_eval=True"] if is_resnet else []
    plain = ["--amp", "off", "--no-gradient-checkpointing", "--cfg-options", *frozen]
    whole, part = [*plain, f"{size}={number * own}"], [*plain, f"{size}={own}"]
    cases = [
        Case(f"one = {number} processes", [*whole, "--nproc", 1], [*part, "--nproc", number],
             why_not=why_not),
        Case("whole = accumulated", why_not="batch norm ties a batch together"),
        Case("checkpointed = plain", whole, [*whole, "--gradient-checkpointing"]),
        Case("bfloat16 near float32", whole, [*whole, "--amp", "bf16"], NEAR),
    ]  # fmt: skip
    return prove(cfg.run, _run_dir(cfg), ("encoder", "head"), cases, ["--no-validate"])


def _plan(cfg: Config, recipe: Recipe) -> str:
    processes, batch_size = world_size(), recipe.train.batch_size
    total = batch_size * processes
    return (
        f"{recipe.epochs} epochs of {recipe.train.root}, {total} pictures a step = {processes} "
        f"process(es) x {batch_size}, learning rate {recipe.lr_for(total):g}; everything goes to "
        f"{_run_dir(cfg)}"
    )


# --- settings -------------------------------------------------------------------------------------


def _check_launcher(cfg: Config) -> None:
    if cfg.launcher == "slurm" and "RANK" not in os.environ:
        raise UserError(
            "--launcher slurm is for processes that srun started (SLURM_PROCID is not set): type "
            "srun python run_scripts/run_arcface.py …, or leave --launcher out"
        )
    if cfg.launcher == "none" and cfg.run.processes.nnodes > 1:
        raise UserError("--launcher none is one process: leave out --nnodes, or --launcher none")


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the built-in data: its configuration and paths where none were typed."""
    from arcface.demo_data import inshop_tree

    root = RECIPE / "demo"
    paths = inshop_tree.build(root)
    names_data = cfg.data_root or any(".data_root=" in text for text in cfg.cfg_options)
    config = cfg.config or DEMO_CONFIG
    return replace(
        cfg,
        config=config,
        data_root=cfg.data_root if names_data else paths.data_root,
        run_dir=cfg.run_dir or root / "runs" / Path(config).stem,
    )


def _estimate(cfg: Config) -> str:
    """How much memory the configured training takes; its data need not be there."""
    from arcface import memory
    from arcface.inshop_retrieval import recipe as recipes
    from arcface.inshop_retrieval.config import find_config, read_config

    file = find_config(cfg.config or (DEMO_CONFIG if cfg.run.demo else CONFIG), Path.cwd())
    over = recipes.Overrides(cfg.cfg_options)
    recipe = recipes.without_data(read_config(file), over, Path.cwd()).recipe
    amp = cfg.run.amp if "amp" in cfg.run.typed else recipe.amp or cfg.run.amp
    cfg = replace(cfg, run=replace(cfg.run, amp=amp))
    return _memory(memory.fitted(cfg, recipe, world_size()), recipe)


def _memory(cfg: Config, recipe: Recipe) -> str:
    from arcface import memory

    again = cfg.gradient_checkpointing
    return memory.text(recipe, cfg.run.amp, world_size(), again=again)


def _settings(cfg: Config) -> Settings:
    """The checked recipe; of an explicit --resume PATH the run's own, unless a file is typed."""
    from arcface.inshop_retrieval import recipe
    from arcface.inshop_retrieval.config import find_config, read_config

    is_stored = cfg.run.is_explicit_resume and not (cfg.config and "config" in cfg.run.typed)
    over = recipe.Overrides(
        cfg.cfg_options, cfg.data_root, cfg.auto_scale_lr, cfg.strict_cfg, cfg.run.seed, is_stored
    )
    if is_stored:
        configuration = recipe.stored_configuration(_directory_of(cfg.run.resume))
    else:
        configuration = read_config(find_config(cfg.config or CONFIG, Path.cwd()))
    return recipe.settle(configuration, over, Path.cwd())


def _directory_of(checkpoint: str) -> Path:
    """The run directory of a checkpoint, or the directory itself."""
    path = Path(checkpoint)
    return path if path.is_dir() else path.parent


def _with_file(cfg: Config, recipe: Recipe) -> Config:
    """`cfg` with the configuration's directory, seed, precision and interval where untyped."""
    changes: dict[str, Any] = {}
    if "log_every" not in cfg.run.typed:
        changes["log_every"] = recipe.log_interval
    if not cfg.run.is_explicit_resume:  # which has taken them from the run
        if "seed" not in cfg.run.typed and recipe.seed is not None:
            changes["seed"] = recipe.seed
        if "amp" not in cfg.run.typed and recipe.amp:
            changes["amp"] = recipe.amp
    run_dir = cfg.run_dir or (Path(recipe.work_dir).absolute() if recipe.work_dir else None)
    return replace(cfg, run_dir=run_dir, run=replace(cfg.run, **changes))


def _run_dir(cfg: Config) -> Path:
    return cfg.run_dir or RECIPE / "work_dirs" / Path(cfg.config or CONFIG).stem


def _stored(cfg: Config, settings: Settings) -> RunSettings:
    """What config.json keeps."""
    from arcface.inshop_retrieval.recipe import deciding

    text = json.dumps(deciding(settings.recipe), sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return RunSettings(
        digest, cfg.init, settings.recipe.epochs, cfg.gradient_checkpointing,
        settings.configuration, settings.changed, cfg.run,
    )  # fmt: skip


def _check_data(cfg: Config, recipe: Recipe) -> list[str]:
    """A remark for each oddity of the lists of pictures. Raises UserError for what is wrong.

    Lists, pipelines, learning rates and paths of weights are looked at before torch is loaded.
    """
    from arcface.inshop_retrieval import inshop, schedule
    from arcface.inshop_retrieval.recipe import check_data

    parts = {"train_dataloader": recipe.train, "val_dataloader": recipe.query,
             "model.prototype": recipe.gallery}  # fmt: skip
    remarks = check_data(parts, cfg.run.seed)
    train = inshop.read(recipe.train.root, recipe.train.ann_file, cfg.run.seed)
    _check_classes(recipe, len({picture.item for picture in train.split(recipe.train.split)}))
    schedule.learning_rate_factor(recipe.schedule, 1, recipe.lr)
    if not cfg.run.is_explicit_resume:  # which takes its weights from the checkpoint
        recipe.check_weights(is_random=cfg.init == "random")
    return remarks


def _check_classes(recipe: Recipe, found: int) -> None:
    if found > recipe.num_classes:
        raise UserError(
            f"model.head.num_classes is {recipe.num_classes}, the training pictures show {found} "
            f"items; type --cfg-options model.head.num_classes={found}"
        )
    if recipe.is_sharded and recipe.num_classes < world_size():
        raise UserError(
            f"{recipe.num_classes} classes cannot be sharded over {world_size()} processes: use "
            "fewer, or leave out model.head.shard and sample_rate"
        )


def _say_changes(cfg: Config, recipe: Recipe) -> None:
    """What is not as in the run there. Raises UserError where an explicit resume needs it equal."""
    from arcface.inshop_retrieval.recipe import changes

    if cfg.run.is_explicit_resume:
        changed = changes(_directory_of(cfg.run.resume), recipe)
        if changed:
            more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise UserError(
                f"--resume {cfg.run.resume} cannot continue with {'; '.join(changed[:_SHOWN])}"
                f"{more}; leave these settings as they were, or start anew without --resume"
            )
    elif cfg.run.resume in ("auto", "latest") and (_run_dir(cfg) / "config.json").is_file():
        for change in changes(_run_dir(cfg), recipe):
            log.info("not as in the run there: %s", change)


# --- how many processes ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """What decides how the processes are started."""

    launcher: str = option("pytorch", "")
    device: str = option("auto", "")
    demo: bool = option(False, "")
    processes: ProcessOptions = field(default_factory=ProcessOptions)


def start() -> int:
    """Settle how many processes there are, then run `main` in them; the exit code."""
    argv = dashed(sys.argv[1:])
    sys.argv[1:] = settle_processes(argv, os.environ)
    return launch(main, processes_that_fit)


def settle_processes(argv: list[str], environ: MutableMapping[str, str]) -> list[str]:
    """`argv` with a number of processes that can be had; under srun `environ` is set in its place.

    --nproc-per-node, which the documents give for their machines, is lowered to the visible GPUs;
    --nproc, typed for this machine, is left to the launcher to check.
    """
    try:
        flags = parse_known(_Start, argv)
    except UserError:
        return argv  # the launcher says what is wrong with it
    if flags.launcher == "slurm":
        _take_over_from_slurm(flags.processes, environ)
    if "RANK" in environ or any(flag in argv for flag in ("-h", "--help")):
        return argv
    wanted = flags.processes.nproc
    if flags.launcher == "none":
        possible, why = 1, "--launcher none is one process"
    else:
        visible = 0 if flags.device == "cpu" else visible_gpus(environ, present_gpus())
        possible, why = max(1, visible), f"{visible or 'no'} GPU(s) are visible"
        if not any(word.partition("=")[0] == "--nproc-per-node" for word in argv):
            return argv
    if wanted is not None and wanted > possible:
        logs.say(
            f"warning: {wanted} processes were asked for, {why}: going on with {possible}; the "
            "learning rate follows where auto_scale_lr is on"
        )
    elif flags.launcher != "none":
        return argv
    return [*argv, "--nproc", str(min(possible, wanted or possible))]


def _take_over_from_slurm(flags: ProcessOptions, environ: MutableMapping[str, str]) -> None:
    """Set torchrun's variables from those of srun; nothing without them."""
    if "SLURM_PROCID" not in environ:
        return
    local = int(environ.get("SLURM_LOCALID", 0))
    visible = visible_gpus(environ, present_gpus())
    one_each = visible == 1  # srun --gpus-per-task=1 shows each process its own GPU as number 0
    job = environ.get("SLURM_JOB_ID", "0")
    port = 10_000 + int(job) % 20_000 if job.isdigit() else 29_500
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ.get("SLURM_NTASKS", "1")
    environ["LOCAL_RANK"] = "0" if one_each else str(local)
    environ["MASTER_ADDR"] = flags.master_addr or _first_host(environ)
    environ["MASTER_PORT"] = str(flags.master_port or environ.get("MASTER_PORT") or port)


def _first_host(environ: Mapping[str, str]) -> str:
    """The name or address of the job's first host."""
    command = ["scontrol", "show", "hostnames", environ.get("SLURM_JOB_NODELIST", "")]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return hosts.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")


def processes_that_fit(argv: list[str], visible: int) -> int:
    """Every visible GPU; one for the demo, whose batches are few."""
    return 1 if parse_known(_Start, argv).demo else visible


if __name__ == "__main__":
    sys.exit(start())
