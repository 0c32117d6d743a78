"""Step 3 of 4: started by torchrun, and started again by it after a crash: from the snapshot.

torchrun --standalone --nproc_per_node=2 multigpu_torchrun.py 50 10
torchrun --standalone --nproc_per_node=gpu --max-restarts=3 multigpu_torchrun.py 50 10
"""

from __future__ import annotations

import logging
import sys
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
    from torch.utils.data import DataLoader, Dataset

    from shared.checkpoint import Parts, Position
    from shared.distributed import World

log = logging.getLogger(__name__)
STOP_EVERY = 10  # steps from one look at the stop signal to the next: a look waits for the GPU


@dataclass(frozen=True)
class Config:
    """What is typed after the script's name."""

    total_epochs: int = option(None, "passes over the data", positional=True)
    save_every: int = option(None, "epochs from one checkpoint to the next", positional=True)
    batch_size: int = option(32, "samples a process and step")
    dropout: float = option(0.0, "share of the hidden units left out in a step")
    seed: int = option(0, "seed of weights, order and dropout")
    snapshot_path: Path = option(Path("snapshot.pt"), "what the training continues from")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dry_run: bool = option(False, "check what was typed, stop")
    processes: ProcessOptions = field(default_factory=ProcessOptions)

    def __post_init__(self) -> None:
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"save_every must be 1 or more, got {self.save_every}")
        if not self.snapshot_path.parent.is_dir():
            raise ValueError(f"snapshot_path {self.snapshot_path}: there is no such directory")


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
    ) -> None:
        from shared import distributed
        from shared.checkpoint import Position
        from shared.signals import StopRequest

        # DistributedDataParallel: all begin with rank 0's weights, each backward averages gradients
        self.model = distributed.wrap(model.to(world.device), world)
        self.train_data, self.optimizer, self.schedule = train_data, optimizer, schedule
        self.world, self.cfg = world, cfg
        self.position = Position()  # steps and epochs done
        self.loss: Tensor | float = float("nan")  # mean squared error of the last batch
        self.parts: Parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        self.stop, self.stopped_by = StopRequest(), 0
        self._load_snapshot()

    def train(self) -> int:
        """Train to the last epoch, or until asked to stop; the exit code: 0, 130 or 143."""
        from shared.signals import exit_code_for

        self.stop.install()
        while self.position.epoch < self.cfg.total_epochs and not self.stopped_by:
            self._run_epoch()
            if self._should_save() or self.stopped_by:
                self._save_snapshot()
        self.stop.remove()
        return exit_code_for(self.stopped_by) if self.stopped_by else 0

    def _run_epoch(self) -> None:
        loader = prepare_dataloader(self.train_data, self.world, self.cfg, self.position)
        for source, targets in loader:
            if self._should_stop():
                return
            self._run_batch(source.to(self.world.device), targets.to(self.world.device))
            self.position.advance()
        self.schedule.step()
        self.position.next_epoch()
        log.info("epoch %d, step %d: loss %.6f", self.position.epoch, self.position.step, self.loss)

    def _run_batch(self, source: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = (self.model(source) - targets).square().mean()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()

    def _should_stop(self) -> bool:
        """Whether any process was asked to stop; all of them hear it at the same step."""
        from shared import distributed

        if self.position.step % STOP_EVERY == 0:
            self.stopped_by = distributed.largest(self.stop.number, self.world)
        return self.stopped_by != 0

    def _should_save(self) -> bool:
        epoch = self.position.epoch
        return epoch % self.cfg.save_every == 0 or epoch == self.cfg.total_epochs

    def _save_snapshot(self) -> None:
        from shared import checkpoint, distributed, seed

        generators = distributed.gather_objects(seed.get_state(), self.world)
        snapshot = checkpoint.snapshot(self.parts, self.position, generators)
        snapshot["samples_a_step"] = self.cfg.batch_size * self.world.size
        if self.world.is_main:
            checkpoint.save(self.cfg.snapshot_path, snapshot)
        distributed.barrier(self.world)  # once one process has left, torchrun ends the others
        log.info("%s saved at %s", self.cfg.snapshot_path, self.position)

    def _load_snapshot(self) -> None:
        from shared import checkpoint, seed

        path = self.cfg.snapshot_path
        found = checkpoint.find(path, explicit=False) if path.exists() else None
        if found is None:
            return
        path, snapshot = found
        checkpoint.load_parts(self.parts, snapshot.get("parts", {}), path)
        self.position = checkpoint.Position(**snapshot["position"])
        # steps of another size go on at the same sample, but no longer as the same run to the bit
        samples = self.position.batch * snapshot["samples_a_step"]
        self.position.batch = samples // (self.cfg.batch_size * self.world.size)
        if self.world.rank < len(snapshot["generators"]):
            seed.set_state(snapshot["generators"][self.world.rank])
        log.info("%s loaded: %s, up to epoch %d", path, self.position, self.cfg.total_epochs)


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
        offset=position.batch,  # batches of this epoch that the snapshot has seen
    )


def main(argv: list[str] | None = None) -> int:
    """Read what was typed, train; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.dry_run:
        return 0
    from shared import distributed, seed

    # a process that hangs for 300 s ends the group, and torchrun starts it again
    world = distributed.setup(cfg.device, timeout=300.0)
    seed.seed_all(cfg.seed, world.rank)
    code = Trainer(*load_train_objs(cfg), world, cfg).train()
    distributed.cleanup(world)
    return code


if __name__ == "__main__":
    sys.exit(launch(main))
