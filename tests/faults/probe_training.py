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
from shared.early_stopping import EarlyStopping
from shared.loader import make_loader
from shared.precision import Amp
from shared.reporter import Plan
from shared.run import Run
from shared.sampling import steps_per_epoch


class Points(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Seeded points of two classes, with augmentation that draws from all three generators."""

    def __init__(self, num_points: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(num_points, 4, generator=generator)
        self.labels = (self.points.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(4) + float(np.random.normal()) + random.random()
        return self.points[index] + 0.01 * noise, self.labels[index]


def train(cfg: Any, run_dir: Path) -> int:
    """Train the net; the exit code."""
    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    seed.seed_all(cfg.run.seed)
    data = Points(cfg.num_points)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2)).to(
        world.device
    )
    seed.seed_all(cfg.run.seed, world.rank)
    model = distributed.wrap(net, world)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.epochs)
    amp = Amp(cfg.run.amp, world.device, max_bad_steps=cfg.run.max_bad_steps)
    stopping = EarlyStopping(patience=5)
    parts = {
        "model": net,
        "optimizer": optimizer,
        "schedule": schedule,
        "amp": amp,
        "stopping": stopping,
    }
    steps = steps_per_epoch(len(data), cfg.batch_size, world.size)
    with Run(cfg, world, run_dir, Plan("probe", cfg.epochs * steps)) as run:
        position = run.restore(parts)
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
                loss = nn.functional.cross_entropy(
                    model(points.to(world.device)), labels.to(world.device)
                )
                loss = inject(cfg.fault, position.step + 1, world, loss)
                amp.backward(loss)
                norm = amp.step(optimizer, net.parameters(), clip_norm=1.0)
                time.sleep(cfg.step_ms / 1000)
                position.advance()
                run.log({"loss": loss, "grad_norm": norm})
                if run.should_stop():
                    run.save(parts)
                    return run.finish()
                if position.step % cfg.run.save_every == 0:
                    run.save(parts)
            schedule.step()
            position.next_epoch()
            run.save(parts)
        code = run.finish(
            result={"name": "loss", "before": 0.7, "after": 0.1, "higher_is_better": False}
        )
    distributed.cleanup(world)
    return code


def inject(fault: str, step: int, world: distributed.World, loss: Tensor) -> Tensor:
    """Let go wrong what `fault`, as name@step or name@step@rank, asks for; the loss to go on with."""
    name, _, where = fault.partition("@")
    at, _, rank = where.partition("@")
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if not name or step != int(at) or (rank and world.rank != int(rank)) or not first_start:
        return loss * float("nan") if name == "nan-from" and step >= int(at) else loss
    if name == "raise":
        raise ValueError(f"broken on purpose on rank {world.rank}")
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hang":
        time.sleep(3600)
    if name == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if name == "shm":
        raise RuntimeError(
            "unable to write to file </torch_1>: No space left on device (28), shared memory"
        )
    return loss * float("nan") if name in ("nan", "nan-from") else loss
