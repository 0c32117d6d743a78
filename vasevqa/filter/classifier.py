"""Sort pictures by the trained quality classifier: images3/0 (low) and images3/1 (high).

python classifier.py                              images/ → images3/, the settings below
python classifier.py --threshold 0.8 --link       only what is surely good; links, no copies
torchrun --nproc_per_node 4 classifier.py         four processes share the files
python classifier.py --demo                       the built-in pictures, after model.py --demo

Relative paths are kept. What cannot be read goes to images3/quarantine/, with the reason in
classification_report.csv and .json; the pictures of --source_dir stay as they are.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ProcessOptions, ToolOptions, option, parse
from shared.errors import UserError
from shared.files import open_lock, open_regular, write_atomic
from shared.launch import launch, world_size
from shared.settings import Count, Seconds, Share, Workers

if TYPE_CHECKING:
    from vasevqa.filter.place import Table
    from vasevqa.filter.scores import Pass

# --- configuration: edit here, or type the flag of the same name ----------------------------------
DEFAULT_GPU = 2
MODEL_PATH = "best_image_quality_model.pth"
SOURCE_DIR = "images"
TARGET_DIR = "images3"
BATCH_SIZE = 32
CONFIDENCE_THRESHOLD = 0.5
# --------------------------------------------------------------------------------------------------

FILTER = Path(__file__).resolve().parent
HIGH, LOW = "1", "0"
OLD_NAME = "best_image_quality_model2.pth"  # what earlier trainings wrote


@dataclass(frozen=True)
class Config:
    """Settings of the sorting."""

    gpu: int = option(DEFAULT_GPU, "GPU for one process, if it is there")
    model_path: Path = option(FILTER / MODEL_PATH, "what model.py wrote")
    source_dir: Path = option(FILTER / SOURCE_DIR, "folder of pictures, any depth")
    target_dir: Path = option(FILTER / TARGET_DIR, "where 0/, 1/ and quarantine/ go")
    batch_size: Count = option(BATCH_SIZE, "pictures at a time")
    threshold: Share = option(
        CONFIDENCE_THRESHOLD, "probability of high quality from which a picture is 1",
        aliases=("--confidence-threshold",),
    )  # fmt: skip
    link: bool = option(False, "symbolic links in place of copies")
    workers: Workers = option(4, "processes that decode pictures, for each process")
    max_unreadable: Share = option(0.5, "share of unreadable files above which the run stops")
    resume: Literal["auto", "never"] = option(
        "auto", "auto: use the results that are there; never: classify again", const="auto"
    )
    run_dir: Path | None = option(None, "status and results; default: <target_dir>/.classifier")
    timeout: Seconds = option(3600.0, "seconds one process waits for another")
    tool: ToolOptions = field(default_factory=ToolOptions)
    processes: ProcessOptions = field(default_factory=ProcessOptions)

    @property
    def state_dir(self) -> Path:
        """Where status, results and lock are."""
        return self.run_dir or self.target_dir / ".classifier"


def main(argv: list[str] | None = None) -> int:
    """Check the input, then sort; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.tool.demo:
        from vasevqa.filter import demo

        cfg = replace(cfg, **demo.for_classifier(cfg.tool.typed))
    cfg = replace(cfg, model_path=_model_at(cfg))
    _check(cfg)
    if cfg.tool.dry_run:
        from shared.images import find_images

        print(f"{len(find_images(cfg.source_dir))} pictures of {cfg.source_dir} → {cfg.target_dir}")
        return 0
    os.close(open_lock(cfg.state_dir))  # better refused now than after the model was loaded
    return sort_pictures(cfg)


def _model_at(cfg: Config) -> Path:
    """The model's file; one under the name of earlier trainings when no other is there."""
    old = cfg.model_path.with_name(OLD_NAME)
    untouched = "model_path" not in cfg.tool.typed
    return old if untouched and not cfg.model_path.exists() and old.exists() else cfg.model_path


