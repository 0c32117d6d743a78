"""Stage 1: teach LLaVA-v1.6's vision tower to say what a picture shows, in five vectors.

python knowledge_distillation.py                        data/ of the recipe, every visible GPU
python knowledge_distillation.py --max_samples 5000     the first 5000 samples, to try things out
python knowledge_distillation.py --estimate             the memory it will take; loads no weights
python knowledge_distillation.py --demo                 built-in data, on any machine

Trains LoRA on the vision tower and the projector; the language model stays as it is.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared.config import RunOptions, free, option, parse
from shared.files import open_lock, read_object
from shared.launch import launch, world_size
from shared.settings import Count, Positive, Seed, ShareBelowOne, Size, Workers

SRC = Path(__file__).resolve().parent
DATA = SRC.parent / "data"


@dataclass(frozen=True)
class Config:
    """Settings of the distillation."""

    model_name: str = option(
        "llava-hf/llava-v1.6-mistral-7b-hf", "model id of the Hub, or a directory"
    )
    train_data: Path = option(DATA / "item2meta_train.json", "products to learn from")
    val_data: Path = option(DATA / "item2meta_valid.jsonl", "products to validate with")
    train_images_dir: Path = free(DATA / "train_images", "pictures of the first")
    val_images_dir: Path = free(DATA / "valid_images", "pictures of the second")
    output_dir: Path = free(SRC / "out_distilled", "adapter and run directory")
    batch_size: Count = option(1, "samples of one forward pass, a process")
    grad_accum: Count = option(1, "forward passes of one optimizer step")
    num_epochs: Count = option(1, "passes over the samples", scope="length")
    patience: Count | None = option(
        None, "epochs without a lower val_loss before training ends", scope="length"
    )
    lr: Positive = option(5e-5, "learning rate, the same throughout")
    weight_decay: float = option(1e-5, "AdamW's weight decay")
    max_samples: str = option("all", "train on the first N samples, or all")
    sample_seed: Seed | None = option(None, "with --max_samples: N at random, by this seed")
    max_length: Count = option(2048, "tokens; longer descriptions are cut, longer prompts left out")
    slots: Literal["fixed5", "views"] = option(
        "fixed5", "item tokens of a picture: always five, or one a view"
    )
    lora_r: Size = option(8, "rank of the adapter")
    lora_alpha: Count = option(32, "its strength is alpha / r")
    lora_dropout: ShareBelowOne = option(0.1, "dropout before it")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the frozen weights; auto: bfloat16 or float16 on a GPU, float32 on the CPU"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = free(
        "auto", "less memory for the tower, more time; auto: on GPUs below 30 GB"
    )
    reuse_prompt: bool = free(
        True, "run what is the same in all prompts once, and no gradients through any"
    )
    validate_before_training: bool = option(False, "validate once before the first step")
    num_workers: Workers = free(4, "loader workers a process", aliases=("--workers",))
    log_dir: Path | None = free(
        None, "TensorBoard; default lightning_logs/version_N beside the output"
    )
    estimate: bool = free(False, "print the memory this will take, stop")
    run: RunOptions = field(default_factory=lambda: RunOptions(seed=42, log_every=10))

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        from lavic.src.sample_limit import most

        most(self.max_samples)

    @property
    def run_dir(self) -> Path:
        """Where adapter, checkpoints, status and metrics go."""
        return self.run.run_dir or self.output_dir

    @property
    def adapter_dir(self) -> Path:
        """Where the best adapter goes."""
        from lavic.src.adapter_files import DISTILLED

        return self.run_dir / DISTILLED

    @property
    def samples_per_step(self) -> int:
        """Of one process."""
        return self.batch_size * self.grad_accum


DEMO = {  # what suits some hundred small pictures and a tower of 0.2 million parameters
    "batch_size": 4,
    "num_epochs": 6,
    "lr": 1.5e-3,
    "validate_before_training": True,
    "num_workers": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train; the exit code."""
    cfg = parse(Config, argv, __doc__, DEMO)
    if cfg.run.demo:
        cfg = _with_demo(cfg)
    if cfg.estimate:
        from lavic.src import distillation_memory

        print(distillation_memory.text(cfg, world_size()))
        return 0
    from lavic.src import adapter_files, sample_choice

    adapter_files.check_base(cfg.model_name)
    found = sample_choice.open_samples(cfg)
    if cfg.run.dry_run:
        print(_plan(cfg, len(found.train), len(found.valid)))
        return 0
    os.close(open_lock(cfg.run_dir))  # better refused now than after the model was loaded
    from lavic.src import distillation_memory
    from lavic.src.distillation import train
    from shared.memory import explained_out_of_memory

    with explained_out_of_memory(lambda: distillation_memory.text(cfg, world_size())):
        return train(replace(cfg, log_dir=_log_dir(cfg)), found)


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the built-in data: its paths where none were typed."""
    from lavic import demo

    paths = demo.build(SRC.parent / "demo")
    changes = {
        "model_name": str(paths.weights),
        "train_data": paths.train_data,
        "val_data": paths.val_data,
        "train_images_dir": paths.train_images,
        "val_images_dir": paths.valid_images,
        "output_dir": paths.distilled,
    }
    return replace(cfg, **{name: v for name, v in changes.items() if name not in cfg.run.typed})


def _log_dir(cfg: Config) -> Path:
    """Where TensorBoard's events go: on with those of an unfinished run, else the next number."""
    if cfg.log_dir:
        return cfg.log_dir
    if read_object(cfg.run_dir / "status.json").get("state") not in (None, "done"):
        settings = read_object(cfg.run_dir / "config.json").get("settings", {})
        if settings.get("log_dir"):
            return Path(settings["log_dir"])
    beside = cfg.run_dir.parent / "lightning_logs"
    numbers = (path.name.removeprefix("version_") for path in beside.glob("version_*"))
    taken = [int(number.partition(".")[0]) for number in numbers if number[:1].isdigit()]
    return beside / f"version_{max(taken, default=-1) + 1}"


def _plan(cfg: Config, num_train: int, num_valid: int) -> str:
    processes = world_size()
    total = processes * cfg.samples_per_step
    return (
        f"{cfg.num_epochs} epoch(s) of {num_train} samples, {num_valid} to validate with; {total} "
        f"samples a step = {processes} process(es) x batch size {cfg.batch_size} x "
        f"{cfg.grad_accum} accumulated; adapter and checkpoints in {cfg.run_dir}"
    )


if __name__ == "__main__":
    sys.exit(launch(main))
