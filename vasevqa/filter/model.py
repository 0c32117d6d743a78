"""Train the picture-quality classifier: a ResNet-50 that tells low (0) from high (1).

python model.py                             images2/{0,1}, the settings below
python model.py --num_epochs 50 --patience 8 --amp
torchrun --nproc_per_node 4 model.py        four GPUs share BATCH_SIZE
python model.py --estimate                  the memory it takes; nothing is trained
python model.py --demo                      the built-in pictures, a small net, any machine

Writes best_image_quality_model.pth (what classifier.py loads), training_history.png and
training_results.json.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import replay, stop

if __name__ == "__main__":
    stop.listen()

from shared.config import RunOptions, free, option, parse
from shared.errors import UserError
from shared.files import open_lock, write_json
from shared.launch import launch, world_size
from shared.settings import Count, Positive, Range, Seed, Share, Workers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shared import memory
    from shared.distributed import World
    from shared.run import Run
    from vasevqa.filter.quality import History, Labelled, Learner, Measured

# --- configuration: edit here, or type the flag of the same name ----------------------------------
DEFAULT_GPU = 2
BATCH_SIZE = 256
NUM_EPOCHS = 200
DATA_DIR = "images2"
# --------------------------------------------------------------------------------------------------

FILTER = Path(__file__).resolve().parent
BEST = "best_image_quality_model.pth"
PICTURE, RESULTS = "training_history.png", "training_results.json"
PLACES = (FILTER, FILTER / "model")  # for weights that were put there by hand
DOCUMENTED_GB = 8  # what the recipe's document asks for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the training."""

    gpu: int = free(DEFAULT_GPU, "GPU for one process, if it is there")
    batch_size: Count = option(BATCH_SIZE, "pictures a step, summed over all processes")
    num_epochs: Count = option(NUM_EPOCHS, "passes over the training split", scope="length")
    data_dir: Path = free(FILTER / DATA_DIR, "folder with 0/ (low) and 1/ (high)")
    output_dir: Path = free(FILTER, "where model, picture and results go")
    arch: Literal["resnet50", "resnet34", "resnet18", "resnet10"] = option("resnet50", "network")
    image_size: Annotated[int, Range(32, 4096)] = option(224, "side of the network's input, pixels")
    pretrained: str = option(
        "auto", "weights to start from: a file; auto: ImageNet's, fetched once; none: random ones"
    )
    lr: Positive = option(1e-3, "learning rate, cosine to 0 over the epochs")
    weight_decay: float = option(1e-4, "Adam's weight decay")
    patience: Count | None = option(None, "epochs without a better validation before it stops")
    max_unreadable: Share = option(0.5, "share of unreadable files above which it stops")
    workers: Workers = free(8, "loader workers a process")
    split_seed: Seed = option(42, "of the three splits")
    gradient_checkpointing: bool = free(False, "less memory for more time")
    estimate: bool = free(False, "print the memory that the training takes, stop")
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def run_dir(self) -> Path:
        """Where checkpoints, status and metrics go."""
        return self.run.run_dir or self.output_dir / ".quality_model"

    @property
    def best(self) -> Path:
        """The trained model."""
        return self.output_dir / BEST


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.run.demo:
        from vasevqa.filter import demo

        cfg = replace(cfg, **demo.for_model(cfg.run.typed))
    if cfg.run.replay:
        options = replay.settle(cfg, cfg.run_dir)
        cfg = replace(cfg, run=options, output_dir=options.run_dir)
    if cfg.estimate:
        print(memory_of(_fitted(cfg, world_size()), world_size()))
        return 0
    _check(cfg)
    cfg = _fitted(cfg, world_size()) if cfg.run.fit else cfg
    if cfg.run.dry_run:
        print(_plan(cfg))
        return 0
    if cfg.run.prove:
        return _prove(cfg)
    os.close(open_lock(cfg.run_dir))  # better refused now than after the pictures were looked at
    from shared.memory import explained_out_of_memory

    with explained_out_of_memory(lambda: memory_of(cfg, world_size())):
        return train(cfg)


