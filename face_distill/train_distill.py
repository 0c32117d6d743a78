"""Distil a face teacher into adapters on BLIP-2's frozen vision tower.

python train_distill.py                          every visible GPU, one process each
python train_distill.py --batch-size 64          half the images a step
torchrun --nproc_per_node=4 train_distill.py     the same on four GPUs, said explicitly
python train_distill.py --demo                   built-in data, on any machine
"""

import math
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared.config import RunOptions, option, parse
from shared.errors import UserError
from shared.files import open_lock
from shared.launch import launch, world_size
from shared.settings import (
    COUNTS,
    Count,
    Positive,
    Range,
    ShareBelowOne,
    Workers,
    number,
)

# --- configuration: edit here, or type the flag of the same name ----------------------------------
PROJECT_ROOT = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120, as documented

BLIP_PATH = os.path.join(PROJECT_ROOT, "blip2_weights")  # noqa: PTH118
DATA_ROOT = os.path.join(PROJECT_ROOT, "datasets", "faces_emore")  # noqa: PTH118
TEACHER_FEAT_DIR = os.path.join(PROJECT_ROOT, "teacher_features_12k")  # noqa: PTH118

BATCH_SIZE = 128
EPOCHS = 100
LR = 5e-4
LAMBDA_AT = 1000.0
LAMBDA_RKD = 1.0
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Settings of the distillation."""

    blip_path: Path = option(Path(BLIP_PATH), "BLIP-2 checkpoint directory", scope="free")
    data_root: Path = option(Path(DATA_ROOT), "faces_emore, or <identity>/<image>", scope="free")
    teacher_feat_dir: Path = option(
        Path(TEACHER_FEAT_DIR), "teacher_embedding.npy and teacher_feat_map.npy", scope="free"
    )
    batch_size: Count = option(BATCH_SIZE, "images a step, summed over all processes")
    epochs: Count = option(EPOCHS, "passes over the images", scope="length")
    lr: Positive = option(LR, "learning rate, cosine to 0 over the epochs")
    weight_decay: float = option(1e-4, "AdamW's weight decay")
    lambda_arc: float = option(1.0, "weight of the ArcFace loss")
    lambda_at: float = option(LAMBDA_AT, "weight of the attention transfer")
    lambda_rkd: float = option(LAMBDA_RKD, "weight of the relational distillation")
    rkd_angle_weight: float = option(0.0, "weight of RKD's angles beside its distances")
    rkd_norm: Literal["offdiag", "all"] = option("offdiag", "pairs in the mean distance of RKD")
    at_mode: Literal["auto", "kl_energy", "zagoruyko", "kl_minmax"] = option(
        "auto", "attention transfer; auto: kl_energy for probability maps, zagoruyko for features"
    )
    arc_margin: Annotated[float, Range(0, 1.57)] = option(0.5, "ArcFace's angular margin, radians")
    arc_scale: Positive = option(64.0, "ArcFace's scale")
    num_classes: str = option("auto", "identities of the ArcFace head; auto: those selected")
    warmup_epochs: int = option(1, "first epochs with ArcFace alone")
    patience: Count = option(5, "epochs without a lower loss before the run stops")
    val_fraction: ShareBelowOne = option(
        0.0, "share of the images held out for the validation loss"
    )
    selection: Literal["first_n", "per_id"] = option("first_n", "which images: see README")
    per_id: Count = option(20, "images of each identity with --selection per_id")
    adapter_layers: str = option("spread:12", "layers with adapters: spread:N or last:N")
    image_size: Annotated[int, Range(32, 4096)] | None = option(
        None, "side of the tower's input; default: the tower's own"
    )
    clip_norm: Positive | None = option(None, "largest norm of the gradients; default: any")
    gradient_checkpointing: bool = option(False, "less memory for more time", scope="free")
    full_checkpoint: bool = option(False, "save the whole student, tower included", scope="free")
    cache: bool = option(True, "decode every image once, into shared memory", scope="free")
    workers: Workers = option(4, "loader workers a process", scope="free")
    verify: Path | None = option(None, "pairs (lfw.bin …) to verify before and after", scope="free")
    log_dir: Path | None = option(
        None, "TensorBoard; default logs/adapter_face_distill", scope="free"
    )
    estimate: bool = option(False, "print how much memory a process needs, stop", scope="free")
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        if self.num_classes != "auto":
            number("num_classes (auto or a number)", self.num_classes, int, COUNTS)

    @property
    def largest_norm(self) -> float:
        """To which the gradients are shortened."""
        return self.clip_norm or math.inf

    @property
    def run_dir(self) -> Path:
        """Where checkpoints, status and metrics go."""
        return self.run.run_dir or Path(PROJECT_ROOT) / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Where TensorBoard's events go: as documented, or beside a run directory of the user's."""
        beside = self.run_dir.parent if self.run.run_dir else Path(PROJECT_ROOT)
        return self.log_dir or beside / "logs" / "adapter_face_distill"


