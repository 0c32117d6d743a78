"""The extraction of extract_teacher.py: what it asks of the teacher, and its loop."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from face_distill import teacher_parts
from face_distill.distill.teacher_networks import Teacher, open_teacher, spatial_probability
from face_distill.FaceDataset import FaceDataset
from face_distill.teacher_parts import Parts
from shared import distributed, outcome
from shared.distributed import World
from shared.errors import DONE, UserError
from shared.loader import make_eval_loader
from shared.precision import Amp
from shared.progress import Progress
from shared.signals import StopRequest, exit_code_for, name_of
from shared.status import Status

if TYPE_CHECKING:
    from face_distill.extract_teacher import Config

log = logging.getLogger(__name__)

Rows = tuple[np.ndarray, np.ndarray]


def extract(cfg: Config) -> int:
    """Write the teacher's features of the selected faces; the exit code."""
    world = distributed.setup(cfg.tool.device)
    faces = FaceDataset(cfg.data_root, cfg.selection, cfg.limit or None, cfg.per_id, cache=False)
    teacher = open_teacher(cfg.weights_source, cfg.arch, cfg.image_size)
    reader = Reader(cfg, teacher, faces, world.device)
    stop = StopRequest()
    stop.install()
    try:
        with teacher_parts.locked(cfg.out) if world.is_main else nullcontext():
            code = _extract(cfg, world, reader, stop)
    finally:
        stop.remove()
    distributed.cleanup(world)
    return code