def _check(cfg: Config) -> None:
    """Refuse wrong inputs in one line each, before anything slow is imported."""
    processes = world_size()
    if cfg.batch_size % processes:
        raise UserError(
            f"--batch_size {cfg.batch_size} is for all processes together and cannot be split over "
            f"{processes}; use a multiple of {processes}, or another --nproc"
        )
    for label in ("0", "1"):
        if not (cfg.data_dir / label).is_dir():
            raise UserError(
                f"{cfg.data_dir / label} is no folder: --data_dir needs 0/ (low quality) and 1/ "
                "(high quality) with pictures"
            )
    if cfg.pretrained not in ("auto", "none") and not Path(cfg.pretrained).is_file():
        raise UserError(
            f"--pretrained {cfg.pretrained} is no file; allowed: a weight file, auto, none"
        )


def _plan(cfg: Config) -> str:
    processes = world_size()
    return (
        f"{cfg.num_epochs} epochs of {cfg.data_dir}, {cfg.batch_size} pictures a step = "
        f"{processes} process(es) x {cfg.batch_size // processes}; the model goes to {cfg.best}"
    )


def _prove(cfg: Config) -> int:
    """Hold the ways to take the same step against each other; the exit code."""
    from shared.device import present_gpus
    from shared.prove import NEAR, Case, most_processes, prove

    number, why_not = most_processes(cfg.run)
    if cfg.run.device == "cpu" or not present_gpus():
        why_not = "batch norm: on CPUs each process has its own"
    total = max(1, cfg.batch_size // number) * number
    plain = ["--amp", "off", "--no-gradient-checkpointing", "--batch_size", total]
    cases = [
        Case(f"one = {number} processes", [*plain, "--nproc", 1], [*plain, "--nproc", number],
             why_not=why_not),
        Case("whole = accumulated", why_not="batch norm ties a batch together"),
        Case("checkpointed = plain", plain, [*plain, "--gradient-checkpointing"]),
        Case("bfloat16 near float32", plain, [*plain, "--amp", "bf16"], NEAR),
    ]  # fmt: skip
    return prove(cfg.run, cfg.run_dir, ("model",), cases, ["--output_dir", "{here}"])


# --- the training ---------------------------------------------------------------------------------


def train(cfg: Config) -> int:
    """The whole training; the exit code."""
    from shared import distributed, seed
    from shared.amp import EarlyStopping, Mean
    from shared.loader import steps_per_epoch
    from shared.reporter import Plan
    from shared.run import Run
    from vasevqa.filter import quality

    device = quality.device_for(
        cfg.gpu, cfg.run.device, cfg.run.typed, world_size(), os.environ
    )  # fmt: skip
    world = distributed.setup(device, cfg.run.timeout)
    with Run(cfg, world, cfg.run_dir, "vasevqa/filter") as run:
        # data: the pictures that can be read, in three splits
        seed.seed_all(cfg.run.seed)
        found = quality.find_labelled(cfg.data_dir)
        start = quality.starting_weights(cfg.pretrained, cfg.arch, PLACES)
        good, skipped = quality.leave_out_unreadable(
            cfg.data_dir, found, world, workers=cfg.workers, allowed=cfg.max_unreadable
        )
        splits = quality.split(good, cfg.split_seed)
        varied = quality.for_training(cfg.image_size)
        pictures = quality.QualityPictures(cfg.data_dir, splits.train, varied)
        batch = _batch_size(cfg, len(splits.train), world)
        steps = steps_per_epoch(len(splits.train), batch, world.size)

        # the network and its optimizer
        net = quality.ImageQualityNet(arch=cfg.arch, again=cfg.gradient_checkpointing)
        if start:
            quality.start_from(net, start)
        log.info("starting from %s", start or "random weights, as asked")
        log.info("%d + %d pictures to train with, %d steps an epoch, %d pictures a step = %d "
                 "process(es) x %d", *splits.counts, steps, batch * world.size, world.size,
                 batch)  # fmt: skip
        plan = Plan(cfg.num_epochs * steps, batch * world.size, data=splits.sizes)
        net = _with_common_statistics(net, world).to(world.device)
        learner = quality.Learner(
            net, splits.class_weights, world, epochs=cfg.num_epochs, lr=cfg.lr,
            weight_decay=cfg.weight_decay, amp=cfg.run.amp, max_bad_steps=cfg.run.max_bad_steps,
        )  # fmt: skip
        stopping = EarlyStopping(cfg.patience or sys.maxsize)
        mean_loss, history = Mean(world), quality.History()
        parts = learner.parts | {"stopping": stopping, "mean_loss": mean_loss, "history": history}
        position = run.restore(parts, plan)
        if position.step == 0:
            history.before = _measured(cfg, run, world, net, splits.test).accuracy
            _move_best_aside(cfg, world)

        for epoch in run.epochs(cfg.num_epochs):
            if stopping.should_stop:
                break
            net.train()
            for images, labels in run.batches(pictures, batch, workers=cfg.workers):
                loss = learner.backward(images, labels)
                if run.replays:
                    run.show(net, _samples(net, images, labels, world))
                learner.amp.step(learner.optimizer, net.parameters())
                mean_loss.add(loss, len(labels))
                run.step({"loss": loss, "lr": learner.lr})
            run.save()  # a stop in the validation loses nothing
            _share_statistics(net, world)
            measured = _measured(cfg, run, world, net, splits.val, learner.class_weights)
            improved = stopping.update(1 - measured.accuracy)
            history.add(mean_loss.value(), measured, learner.lr)
            _report(cfg, run, history)
            if improved:
                _save_best(cfg, world, learner, epoch, measured.accuracy)
            learner.schedule.step()
            mean_loss.reset()
        best = quality.load_trained(cfg.best, world.device)[0] if cfg.best.exists() else net
        tested = _measured(cfg, run, world, best, splits.test)
        results = quality.results(history, tested, splits, skipped, str(start or "random weights"))
        run.finish(**_ending(cfg, world, history, tested, results))
    return run.exit_code


def _batch_size(cfg: Config, num_training: int, world: World) -> int:
    """Pictures a process and step; less than asked for when the training split is smaller."""
    wanted = cfg.batch_size // world.size
    batch = min(wanted, num_training // world.size)
    if 0 < batch < wanted:
        log.info("batch size %d instead of %d: there are %d pictures to train with",
                 batch * world.size, cfg.batch_size, num_training)  # fmt: skip
    return max(batch, 1)


def _with_common_statistics(net: Any, world: World) -> Any:
    """On several GPUs batch norm over all their pictures; torch's refuses tensors of a CPU."""
    from torch import nn

    if world.size > 1 and world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net


def _share_statistics(net: nn.Module, world: World) -> None:
    """Give every rank the running statistics of rank 0, which the checkpoint holds too."""
    import torch.distributed as dist

    if world.size > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)


def _samples(net: nn.Module, images: Tensor, labels: Tensor, world: World) -> list[replay.Sample]:
    """Each picture of this process with its loss, by the running statistics of batch norm."""
    import torch

    net.eval()
    with torch.no_grad():
        logits = net(images.to(world.device))
        losses = torch.nn.functional.cross_entropy(
            logits, labels.to(world.device), reduction="none"
        )
    rows = zip(images, labels.tolist(), losses.tolist(), strict=True)
    return [
        replay.Sample({"loss": loss}, ("low", "high")[label], replay.png(image))
        for image, label, loss in rows
    ]


def _measured(
    cfg: Config, run: Run, world: World, net: nn.Module, items: list[Labelled],
    class_weights: Tensor | None = None,
) -> Measured:  # fmt: skip
    """`net` on a split, whose pictures all processes share."""
    from shared.loader import make_eval_loader
    from vasevqa.filter import quality

    size = max(1, cfg.batch_size // world.size)
    prepare = quality.for_evaluation(cfg.image_size)
    pictures = quality.QualityPictures(cfg.data_dir, items, prepare)
    workers = cfg.workers if len(items) > size else 0
    loader = make_eval_loader(pictures, size, world, workers=workers)
    watched = run.watched(loader, f"a split of {len(items)} pictures: batch")
    return quality.measure(net, watched, world, class_weights)


# --- what it writes -------------------------------------------------------------------------------


def _report(cfg: Config, run: Run, history: History) -> None:
    """The last epoch of the history, in the metrics and the log."""
    column = history.columns
    train_loss, val_loss, accuracy = (column[n][-1] for n in ("train_loss", "val_loss", "val_acc"))
    best = max(column["val_acc"])
    run.log({"val/loss": val_loss, "val/accuracy": accuracy}, split="val")
    run.log({"val/accuracy": best}, split="best")
    log.info("epoch %d/%d | loss %.4f | validation loss %.4f, accuracy %.4f | best %.4f",
             run.position.epoch + 1, cfg.num_epochs, train_loss, val_loss, accuracy,
             best)  # fmt: skip


def _move_best_aside(cfg: Config, world: World) -> None:
    """Give the best model of an earlier run another name: this run will write its own."""
    from shared import checkpoint

    if world.is_main and cfg.best.exists():
        number = 1
        while (aside := checkpoint.previous(cfg.best, number)).exists():
            number += 1
        cfg.best.rename(aside)
        log.info("the model of an earlier run is now %s", aside)


def _save_best(cfg: Config, world: World, learner: Learner, epoch: int, accuracy: float) -> None:
    """Write what classifier.py loads."""
    from shared import checkpoint, distributed

    if world.is_main:
        state = {
            "epoch": epoch,
            "model_state_dict": learner.net.state_dict(),
            "optimizer_state_dict": learner.optimizer.state_dict(),
            "val_acc": accuracy,
            "arch": cfg.arch,
            "image_size": cfg.image_size,
        }
        with checkpoint.beside(cfg.best):
            cfg.output_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.save(cfg.best, state, keep=1)
    distributed.barrier(world)


def _ending(
    cfg: Config, world: World, history: History, tested: Measured, results: dict[str, Any]
) -> dict[str, Any]:
    """Write picture and results; what the run ends with."""
    from shared import checkpoint
    from vasevqa.filter import quality

    paths = [cfg.best, *(cfg.output_dir / name for name in (PICTURE, RESULTS))]
    if world.is_main:
        quality.draw(paths[1], history, tested)
        with checkpoint.beside(paths[2]):
            write_json(paths[2], results)
        quality.say(tested)
    return {
        "result": {
            "name": "accuracy on held-out pictures",
            "before": history.before,
            "after": tested.accuracy,
            "higher_is_better": True,
            "majority": tested.majority,
            "n": tested.count,
        },
        "outputs": [str(path) for path in paths if path.exists()],
        "reason": f"{len(history.columns['val_acc'])} epochs, the best was "
        f"{results['best_epoch']}: accuracy {results['best_val_acc']:.4f} in validation, "
        f"{tested.accuracy:.4f} on {tested.count} held-out pictures",
    }


# --- settings, memory, names ----------------------------------------------------------------------


def memory_of(cfg: Config, processes: int) -> str:
    """The memory of a step of one process as a table, the document's figure, what would help."""
    from shared import memory

    half = max(1, cfg.batch_size // 2)
    others = {
        f"--batch_size {half}": replace(cfg, batch_size=half),
        "--gradient-checkpointing": replace(cfg, gradient_checkpointing=True),
    }
    if cfg.run.amp == "off":
        others["--amp bf16"] = replace(cfg, run=replace(cfg.run, amp="bf16"))
    plans = {flag: _memory_plan(other, processes) for flag, other in others.items()}
    said = memory.report(_memory_plan(cfg, processes), plans)
    return f"{said}\nthe document's figure: at least {DOCUMENTED_GB} GB"


def _memory_plan(cfg: Config, processes: int) -> memory.Plan:
    from vasevqa.filter import quality

    batch, again = max(1, cfg.batch_size // processes), cfg.gradient_checkpointing
    return quality.memory_plan(cfg.arch, cfg.image_size, batch, processes, cfg.run.amp, again=again)


def _fitted(cfg: Config, processes: int) -> Config:
    """`cfg` with the checkpointing and precision that --fit has room for. Raises UserError."""
    from shared import fit

    ways = [{"gradient_checkpointing": again} for again in (False, True)]
    tried = ((other, _memory_plan(other, processes)) for other in fit.variants(cfg, ways))
    return fit.first(cfg, tried, "--amp auto, a smaller --batch_size", fit.AT_ONCE)


def one_process(_argv: list[str], _visible: int) -> int:
    """As documented, one GPU (DEFAULT_GPU); more by --nproc or torchrun."""
    return 1


def __getattr__(name: str) -> Any:
    """`from model import ImageQualityNet`, without torch for those who only ask for --help."""
    if name in ("ImageQualityNet", "ImageQualityPredictor"):
        from vasevqa.filter import quality

        return getattr(quality, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(launch(main, one_process))
