"""Train one model on pictures, texts and sounds, in three stages.

python run_training.py --model-size base --batch-size 8 --epochs 100
python run_training.py --resume outputs/checkpoints/checkpoint_epoch_50.pt   all else as it was
python run_training.py --estimate --model-size large                         memory, no training
torchrun --nproc_per_node=4 run_training.py                                  four processes
python run_training.py --demo                                                built-in data

Defaults come from config.yaml. The stages: each modality alone, pairs finding each other, and all
of the model together; they share the epochs 30/40/30.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
sys.path.sort(key=lambda path: path == str(Path(__file__).resolve().parent))  # datasets.py last

from shared.config import RunOptions, free, option, parse, parse_known
from shared.errors import UserError, shown
from shared.files import open_lock
from shared.launch import launch, world_size
from shared.settings import (
    Count,
    Positive,
    Range,
    Share,
    ShareBelowOne,
    Size,
    Workers,
    differing,
    leaves,
    number,
    plain,
)

HERE = Path(__file__).resolve().parent
DATA_SETS = ("coco", "clotho", "audiocaps", "voxceleb")


@dataclass(frozen=True)
class Config:
    """Settings of the training."""

    data_root: Path = free(HERE / "data", "where the data sets lie")
    output_dir: Path = free(HERE / "outputs", "for checkpoints, logs and reports")
    model_size: Literal["tiny", "small", "base", "large", "nano"] = option(
        "base", "15, 35, 80 or 200 million parameters; nano for tests"
    )
    batch_size: Count = option(8, "samples computed at once on each process")
    epochs: Count = option(100, "epochs of all stages; how they are divided is part of a run")
    lr: Positive = option(1e-4, "highest learning rate")
    config: Path = free(HERE / "config.yaml", "YAML file with the defaults")

    embed_dim: Size = option(512, "width of all features")
    use_checkpoint: bool = free(True, "compute activations again to save memory")
    attention: Literal["sdpa", "chunked", "math"] = option("sdpa", "the same by other kernels")
    dropout: ShareBelowOne = option(0.0, "share of each block's outputs that is dropped")
    activation: Literal["gelu", "quick_gelu"] = option("gelu", "quick_gelu for OpenAI's weights")
    pretrained: str = option(
        "auto", "an open_clip file, none, or auto: the one in <data root>/pretrained"
    )

    gradient_accumulation_steps: Count = option(
        4, "batches a step; gradients as of one large batch"
    )
    use_amp: bool = option(True, "bf16 where the GPU has it, else fp16; off on the CPU")
    stage_epochs: str = option("30/40/30", "how the stages share the epochs")
    datasets: tuple[str, ...] = option((), "train on these alone; default: all that are there")
    audio_pretraining: Literal["auto", "keywords", "spectrogram"] = option(
        "auto", "sounds alone: keywords where there are any, else hidden parts filled in"
    )
    loss: Literal["infonce", "sigmoid"] = option("infonce", "how pairs are told from strangers")
    local_loss: bool = option(False, "each process scores its own rows alone; saves memory")
    label_weight: float = option(0.2, "of labels beside pairs, in the last stage")
    modality_dropout: ShareBelowOne = option(
        0.3, "share of pairs shown one modality, in the last stage"
    )
    balance: Share = option(0.5, "1: data sets by their size; 0: all alike; between: between")
    warmup: ShareBelowOne = option(0.05, "share of each stage in which the learning rate rises")
    tower_lr: float = option(0.1, "learning rate of the towers in the last stage, of --lr")
    weight_decay: float = option(0.1, "AdamW's, without gains, biases and temperatures")
    clip_norm: Positive = option(1.0, "largest norm of the gradients")
    clip_seconds: Annotated[float, Range(0, 3600, above=True)] = option(
        10.0, "length of the sounds in training"
    )
    eval_batch_size: Count = free(64, "samples of a validation batch")
    checkpoint_every: Count = free(10, "epochs between checkpoint_epoch_N.pt")
    max_steps: Count | None = option(None, "stop after so many steps", scope="length")
    workers: Workers = free(4, "loader workers a process and data set")
    feature_cache: Path | None = free(None, "keep the sounds' features there")
    estimate: bool = free(False, "print the memory that training takes, stop")
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        unknown = [name for name in self.datasets if name not in DATA_SETS]
        if unknown:
            raise ValueError(f"datasets: {unknown[0]} is none of {', '.join(DATA_SETS)}")
        _ = self.shares

    @property
    def shares(self) -> list[float]:
        """How the three stages share the epochs."""
        try:
            parts = self.stage_epochs.split("/")
            shares = [number("a share", part, float, Range()) for part in parts]
        except UserError:
            shares = []
        if len(shares) != 3 or sum(shares) <= 0:
            raise ValueError(f"stage_epochs must be like 30/40/30, got {shown(self.stage_epochs)}")
        return shares

    @property
    def run_dir(self) -> Path:
        """Where status, metrics, checkpoints, logs and reports go."""
        return self.run.run_dir or self.output_dir

    @property
    def tensorboard(self) -> Path:
        """Where TensorBoard's events go."""
        return self.run_dir / "logs" / "tensorboard"

    @property
    def step_rows(self) -> int:
        """Samples of an optimizer step on each process."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def amp(self) -> str:
        """The mode of mixed precision."""
        return self.run.amp if self.run.amp != "off" else "auto" if self.use_amp else "off"


DEMO = {  # what suits 640 pictures, 344 sounds and a model of 2 million parameters
    "model_size": "nano",
    "batch_size": 32,
    "gradient_accumulation_steps": 1,
    "epochs": 24,
    "lr": 1e-3,
    "tower_lr": 1.0,
    "clip_seconds": 2.0,
    "use_checkpoint": False,
    "checkpoint_every": 10,
    "workers": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train; the exit code."""
    cfg = _read_settings(sys.argv[1:] if argv is None else argv)
    if cfg.run.demo:
        cfg = _with_demo(cfg)
    if cfg.estimate:
        from multimodal import memory

        print(memory.text(cfg, world_size()))
        return 0
    _check_data(cfg)
    _check_pretrained(cfg)
    if cfg.run.dry_run:
        print(_plan(cfg))
        return 0
    os.close(open_lock(cfg.run_dir))  # better refused now than after the data sets were read
    from multimodal.training import train

    return train(cfg)