def _extract(cfg: Config, world: World, reader: Reader, stop: StopRequest) -> int:
    plan = distributed.broadcast_object(describe(cfg, reader) if world.is_main else {}, world)
    parts = Parts(cfg.out, plan)
    todo = distributed.broadcast_object(parts.begin() if world.is_main else None, world)
    report = _Report(world, parts, todo or [])
    if todo is None:
        return report.conclude("extracted before; nothing to do", DONE)
    mine = todo[world.rank :: world.size]
    finished = reader.read(parts, mine, cfg, stop)
    # One part a rank and round: after it all ranks learn whether one of them was asked to stop.
    for _ in range(-(-len(todo) // world.size)):
        for number, rows in itertools.islice(finished, 1):
            parts.write(number, *rows)
        stopped_by = distributed.largest(stop.number, world)
        report.show()
        if stopped_by:
            return report.conclude_stopped(stopped_by)
    if world.is_main:
        parts.assemble(reader.faces.labels)
        log.info("next: %s", _next_step(cfg))
    return report.conclude(report.summary(), DONE)


class Reader:
    """Reads faces and asks the teacher: rows of its files, with maps of the kind of `cfg`."""

    def __init__(
        self, cfg: Config, teacher: Teacher, faces: FaceDataset, device: torch.device
    ) -> None:
        self.teacher, self.faces, self.device = teacher.to(device), faces, device
        self.amp = Amp(cfg.tool.amp, device)
        self._kind, self._temperature = cfg.map, cfg.temperature

    def rows(self, images: Tensor) -> Rows:
        """Embeddings (B, D) and maps of uint8 faces (B, 3, H, W), float32.

        Raises UserError for maps that are no square. On CUDA convolutions are repeatable and in
        full float32: TensorFloat-32, cuDNN's default, rounds factors to three digits.
        """
        exact = torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        )
        with exact, self.amp.autocast():
            embeddings, maps = self.teacher(images.to(self.device, non_blocking=True))
        if maps.shape[-1] != maps.shape[-2]:
            raise UserError(
                f"{self.teacher.weights_file} gives maps of {maps.shape[-2]} x {maps.shape[-1]} "
                "places: training reads squares"
            )
        if self._kind == "probability":
            maps = spatial_probability(maps, self._temperature)
        return embeddings.cpu().numpy(), maps.cpu().numpy()

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of one embedding and of one map, found with the first face."""
        embeddings, maps = self.rows(self.faces.images([0]))
        return embeddings.shape[1:], maps.shape[1:]

    def read(
        self, parts: Parts, numbers: list[int], cfg: Config, stop: StopRequest
    ) -> Iterator[tuple[int, Rows]]:
        """(number, rows) of these parts; ends after a batch when asked to stop.

        Raises UserError for an image that cannot be read, and for NaN or infinity.
        """
        batches = iter(self._loader(parts, numbers, cfg))
        for number in numbers:
            found: list[Rows] = []
            for _ in range(-(-len(parts.rows(number)) // cfg.batch_size)):
                if stop.number:
                    return
                images, _labels, indices = next(batches)
                found.append(self.rows(images))
                self._check(found[-1], indices)
            embeddings, maps = (np.concatenate(column) for column in zip(*found, strict=True))
            yield number, (embeddings, maps)

    def _loader(self, parts: Parts, numbers: list[int], cfg: Config) -> DataLoader[Any]:
        # Every part but the very last is whole batches, so no batch spans two parts, and a row's
        # batch is the same whoever computes it.
        rows = [row for number in numbers for row in parts.rows(number)]
        alone = World(device=self.device)  # the rows are this rank's share already
        return make_eval_loader(
            Subset(self.faces, rows), cfg.batch_size, alone, workers=cfg.workers
        )

    def _check(self, rows: Rows, indices: Tensor) -> None:
        whole = [np.isfinite(part.reshape(len(part), -1)).all(axis=1) for part in rows]
        bad = np.flatnonzero(~(whole[0] & whole[1]))
        if bad.size:
            row = int(indices[bad[0]])
            raise UserError(
                f"the teacher gives NaN or infinity for row {row} (key {self.faces.keys[row]} of "
                f"{self.faces.root}): try --amp off, or look at the weights"
            )


def describe(cfg: Config, reader: Reader) -> dict[str, Any]:
    """What decides about the numbers: the content of manifest.json, plain JSON values."""
    teacher, faces = reader.teacher, reader.faces
    embedding_shape, map_shape = reader.shapes()
    wanted = teacher.preprocessing
    with teacher.weights_file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "schema": 1,
        "teacher": teacher.arch,
        "weights": teacher.weights_file.name,
        "weights_sha256": digest,
        "selection": cfg.selection,
        "selection_sha256": faces.selection_sha256(),
        "limit": len(faces),
        "per_id": cfg.per_id if cfg.selection == "per_id" else None,
        "num_images": len(faces),
        "image_size": wanted.image_size,
        "resize": "bicubic, antialias",
        "colours": "RGB",
        "mean": list(wanted.mean),
        "std": list(wanted.std),
        "embedding_shape": list(embedding_shape),
        "map": cfg.map,
        "map_shape": list(map_shape),
        "temperature": cfg.temperature if cfg.map == "probability" else None,
        "amp": reader.amp.mode,
        "batch_size": cfg.batch_size,
        "device": reader.device.type,
    }


def _next_step(cfg: Config) -> str:
    chosen = f" --selection per_id --per-id {cfg.per_id}" if cfg.selection == "per_id" else ""
    return f"train_distill.py --data-root {cfg.data_root} --teacher-feat-dir {cfg.out}{chosen}"


class _Report:
    """What rank 0 tells of an extraction: progress, status.json, how it ended."""

    def __init__(self, world: World, parts: Parts, todo: list[int]) -> None:
        self._world, self._parts, self._todo = world, parts, todo
        self._began, self._done = time.monotonic(), len(parts) - len(todo)
        outcome.announce(parts.out)
        self._progress: Progress | None = None
        if not world.is_main:
            return
        self._status = Status(
            parts.out,
            recipe="face_distill",
            pid=outcome.launcher_pid(),
            world_size=world.size,
            total_steps=len(parts),
        )
        self._status.write(step=self._done)
        self._progress = Progress(len(parts), self._done, parts.rows_each)
        if self._done and todo:
            log.info("continuing: %d of %d parts are there", self._done, len(parts))

    def show(self) -> None:
        """Report one more round."""
        self._done = min(self._done + self._world.size, len(self._parts))
        if self._progress:
            self._progress.show(self._done, 0, {})
            if self._status.is_due:
                self._status.write(step=self._done, eta_s=self._progress.eta_s(self._done))

    def summary(self) -> str:
        """What was extracted, and how fast."""
        images = sum(len(self._parts.rows(number)) for number in self._todo)
        speed = images / max(time.monotonic() - self._began, 1e-9)
        maps = " x ".join(str(size) for size in self._parts.shapes["map"])
        return (
            f"{self._parts.num_rows} embeddings of {self._parts.shapes['embedding'][0]} numbers "
            f"and maps of {maps} in {self._parts.out}, {speed:.4g} images/s"
        )

    def conclude_stopped(self, number: int) -> int:
        """Close the status of an extraction that a signal ended; the exit code."""
        kept = len(self._parts) - len(self._parts.missing())
        reason = f"{name_of(number)}: {kept} of {len(self._parts)} parts are kept"
        return self.conclude(f"{reason}; the same command continues", exit_code_for(number))

    def conclude(self, reason: str, code: int) -> int:
        """Close the status; returns `code`, on every rank when the files are whole."""
        if self._progress:
            self._progress.close()
            state = "done" if code == DONE else "stopped"
            self._status.write(state=state, exit_code=code, reason=reason, step=self._done)
        distributed.barrier(self._world)
        return code
