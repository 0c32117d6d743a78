"""Sort pictures by the trained quality classifier: images3/0 (low) and images3/1 (high).

python classifier.py                              images/ → images3/, the settings below
python classifier.py --threshold 0.8 --link       only what is surely good; links, no copies
torchrun --nproc_per_node 4 classifier.py         four processes share the files
python classifier.py --demo                       the built-in pictures, after model.py --demo

Relative paths are kept. What cannot be read goes to images3/quarantine/, with the reason in
classification_report.csv and .json; the pictures of --source_dir stay as they are.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ProcessOptions, ToolOptions, option, parse
from shared.errors import UserError
from shared.files import open_lock
from shared.launch import launch, world_size
from shared.settings import Count, Seconds, Share, Workers

# --- configuration: edit here, or type the flag of the same name ----------------------------------
DEFAULT_GPU = 2
MODEL_PATH = "best_image_quality_model.pth"
SOURCE_DIR = "images"
TARGET_DIR = "images3"
BATCH_SIZE = 32
CONFIDENCE_THRESHOLD = 0.5
# --------------------------------------------------------------------------------------------------

FILTER = Path(__file__).resolve().parent
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
    from vasevqa.filter import gpu_wish
    from vasevqa.filter.sorting import sort_pictures

    device = gpu_wish.device_for(
        cfg.gpu, cfg.tool.device, cfg.tool.typed, world_size(), os.environ
    )  # fmt: skip
    return sort_pictures(cfg, device)


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


def one_process(_argv: list[str], _visible: int) -> int:
    """As documented, one GPU (DEFAULT_GPU); more by --nproc or torchrun."""
    return 1


if __name__ == "__main__":
    sys.exit(launch(main, one_process))
