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

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import RunOptions, free, option, parse
from shared.errors import UserError
from shared.files import open_lock
from shared.launch import launch, world_size
from shared.settings import Count, Positive, Range, Seed, Share, Workers

# --- configuration: edit here, or type the flag of the same name ----------------------------------
DEFAULT_GPU = 2
BATCH_SIZE = 256
NUM_EPOCHS = 200
DATA_DIR = "images2"
# --------------------------------------------------------------------------------------------------

FILTER = Path(__file__).resolve().parent
BEST = "best_image_quality_model.pth"


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
    if cfg.estimate:
        from vasevqa.filter import quality_memory

        print(quality_memory.text(cfg, world_size()))
        return 0
    _check(cfg)
    if cfg.run.dry_run:
        print(_plan(cfg))
        return 0
    os.close(open_lock(cfg.run_dir))  # better refused now than after the pictures were looked at
    from shared.memory import explained_out_of_memory
    from vasevqa.filter import gpu_wish, quality_memory
    from vasevqa.filter.quality_training import train

    device = gpu_wish.device_for(
        cfg.gpu, cfg.run.device, cfg.run.typed, world_size(), os.environ
    )  # fmt: skip
    with explained_out_of_memory(lambda: quality_memory.text(cfg, world_size())):
        return train(cfg, device)


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


def one_process(_argv: list[str], _visible: int) -> int:
    """As documented, one GPU (DEFAULT_GPU); more by --nproc or torchrun."""
    return 1


def __getattr__(name: str) -> Any:
    """`from model import ImageQualityNet`, without torch for those who only ask for --help."""
    if name in ("ImageQualityNet", "ImageQualityPredictor"):
        from vasevqa.filter import predictor, quality_net

        return {
            "ImageQualityNet": quality_net.ImageQualityNet,
            "ImageQualityPredictor": predictor.ImageQualityPredictor,
        }[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(launch(main, one_process))
