"""What classifier.py does: probabilities for all pictures, a decision, its report."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shared import distributed, images
from shared.distributed import World
from shared.errors import one_line
from shared.files import write_atomic
from shared.loader import make_eval_loader
from vasevqa.filter import rows
from vasevqa.filter.filter_report import write_stream
from vasevqa.filter.job import Job
from vasevqa.filter.ledger import QUARANTINE, Ledger
from vasevqa.filter.placing import Folders
from vasevqa.filter.predictor import ImageQualityPredictor
from vasevqa.filter.rows import Item, Parts, Row, file_identity, line_of
from vasevqa.filter.scoring import list_pictures

if TYPE_CHECKING:
    from vasevqa.filter.classifier import Config

log = logging.getLogger(__name__)

HIGH, LOW = "1", "0"
FOLDERS = (LOW, HIGH, QUARANTINE)
_CHUNK = 4096  # files for which one set of loader workers lives


def sort_pictures(cfg: Config, device: str) -> int:
    """Sort; the exit code."""
    world = distributed.setup(device, cfg.timeout)
    began = time.monotonic()
    names = list_pictures(cfg.source_dir)
    with Job(cfg.state_dir, cfg, world) as job:
        predictor = ImageQualityPredictor(cfg.model_path, world.device)
        parts = Parts(cfg.state_dir / f"results-{file_identity(cfg.model_path)}", world)
        _classify(cfg, job, predictor, parts, names)
        code = job.finish() if job.meet() else _decide(cfg, world, job, parts, names, began)
    distributed.cleanup(world)
    return code


def _classify(
    cfg: Config, job: Job, predictor: ImageQualityPredictor, parts: Parts, names: list[str]
) -> None:
    """Add a row for each of this rank's files that has none; leaves when asked to stop."""
    pending = parts.pending(cfg.source_dir, names)
    job.begin("classifying", len(pending))
    with parts.open() as lines:
        for batch in _batches(cfg, predictor, pending):
            pixels = [pixels for _, pixels, _ in batch if pixels is not None]
            highs = iter(predictor.probabilities(torch.stack(pixels)).tolist() if pixels else [])
            for item, prepared, problem in batch:
                row: Row = {"filename": item.name, "size": item.size, "mtime_ns": item.mtime_ns}
                found = {"problem": problem} if prepared is None else {"score": next(highs)}
                lines.write(line_of(row | found))
            lines.flush()
            job.advance(len(batch))
            if job.asked_to_stop:
                return


Prepared = tuple[Item, Tensor | None, str]  # file, pixels (3, S, S) or None, and then the reason


def _batches(
    cfg: Config, predictor: ImageQualityPredictor, pending: list[Item]
) -> Iterator[list[Prepared]]:
    for start in range(0, len(pending), _CHUNK):
        chunk = pending[start : start + _CHUNK]
        few = len(chunk) <= 2 * cfg.batch_size  # workers would start for longer than they help
        yield from make_eval_loader(
            _Pictures(cfg.source_dir, chunk, predictor),
            cfg.batch_size,
            World(device=predictor.device),
            workers=0 if few else cfg.workers,
            collate=list,
        )


class _Pictures(Dataset[Prepared]):
    """Files as the net takes them."""

    def __init__(self, root: Path, items: list[Item], predictor: ImageQualityPredictor) -> None:
        self._root, self._items, self._prepare = root, items, predictor.prepare

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Prepared:
        item = self._items[index]
        try:
            return item, self._prepare(images.read_rgb(self._root / item.name)), ""
        except ValueError as error:
            return item, None, one_line(error)


def _decide(
    cfg: Config, world: World, job: Job, parts: Parts, names: list[str], began: float
) -> int:
    """Decide on rank 0, bring the files on all, report on rank 0."""
    database = cfg.state_dir / "decision.db"
    folders = Folders(cfg.source_dir, cfg.target_dir, FOLDERS, cfg.link)
    if world.is_main:
        present = rows.keys_of(cfg.source_dir, names)
        with Ledger.build(database, parts, present) as ledger:
            ledger.decide(HIGH, LOW, cfg.threshold)
            ledger.refuse_mostly_unreadable(cfg.max_unreadable, "sorted")
    distributed.barrier(world)
    with Ledger(database) as ledger:
        if folders.place_share(ledger, job, world) or not world.is_main:
            return job.finish()
        folders.move_strays(ledger, cfg.state_dir / "aside")
        outputs = _report(cfg, ledger, time.monotonic() - began)
        counts = ledger.counts()
    return job.finish(
        f"{counts.get(HIGH, 0)} of {sum(counts.values())} pictures are of high quality, "
        f"{counts.get(LOW, 0)} of low, {counts.get(QUARANTINE, 0)} unreadable",
        outputs=[str(path) for path in outputs],
        data={"high quality": counts.get(HIGH, 0), "low quality": counts.get(LOW, 0),
              "unreadable": counts.get(QUARANTINE, 0)},
    )  # fmt: skip


def _report(cfg: Config, ledger: Ledger, seconds: float) -> list[Path]:
    """classification_report.json and .csv, row after row."""
    paths = [cfg.target_dir / f"classification_report.{kind}" for kind in ("json", "csv")]
    counts = ledger.counts()
    head: dict[str, Any] = {
        "source_directory": str(cfg.source_dir),
        "target_directory": str(cfg.target_dir),
        "model": str(cfg.model_path),
        "threshold": cfg.threshold,
        "total_images": len(ledger),
        "high_quality_images": counts.get(HIGH, 0),
        "low_quality_images": counts.get(LOW, 0),
        "unreadable_images": counts.get(QUARANTINE, 0),
        "processing_time_seconds": seconds,
    }
    write_stream(paths[0], head, map(_result, ledger.rows()))
    write_atomic(paths[1], lambda stream: _write_csv(stream, ledger))
    return paths


def _result(row: Row) -> dict[str, Any]:
    probability = row.get("score")
    label = None if probability is None else int(row["place"])
    return {
        "filename": row["filename"],
        "label": label,
        "probability_high": probability,
        "reason": row.get("problem", ""),
    }


def _write_csv(stream: Any, ledger: Ledger) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, ["filename", "label", "probability_high", "reason"])
    writer.writeheader()
    writer.writerows(map(_result, ledger.rows()))
    text.flush()
    text.detach()  # the stream stays open: its owner closes it