@dataclass(frozen=True)
class _File:
    """Where the settings file is."""

    config: Path = option(Config.config, "")


def _read_settings(argv: list[str]) -> Config:
    """The settings of flags, of the run that is resumed, of the file and of the code, in turn."""
    from multimodal import settings_file

    processes = leaves(Config().run.processes)  # the launcher reads these before any file
    known = {name: leaf for name, leaf in leaves(Config()).items() if name not in processes}
    path = parse_known(_File, argv).config
    values = settings_file.read(path, known)
    cfg = parse(cast(Any, lambda: _default(values)), argv, __doc__, DEMO)
    if cfg.run.is_explicit_resume and "config" in cfg.run.typed:
        now = {name: plain(leaf.value) for name, leaf in leaves(cfg).items()}
        asked = {name: plain(value) for name, value in values.items() if name not in cfg.run.typed}
        changed = [name for name in asked if known[name].scope == "result"]
        other = differing({n: now[n] for n in changed}, {n: asked[n] for n in changed})
        if other:
            raise UserError(
                f"--resume {cfg.run.resume} cannot continue with {path}: {'; '.join(other)}; leave "
                "--config out, or start anew with --resume never"
            )
    if "amp" in cfg.run.typed:  # a resumed run finds what was meant, not both flags
        cfg = replace(cfg, use_amp=cfg.run.amp != "off")
    return cast(Config, cfg)


def _default(values: dict[str, Any]) -> Config:
    """The settings with those of a file in their places."""
    own = {name: value for name, value in values.items() if hasattr(Config, name)}
    below = {name: value for name, value in values.items() if name not in own}
    try:
        cfg = replace(Config(), **own)
        return replace(cfg, run=replace(cfg.run, **below))
    except ValueError as error:
        raise UserError(str(error)) from None


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the built-in data: its paths where none were typed."""
    from multimodal import demo

    root = HERE / "demo"
    paths = demo.build(root)
    changes: dict[str, Any] = {
        "data_root": paths.data_root,
        "output_dir": root / "runs" / "outputs",
        "feature_cache": root / "features",
    }
    changes = {name: value for name, value in changes.items() if name not in cfg.run.typed}
    return replace(cfg, **changes)


def _check_data(cfg: Config) -> None:
    """Refuse a data root without data sets in one line, before anything slow is imported."""
    wanted = cfg.datasets or DATA_SETS
    missing = [name for name in wanted if not (cfg.data_root / name).is_dir()]
    if len(missing) == len(wanted) or (cfg.datasets and missing):
        raise UserError(
            f"{cfg.data_root} lacks {', '.join(missing)}: fetch the data by python "
            "download_datasets.py --datasets coco clotho audiocaps, or type --data-root PATH"
        )


def _check_pretrained(cfg: Config) -> None:
    path = Path(cfg.pretrained).expanduser().absolute()
    if cfg.pretrained not in ("auto", "none") and not path.exists():
        raise UserError(
            f"--pretrained {cfg.pretrained}: no such file; give an open_clip checkpoint, auto or "
            "none"
        )


def _plan(cfg: Config) -> str:
    there = [name for name in DATA_SETS if (cfg.data_root / name).is_dir()]
    rows, count = cfg.step_rows, world_size()
    return (
        f"{cfg.epochs} epochs, shared {cfg.stage_epochs}, of {', '.join(there)} in "
        f"{cfg.data_root}; {rows * count} samples a step = {count} process(es) x batch "
        f"{cfg.batch_size} x accumulation {cfg.gradient_accumulation_steps}; model {cfg.model_size}"
        f"; checkpoints, logs and reports in {cfg.run_dir}"
    )


if __name__ == "__main__":
    sys.exit(launch(main))
