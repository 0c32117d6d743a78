"""Step 2 under the profiler: where the time of a step goes, in every process.

python multigpu_profile.py 2 1               # six steps traced, in profile/
python multigpu_profile.py 2 1 --nproc 2 --trace_dir traces
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared.config import ProcessOptions, option, parse
from shared.launch import launch

# At run time the functions import torch where they need it: --help and a typing error do not wait.
if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.profiler import profile
    from torch.utils.data import DataLoader, Dataset

    from shared.checkpoint import Position
    from shared.distributed import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """What is typed after the script's name."""

    total_epochs: int = option(None, "passes over the data", positional=True)
    save_every: int = option(None, "epochs from one checkpoint to the next", positional=True)
    batch_size: int = option(32, "samples a process and step")
    dropout: float = option(0.0, "share of the hidden units left out in a step")
    seed: int = option(0, "seed of weights, order and dropout")
    checkpoint_path: Path = option(Path("checkpoint.pt"), "where the weights go")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    profile: bool = option(True, "trace some steps")
    trace_dir: Path = option(Path("profile"), "where the traces go, one file a process")
    dry_run: bool = option(False, "check what was typed, stop")
    processes: ProcessOptions = field(default_factory=ProcessOptions)

    def __post_init__(self) -> None:
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"save_every must be 1 or more, got {self.save_every}")
        if not self.checkpoint_path.parent.is_dir():
            raise ValueError(f"checkpoint_path {self.checkpoint_path}: there is no such directory")


class Trainer:
    """A model, its data and its optimizer, and the loop that brings them together."""

    def __init__(
        self,
        model: nn.Module,
        train_data: Dataset[tuple[Tensor, Tensor]],
        optimizer: Optimizer,
        schedule: LRScheduler,
        world: World,
        cfg: Config,
        profiler: profile | None,
    ) -> None:
        from shared import distributed
        from shared.checkpoint import Position

        # DistributedDataParallel: all begin with rank 0's weights, each backward averages gradients
        self.model = distributed.wrap(model.to(world.device), world)
        self.train_data, self.optimizer, self.schedule = train_data, optimizer, schedule
        self.world, self.cfg, self.profiler = world, cfg, profiler
        self.position = Position()  # steps and epochs done
        self.loss: Tensor | float = float("nan")  # mean squared error of the last batch

    def train(self) -> int:
        """Train to the last epoch; the exit code."""
        while self.position.epoch < self.cfg.total_epochs:
            self._run_epoch()
            if self._should_save():
                self._save_checkpoint()
        return 0

    def _run_epoch(self) -> None:
        loader = prepare_dataloader(self.train_data, self.world, self.cfg, self.position)
        for source, targets in loader:
            self._run_batch(source.to(self.world.device), targets.to(self.world.device))
            self.position.advance()
            if self.profiler:
                self.profiler.step()
        self.schedule.step()
        self.position.next_epoch()
        log.info("epoch %d, step %d: loss %.6f", self.position.epoch, self.position.step, self.loss)

    def _run_batch(self, source: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = (self.model(source) - targets).square().mean()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()

    def _should_save(self) -> bool:
        epoch = self.position.epoch
        return epoch % self.cfg.save_every == 0 or epoch == self.cfg.total_epochs

    def _save_checkpoint(self) -> None:
        from shared import checkpoint, distributed

        if not self.world.is_main:
            return
        weights = distributed.unwrap(self.model).state_dict()  # names without "module."
        checkpoint.save(self.cfg.checkpoint_path, weights, keep=1)
        log.info("epoch %d: weights in %s", self.position.epoch, self.cfg.checkpoint_path)


def load_train_objs(
    cfg: Config,
) -> tuple[nn.Module, Dataset[tuple[Tensor, Tensor]], Optimizer, LRScheduler]:
    """Model, data, optimizer and schedule, as every training script has them."""
    from torch import nn, optim

    from shared.ddp_series.datautils import NUM_INPUTS, MyTrainDataset

    model = nn.Sequential(
        nn.Linear(NUM_INPUTS, 64), nn.Tanh(), nn.Dropout(cfg.dropout), nn.Linear(64, 1)
    )
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.97)
    return model, MyTrainDataset(2048), optimizer, schedule


def prepare_dataloader(
    dataset: Dataset[tuple[Tensor, Tensor]], world: World, cfg: Config, position: Position
) -> DataLoader[tuple[Tensor, Tensor]]:
    """The batches of one epoch, in an order that comes from the seed and the epoch's number."""
    from shared.loader import make_loader

    return make_loader(
        dataset,
        cfg.batch_size,
        world,
        seed=cfg.seed,
        workers=0,
        epoch=position.epoch,
    )


def make_profiler(world: World, cfg: Config) -> AbstractContextManager[profile | None]:
    """A profiler that passes over 2 steps, warms up in 2 and traces 6; None with --no-profile."""
    from torch import profiler

    def write(traced: profile) -> None:
        profiler.tensorboard_trace_handler(str(cfg.trace_dir), f"rank{world.rank}")(traced)
        table = traced.key_averages().table(sort_by="self_cpu_time_total", row_limit=8)
        log.info("traces in %s; of rank 0 in short:\n%s", cfg.trace_dir, table)

    if not cfg.profile:
        return nullcontext()
    steps = profiler.schedule(wait=2, warmup=2, active=6, repeat=1)
    activities = [profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(profiler.ProfilerActivity.CUDA)
    return profiler.profile(activities=activities, schedule=steps, on_trace_ready=write)


def main(argv: list[str] | None = None) -> int:
    """Read what was typed, train; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.dry_run:
        return 0
    from shared import distributed, seed

    world = distributed.setup(cfg.device)  # opens the process group: nccl on GPUs, gloo on CPUs
    seed.seed_all(cfg.seed, world.rank)
    with make_profiler(world, cfg) as profiler:
        code = Trainer(*load_train_objs(cfg), world, cfg, profiler).train()
    distributed.cleanup(world)
    return code


if __name__ == "__main__":
    sys.exit(launch(main))
