"""Stage 2: tune the language model to recommend from a conversation and ten candidates' pictures.

python prompt_tuning.py --model_dir ./out_distilled/vision_lora_adapter_best
python prompt_tuning.py --model_dir … --category amazon_home
torchrun --nproc_per_node=4 prompt_tuning.py --model_dir …    four GPUs, said explicitly
python prompt_tuning.py --demo                                after ./run_training.sh --demo

Writes trained_lora_adapter/, test_results_<candidates>.jsonl and results_summary.csv.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared.config import RunOptions, free, option, parse
from shared.errors import UserError
from shared.files import open_lock
from shared.launch import launch, world_size
from shared.settings import Count, Positive, Workers

SRC = Path(__file__).resolve().parent
DATA = SRC.parent / "data"


@dataclass(frozen=True)
class Config:
    """Settings of the prompt tuning."""

    model_dir: Path | None = option(None, "stage 1's adapter directory; has to be given")
    candidate_type: Literal["candidates_st", "candidates_gpt_large"] = option(
        "candidates_st", "which list of ten candidates"
    )
    category: Literal["all_beauty", "amazon_fashion", "amazon_home"] = option(
        "all_beauty", "whose conversations"
    )
    finetune_output_dir: Path = free(SRC / "out_finetuned", "where everything goes")
    max_length: Count = option(2048, "tokens of a prompt with its answer")
    batch_size: Count = option(1, "conversations a process and forward pass")
    num_workers: Workers = free(4, "loader workers a process", aliases=("--workers",))
    lr: Positive = option(5e-5, "AdamW's learning rate")
    weight_decay: float = option(1e-5, "AdamW's weight decay")
    num_epochs: Count = option(1, "passes over the training conversations", scope="length")
    patience: Count | None = option(
        None, "epochs without a lower val_loss before training ends", scope="length"
    )
    item_meta_path: Path = free(DATA / "item2meta_train.json", "the products' titles")
    image_dir: Path = free(DATA / "train_images", "pictures {id}_0.jpg")
    data_root: Path = free(DATA, "holds <category>/{train,valid,test}.jsonl")
    model_name: str | None = option(
        None, "base model, Hub id or directory; default: the one the adapter was trained on"
    )
    slots: Literal["fixed5", "views"] = option(
        "fixed5", "item tokens a picture: five, as published, or one a view"
    )
    grad_accum: Count = option(1, "forward passes a step")
    clip_norm: Positive = option(1.0, "largest norm of the gradients")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the frozen weights; auto: half on a GPU, float32 on the CPU"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = free(
        "auto", "less memory for more time; auto: on GPUs below 48 GB"
    )
    eval_batch_size: Count = free(4, "conversations a process in evaluation")
    evaluate_before: bool = free(True, "test the untrained model first")
    max_samples: str = option("all", "conversations of each file to use, from its first; or all")
    cache: Path = free(SRC / "vector_cache", "keeps the pictures' vectors")
    estimate: bool = free(False, "print the memory this will take, stop")
    run: RunOptions = field(default_factory=lambda: RunOptions(seed=42, log_every=10))

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        from lavic.src.sample_limit import most

        most(self.max_samples)

    @property
    def run_dir(self) -> Path:
        """Where adapter, results, checkpoints and status go."""
        return self.run.run_dir or self.finetune_output_dir

    @property
    def adapter(self) -> Path:
        """Stage 1's adapter directory."""
        assert self.model_dir
        return self.model_dir

    @property
    def samples_a_step(self) -> int:
        """Conversations of one process in an optimizer step."""
        return self.batch_size * self.grad_accum

    def conversations(self, split: str) -> Path:
        """The file of train, valid or test."""
        return self.data_root / self.category / f"{split}.jsonl"


DEMO = {  # what suits 240 conversations and a model of 0.4 million parameters; typed flags win
    "batch_size": 4,
    "num_epochs": 4,
    "lr": 2e-3,
    "max_length": 512,
    "eval_batch_size": 10,
    "num_workers": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train and test; the exit code."""
    cfg = parse(Config, argv, __doc__, DEMO)
    if cfg.run.demo:
        cfg = _with_demo(cfg)
    if cfg.estimate:
        from lavic.src import tuning_memory

        print(tuning_memory.text(cfg, world_size()))
        return 0
    _check_files(cfg)
    from lavic.src.adapter_files import base_of

    cfg = replace(cfg, model_name=base_of(cfg.adapter, cfg.model_name))
    if cfg.run.dry_run:
        print(_plan(cfg))
        return 0
    os.close(open_lock(cfg.run_dir))  # better refused now than after the model was loaded
    from lavic.src import tuning_memory
    from lavic.src.recommend_training import train
    from shared.memory import explained_out_of_memory

    with explained_out_of_memory(lambda: tuning_memory.text(cfg, world_size())):
        return train(cfg)


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the built-in data: its paths where none were typed."""
    from lavic import demo
    from lavic.src.adapter_files import DISTILLED, SETTINGS

    paths = demo.build(SRC.parent / "demo")
    adapter = paths.distilled / DISTILLED
    if "model_dir" not in cfg.run.typed and not (adapter / SETTINGS).is_file():
        raise UserError("the demo's stage 1 has not been trained: type ./run_training.sh --demo")
    changes = {
        "model_dir": adapter,
        "data_root": paths.data,
        "item_meta_path": paths.train_data,
        "image_dir": paths.train_images,
        "finetune_output_dir": paths.finetuned,
        "cache": paths.root / "runs" / "vector_cache",
    }
    return replace(cfg, **{n: value for n, value in changes.items() if n not in cfg.run.typed})


def _check_files(cfg: Config) -> None:
    """Refuse missing inputs in one line each, before anything slow is imported."""
    if cfg.model_dir is None:
        raise UserError(
            "--model_dir is missing: give stage 1's adapter, for example "
            "--model_dir ./out_distilled/vision_lora_adapter_best"
        )
    from lavic.src.adapter_files import SETTINGS, stage_of

    if not (cfg.model_dir / SETTINGS).is_file():
        raise UserError(
            f"{cfg.model_dir} is no adapter ({SETTINGS}): train stage 1 first with "
            "./run_training.sh, or give the right directory"
        )
    if stage_of(cfg.model_dir) != 1:
        raise UserError(f"{cfg.model_dir} is no adapter of stage 1: it leaves the vision tower out")
    for split in ("train", "valid", "test"):
        path = cfg.conversations(split)
        if not path.is_file():
            raise UserError(
                f"{path} is missing: put the conversations of {cfg.category} there, or type "
                "--data-root"
            )
    if not cfg.item_meta_path.is_file():
        raise UserError(f"{cfg.item_meta_path} is missing: type --item-meta-path")
    if not cfg.image_dir.is_dir():
        raise UserError(
            f"{cfg.image_dir} is missing: fetch the pictures with python crawl_images.py, or type "
            "--image-dir"
        )


def _plan(cfg: Config) -> str:
    processes = world_size()
    return (
        f"{cfg.num_epochs} epochs over {cfg.conversations('train')} with {cfg.candidate_type}, "
        f"{processes * cfg.samples_a_step} conversations a step = {processes} process(es) x "
        f"{cfg.batch_size} x {cfg.grad_accum}; vision adapter {cfg.adapter} on {cfg.model_name}; "
        f"results in {cfg.run_dir}"
    )


if __name__ == "__main__":
    sys.exit(launch(main))
