"""The probe's data, model and loop, and the faults that can be switched on in it."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shared import distributed, seed
from shared.amp import Amp, EarlyStopping
from shared.checkpoint import Parts
from shared.distributed import World
from shared.loader import steps_per_epoch
from shared.reporter import Plan
from shared.run import Run


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


class Repeated(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """`count` times the first point."""

    def __init__(self, points: Points, count: int) -> None:
        self._points, self._count = points, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._points[0]


def train(cfg: Any, run_dir: Path) -> int:
    """Train the net; the exit code."""
    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    with Run(cfg, world, run_dir, "probe") as run:
        seed.seed_all(cfg.run.seed)
        data = Points(cfg.num_points, cfg.augment)
        net = nn.Sequential(
            nn.Linear(4, cfg.width), nn.ReLU(), nn.Dropout(cfg.dropout), nn.Linear(cfg.width, 2)
        ).to(world.device)
        seed.seed_all(cfg.run.seed, world.rank)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs)
        amp = Amp(cfg.run.amp, world.device, max_bad_steps=cfg.run.max_bad_steps)
        stopping = EarlyStopping(cfg.patience or cfg.epochs)
        parts: Parts = {"model": net, "optimizer": optimizer, "schedule": schedule, "amp": amp,
                        "stopping": stopping}  # fmt: skip
        inject(cfg, 0, world, torch.zeros(()))
        steps = steps_per_epoch(len(data), cfg.batch_size, world.size)
        run.restore(parts, Plan(cfg.epochs * steps))
        model, loss = distributed.wrap(net, world), torch.zeros(())
        for epoch in run.epochs(cfg.epochs):
            if stopping.should_stop:
                break
            for points, labels in run.batches(data, cfg.batch_size, workers=cfg.workers):
                logits = model(points.to(world.device))
                loss = nn.functional.cross_entropy(logits, labels.to(world.device))
                loss = inject(cfg, run.position.step + 1, world, loss)
                amp.backward(loss)
                norm = amp.step(optimizer, model.parameters(), clip_norm=1.0)
                time.sleep(cfg.step_ms / 1000)
                run.step({"loss": loss, "grad_norm": norm})
            schedule.step()
            stopping.update(monitored(cfg.fault, epoch, world, loss))
        judge(cfg, world, run, data)
        early = f"stopped early after epoch {run.position.epoch}" if stopping.should_stop else ""
        result = {"name": "loss", "before": 0.7, "after": 0.1, "higher_is_better": False}
        run.finish(result=None if early else result, reason=early)
    return run.exit_code


def judge(cfg: Any, world: World, run: Run, data: Points) -> None:
    """An evaluation of `judge_batches` batches on rank 0, half of them on the others."""
    count = cfg.judge_batches // (world.rank + 1)
    for _ in run.watched(DataLoader(Repeated(data, count)), "evaluation"):  # type: ignore[arg-type]
        time.sleep(0.05)


def monitored(fault: str, epoch: int, world: World, loss: Tensor) -> float:
    """The epoch's value for early stopping; `worse@epoch@rank` lets one rank's grow from there."""
    value = loss.detach()
    for name, at, rank in faults(fault):
        if name == "worse" and epoch >= at and rank == world.rank:
            value = value * 0 + 1000.0 * epoch
    return float(distributed.mean(value, world))


def inject(cfg: Any, step: int, world: World, loss: Tensor) -> Tensor:
    """Let go wrong what `--fault` asks for at this step (0: before the run); the loss after it."""
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    for name, at, rank in faults(cfg.fault):
        here = rank in (None, world.rank)
        if here and name == "nan-from" and step >= at:
            loss = loss * float("nan")
        elif here and step == at and name in ("full", "free"):
            fill_disk(cfg.run.run_dir.parent, is_full=name == "full")
        elif here and step == at and first_start:
            loss = loss * float("nan") if name == "nan" else break_down(name, world, loss)
    return loss


def fill_disk(disk: Path, is_full: bool) -> None:
    """Leave no byte free on the file system of a directory, or free them again."""
    ballast = disk / "ballast"
    if not is_full:
        ballast.unlink()
        return
    with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(65536))


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