DEMO = {  # what suits 800 pictures and a tower of 0.3 million parameters; typed flags win
    "batch_size": 32,
    "epochs": 30,
    "lr": 5e-3,  # adapters of some hundred parameters learn little from 5e-4
    "lambda_at": 0.1,  # at 1000 the attention term leaves ArcFace no say in so small a tower
    "lambda_rkd": 10.0,
    "arc_scale": 16.0,  # 64 and 0.5 are for embeddings of 512 and more dimensions, not of 64
    "arc_margin": 0.2,
    "adapter_layers": "spread:4",
    "workers": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.run.demo:
        cfg = _with_demo(cfg)
    _check_batch_size(cfg.batch_size, world_size())
    if cfg.estimate:
        from face_distill import memory

        print(memory.text(cfg, world_size()))
        return 0
    _check_files(cfg)
    if cfg.run.dry_run:
        print(_plan(cfg))
        return 0
    os.close(open_lock(cfg.run_dir))  # better refused now than after the tower was loaded
    from face_distill import memory
    from face_distill.training import train
    from shared.estimate import explained_out_of_memory

    with explained_out_of_memory(lambda: memory.text(cfg, world_size(), failed=True)):
        return train(cfg)


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the built-in data: its paths and sizes where none were typed."""
    from face_distill.demo_data import demo

    root = Path(PROJECT_ROOT) / "demo"
    paths = demo.build(root)
    changes = DEMO | {
        "blip_path": paths.weights,
        "data_root": paths.data_root,
        "teacher_feat_dir": paths.teacher,
        "verify": paths.pairs,
    }
    changes = {name: value for name, value in changes.items() if name not in cfg.run.typed}
    run_dir = cfg.run.run_dir or root / "runs" / "checkpoints"
    return replace(cfg, **changes, run=replace(cfg.run, run_dir=run_dir))


def _check_batch_size(batch_size: int, processes: int) -> None:
    if batch_size % processes:
        below = batch_size // processes * processes
        near = " or ".join(str(size) for size in (below, below + processes) if size)
        raise UserError(
            f"--batch-size {batch_size} is for all processes together and cannot be split over "
            f"{processes}; use {near}, or another --nproc"
        )


def _check_files(cfg: Config) -> None:
    """Refuse missing inputs in one line each, before anything slow is imported."""
    folder_of_folders = cfg.data_root.is_dir() and any(p.is_dir() for p in cfg.data_root.iterdir())
    if not (cfg.data_root / "train.rec").is_file() and not folder_of_folders:
        raise UserError(
            f"{cfg.data_root} holds no faces: expected train.rec, train.idx and property of "
            "faces_emore, or <identity>/<image> folders; unpack them there, or type --data-root"
        )
    for name in ("teacher_embedding.npy", "teacher_feat_map.npy"):
        if not (cfg.teacher_feat_dir / name).is_file():
            raise UserError(
                f"{cfg.teacher_feat_dir / name} is missing: put teacher_features_12k next to "
                "train_distill.py, or type --teacher-feat-dir PATH"
            )
    if not (cfg.blip_path / "config.json").is_file():
        raise UserError(
            f"{cfg.blip_path / 'config.json'} is missing: fetch the BLIP-2 weights with "
            "python download_weight.py, or type --blip-path PATH"
        )
    if cfg.verify and not cfg.verify.is_file():
        raise UserError(f"--verify {cfg.verify} is missing: expected lfw.bin or another pair file")


def _plan(cfg: Config) -> str:
    processes = world_size()
    return (
        f"{cfg.epochs} epochs of {cfg.data_root}, {cfg.batch_size} images a step = {processes} "
        f"process(es) x {cfg.batch_size // processes}; checkpoints in {cfg.run_dir}, charts in "
        f"{cfg.tensorboard}"
    )


def processes_that_fit(argv: list[str], visible: int) -> int:
    """How many of the visible GPUs share BATCH_SIZE evenly, when the user did not type a size."""
    cfg = parse(Config, argv)
    size = DEMO["batch_size"] if cfg.run.demo else BATCH_SIZE
    if "batch_size" in cfg.run.typed:
        return visible
    return max(count for count in range(1, visible + 1) if int(size) % count == 0)


if __name__ == "__main__":
    sys.exit(launch(main, processes_that_fit))
