"""The probe's data, model and loop, and the faults that can be switched on in it."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared import distributed, seed
from shared.checkpoint import Parts
from shared.distributed import World
from shared.early_stopping import EarlyStopping
from shared.loader import make_loader
from shared.precision import Amp
from shared.reporter import Plan
from shared.run import Run
from shared.sampling import steps_per_epoch


class Points(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Seeded points of two classes, with augmentation that draws from all three generators."""

    def __init__(self, num_points: int, augment: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(num_points, 4, generator=generator)
        self.labels = (self.points.sum(1) > 0).long()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(4) + float(np.random.normal()) + random.random()
        return self.points[index] + 0.01 * noise * self.augment, self.labels[index]


def train(cfg: Any, run_dir: Path) -> int:
    """Train the net; the exit code."""
    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    with Run(cfg, world, run_dir, "probe") as run:
        code = build_and_fit(cfg, world, run)
    distributed.cleanup(world)
    return code


def build_and_fit(cfg: Any, world: World, run: Run) -> int:
    """Build what is trained, then train it; the exit code."""
    seed.seed_all(cfg.run.seed)
    data = Points(cfg.num_points, cfg.augment)
    net = nn.Sequential(
        nn.Linear(4, cfg.width), nn.ReLU(), nn.Dropout(cfg.dropout), nn.Linear(cfg.width, 2)
    ).to(world.device)
    seed.seed_all(cfg.run.seed, world.rank)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    parts: Parts = {
        "model": net,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs),
        "amp": Amp(cfg.run.amp, world.device, max_bad_steps=cfg.run.max_bad_steps),
        "stopping": EarlyStopping(cfg.patience or cfg.epochs),
    }
    inject(cfg.fault, 0, world, torch.zeros(()))
    steps = steps_per_epoch(len(data), cfg.batch_size, world.size)
    return fit(cfg, world, data, parts, (run, Plan(cfg.epochs * steps)))


def fit(cfg: Any, world: World, data: Points, parts: Parts, begun: tuple[Run, Plan]) -> int:
    """The loop; the exit code."""
    model: Any = distributed.wrap(parts["model"], world)  # type: ignore[arg-type]
    optimizer: Any = parts["optimizer"]
    schedule: Any = parts["schedule"]
    amp: Any = parts["amp"]
    stopping: Any = parts["stopping"]
    run, plan = begun
    position, loss = run.restore(parts, plan), torch.zeros(())
    while position.epoch < cfg.epochs:
        loader = make_loader(
            data,
            cfg.batch_size,
            world,
            seed=cfg.run.seed,
            workers=cfg.workers,
            epoch=position.epoch,
            offset=position.batch,
        )
        for points, labels in loader:
            logits = model(points.to(world.device))
            loss = nn.functional.cross_entropy(logits, labels.to(world.device))
            loss = inject(cfg.fault, position.step + 1, world, loss)
            amp.backward(loss)
            norm = amp.step(optimizer, model.parameters(), clip_norm=1.0)
            time.sleep(cfg.step_ms / 1000)
            position.advance()
            run.log({"loss": loss, "grad_norm": norm})
            if run.should_stop():
                run.save(parts)
                return run.finish()
            if position.step % cfg.run.save_every == 0:
                run.save(parts)
        schedule.step()
        stopping.update(monitored(cfg.fault, position.epoch, world, loss))
        position.next_epoch()
        run.save(parts)
        if stopping.should_stop:
            return run.finish(reason=f"stopped early after epoch {position.epoch}")
    return run.finish(
        result={"name": "loss", "before": 0.7, "after": 0.1, "higher_is_better": False}
    )


def monitored(fault: str, epoch: int, world: World, loss: Tensor) -> float:
    """The epoch's value for early stopping; `worse@epoch@rank` lets one rank's grow from there."""
    value = loss.detach()
    for name, at, rank in faults(fault):
        if name == "worse" and epoch >= at and rank == world.rank:
            value = value * 0 + 1000.0 * epoch
    return float(distributed.mean(value, world))


def inject(fault: str, step: int, world: World, loss: Tensor) -> Tensor:
    """Let go wrong what `fault` asks for at this step (0: before the run); the loss after it."""
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    for name, at, rank in faults(fault):
        here = rank in (None, world.rank)
        if here and name == "nan-from" and step >= at:
            loss = loss * float("nan")
        elif here and step == at and first_start:
            loss = loss * float("nan") if name == "nan" else break_down(name, world, loss)
    return loss


def break_down(name: str, world: World, loss: Tensor) -> Tensor:
    """Carry out the fault `name`; `loss` when the process lives on."""
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
    errors = {
        "raise": ValueError(f"broken on purpose on rank {world.rank}"),
        "oom": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "shm": RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"),
        "package": ModuleNotFoundError("No module named 'not_there'", name="not_there"),
        "leave": SystemExit(0),
    }
    if name in signals:
        os.kill(os.getpid(), signals[name])
    if name in errors:
        raise errors[name]
    if name == "hang":
        time.sleep(3600)
    return loss


def faults(text: str) -> list[tuple[str, int, int | None]]:
    """name@step or name@step@rank, several with commas, as their parts; rank None: every rank."""
    parts = [(fault + "@@").split("@")[:3] for fault in text.split(",") if fault]
    return [(name, int(at or 0), int(rank) if rank else None) for name, at, rank in parts]