def _check(cfg: Config) -> None:
    """Refuse missing inputs in one line each, before anything slow is imported."""
    if not cfg.model_path.is_file():
        raise UserError(
            f"{cfg.model_path} is missing: train it with python model.py, or type --model_path PATH"
        )
    if not cfg.source_dir.is_dir():
        raise UserError(f"--source_dir {cfg.source_dir} is not a folder: give that of the pictures")
    if cfg.target_dir.resolve().is_relative_to(cfg.source_dir.resolve()):
        raise UserError(
            f"--target_dir {cfg.target_dir} lies inside --source_dir {cfg.source_dir}: its "
            "pictures would be sorted again; choose a folder beside it"
        )


# --- the sorting ----------------------------------------------------------------------------------


def sort_pictures(cfg: Config) -> int:
    """The whole sorting; the exit code."""
    import torch

    from shared import distributed
    from vasevqa.filter import quality, scores

    device = quality.device_for(
        cfg.gpu, cfg.tool.device, cfg.tool.typed, world_size(), os.environ
    )  # fmt: skip
    world = distributed.setup(device, cfg.timeout)
    names = scores.list_pictures(cfg.source_dir)
    with scores.Pass(cfg.state_dir, cfg, world) as run:
        predictor = quality.ImageQualityPredictor(cfg.model_path, world.device)
        with open_regular(cfg.model_path) as stream:
            run.open_scores(hashlib.file_digest(stream, "sha256").hexdigest())
        for batch in run.batches(
            cfg.source_dir, names, predictor.prepare, cfg.batch_size, workers=cfg.workers
        ):
            pixels = [file.pixels for file in batch if file.pixels is not None]
            highs = iter(predictor.probabilities(torch.stack(pixels)).tolist() if pixels else [])
            run.add(
                file.item.row
                | ({"problem": file.problem} if file.problem else {"score": next(highs)})
                for file in batch
            )
        is_stopped, ending = run.meet(), {}
        if not is_stopped:
            ending = _place(cfg, run, names) if world.is_main else {}
            is_stopped = run.meet()
        code = run.finish(**({} if is_stopped else ending))
    distributed.cleanup(world)
    return code


def _place(cfg: Config, run: Pass, names: list[str]) -> dict[str, Any]:
    """Decide, bring the files to their folders, report; what the run ends with."""
    from vasevqa.filter.place import QUARANTINE, Folders

    table = run.table(cfg.source_dir, names)
    table.decide(cfg.threshold, HIGH, LOW)
    table.refuse_mostly_unreadable(cfg.max_unreadable, "sorted")
    if not run.place(
        Folders(cfg.source_dir, cfg.target_dir, (LOW, HIGH, QUARANTINE), cfg.link), table
    ):
        return {}
    high, low, unreadable = map(table.count, (HIGH, LOW, QUARANTINE))
    head = {
        "source_directory": str(cfg.source_dir),
        "target_directory": str(cfg.target_dir),
        "model": str(cfg.model_path),
        "threshold": cfg.threshold,
        "total_images": len(table),
        "high_quality_images": high,
        "low_quality_images": low,
        "unreadable_images": unreadable,
        "processing_time_seconds": run.seconds,
    }
    return {
        "reason": f"{high} of {len(table)} pictures are of high quality, {low} of low, "
        f"{unreadable} unreadable",
        "outputs": _report(cfg.target_dir, head, table),
        "data": {"high quality": high, "low quality": low, "unreadable": unreadable},
    }


def _report(folder: Path, head: dict[str, Any], table: Table) -> list[Path]:
    """classification_report.json and .csv, row after row."""
    from vasevqa.filter.place import write_report

    def write(stream: Any) -> None:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, ["filename", "label", "probability_high", "reason"])
        writer.writeheader()
        writer.writerows(_results(table))
        text.flush()
        text.detach()  # the stream stays open: its owner closes it

    paths = [folder / f"classification_report.{kind}" for kind in ("json", "csv")]
    write_report(paths[0], head, _results(table))
    write_atomic(paths[1], write)
    return paths


def _results(table: Table) -> Iterator[dict[str, Any]]:
    for row, place in zip(table.rows(), table.places, strict=True):
        yield {
            "filename": row["filename"],
            "label": None if "problem" in row else int(place),
            "probability_high": row.get("score"),
            "reason": row.get("problem", ""),
        }


def one_process(_argv: list[str], _visible: int) -> int:
    """As documented, one GPU (DEFAULT_GPU); more by --nproc or torchrun."""
    return 1


if __name__ == "__main__":
    sys.exit(launch(main, one_process))
