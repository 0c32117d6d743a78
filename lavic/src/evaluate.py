"""Evaluate an adapter of either stage: what it says about pictures, or what it recommends.

python evaluate.py                                              stage 1's best, on the validation
python evaluate.py --checkpoint out_finetuned                   stage 2's, on its category's test
python evaluate.py --checkpoint out_finetuned --category amazon_home    on another's
python evaluate.py --checkpoint … --limit 100 --out DIRECTORY   the first 100; results elsewhere
python evaluate.py --demo                                       stage 2 of the demo

Prints the figures and writes evaluation.json; of stage 2 also every answer.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ToolOptions, option, parse
from shared.errors import UserError
from shared.files import make_output, read_object, write_json
from shared.launch import launch_alone
from shared.settings import Count, Workers

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

SRC = Path(__file__).resolve().parent
DATA = SRC.parent / "data"
RESULTS = "evaluation.json"

Results = tuple[dict[str, float], dict[str, int], dict[str, Any]]  # figures, counts, what it was


@dataclass(frozen=True)
class Config:
    """Settings of the evaluation."""

    checkpoint: Path = option(SRC / "out_distilled", "adapter directory, or a run's directory")
    data_root: Path = option(DATA, "the recipe's data: item files, pictures, conversations")
    out: Path | None = option(None, "where results go; default: evaluation, beside the adapter")
    limit: Count | None = option(None, "first so many pictures or conversations; default: all")
    model_name: str | None = option(None, "base model; default: the one it was trained on")
    category: str | None = option(None, "stage 2: whose conversations; default: the adapter's")
    candidate_type: Literal["candidates_st", "candidates_gpt_large"] | None = option(
        None, "stage 2: which candidates; default: the adapter's"
    )
    batch_size: Count = option(4, "samples at a time")
    num_workers: Workers = option(4, "loader workers", aliases=("--workers",))
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the weights; auto: half on a GPU, float32 on the CPU"
    )
    load_in_4bit: bool = option(False, "language model in NF4, by bitsandbytes")
    device_map: Literal["none", "auto"] = option(
        "none", "auto: the model spread over all visible GPUs, by accelerate"
    )
    cache: Path = option(SRC / "vector_cache", "keeps the pictures' vectors")
    estimate: bool = option(False, "print the memory this will take, stop")
    tool: ToolOptions = field(default_factory=ToolOptions)


def main(argv: list[str] | None = None) -> int:
    """Check the input, then evaluate; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.tool.demo:
        cfg = _with_demo(cfg)
    adapter = _adapter_at(cfg.checkpoint)
    out = cfg.out or adapter.parent / "evaluation"
    from lavic.src.vision.adapter_files import stage_of

    stage = stage_of(adapter)
    if stage is None:
        raise UserError(f"{adapter} is of neither stage: give what they have written")
    if cfg.estimate:
        print(_memory(cfg, adapter, stage))
        return 0
    _check_data(cfg, adapter, stage)
    if cfg.tool.dry_run:
        sys.stdout.write(f"stage {stage}: {adapter} on {cfg.data_root}; results go to {out}\n")
        return 0
    make_output(out)
    return _evaluate(cfg, adapter, stage, out)


def _with_demo(cfg: Config) -> Config:
    """`cfg` on what the demo has left: its paths where none were typed."""
    from lavic.demo_data import demo

    paths = demo.build(SRC.parent / "demo")
    trained = [path for path in (paths.finetuned, paths.distilled) if path.is_dir()]
    if not trained and "checkpoint" not in cfg.tool.typed:
        raise UserError("the demo has trained nothing yet: type ./run_training.sh --demo first")
    changes = {
        "checkpoint": trained[0] if trained else None,
        "data_root": paths.data,
        "num_workers": 0,
        "cache": paths.root / "runs" / "vector_cache",
    }
    return replace(cfg, **{n: value for n, value in changes.items() if n not in cfg.tool.typed})


def _memory(cfg: Config, adapter: Path, stage: int) -> str:
    """What --estimate says."""
    from lavic.src.vision import memory
    from lavic.src.vision.adapter_files import base_of

    return memory.of_evaluation(
        base_of(adapter, cfg.model_name), stage=stage, batch_size=cfg.batch_size, dtype=cfg.dtype,
        amp=cfg.tool.amp, load_in_4bit=cfg.load_in_4bit, spread=cfg.device_map == "auto",
    )  # fmt: skip


def _check_data(cfg: Config, adapter: Path, stage: int) -> None:
    """Refuse a missing base model and missing data before anything slow is imported."""
    from lavic.src.vision.adapter_files import ABOUT, base_of, check_four_bit

    base_of(adapter, cfg.model_name)
    check_four_bit(cfg.load_in_4bit)
    category = cfg.category or str(read_object(adapter / ABOUT).get("category"))
    names = {
        1: ("item2meta_valid.jsonl", "valid_images"),
        2: (f"{category}/test.jsonl", "item2meta_train.json", "train_images"),
    }[stage]
    for name in names:
        if not (cfg.data_root / name).exists():
            raise UserError(
                f"{cfg.data_root / name} is missing: put the recipe's data there, or type "
                "--data-root PATH"
            )


def _adapter_at(checkpoint: Path) -> Path:
    """The adapter that `--checkpoint` means. Raises UserError when there is none."""
    from lavic.src.vision.adapter_files import DISTILLED, RECOMMENDER, SETTINGS, trained_in

    found = trained_in(checkpoint)
    if found is None:
        raise UserError(
            f"{checkpoint} holds no adapter ({SETTINGS}, or a run's {RECOMMENDER} or {DISTILLED}): "
            "train first with ./run_training.sh, or give --checkpoint PATH"
        )
    return found


def _evaluate(cfg: Config, adapter: Path, stage: int, out: Path) -> int:
    from shared.device import resolve
    from shared.distributed import World

    world = World(device=resolve(cfg.tool.device, 0, os.environ))
    if stage == 1:
        metrics, counts, about = _of_vision(cfg, adapter, world)
    else:
        metrics, counts, about = _of_recommender(cfg, adapter, world, out)
    results: dict[str, Any] = {
        "schema": 1,
        "stage": stage,
        "metrics": metrics,
        "counts": counts,
        "checkpoint": str(adapter),
        "data": str(cfg.data_root),
        **about,
    }
    write_json(out / RESULTS, results)
    for name, value in {**metrics, **counts}.items():
        sys.stdout.write(f"{name:<22} {value if isinstance(value, int) else f'{value:.4f}'}\n")
    sys.stdout.write(f"{out / RESULTS}\n")
    return 0


def _of_vision(cfg: Config, adapter: Path, world: Any) -> Results:
    """val_loss and val_perplexity of stage 1's adapter over data_root's validation pictures."""
    from lavic.src.catalogue import read_samples
    from lavic.src.vision import captions, model
    from lavic.src.vision.adapter_files import base_of
    from lavic.src.vision.adapters import load_adapter
    from lavic.src.vision.caption_loss import caption_nll
    from lavic.src.vision.training import mean_nll
    from shared.amp import Amp
    from shared.images import Skipped
    from shared.loader import make_eval_loader
    from shared.progress import shown

    file = cfg.data_root / "item2meta_valid.jsonl"
    samples = read_samples(file, cfg.data_root / "valid_images").usable[: cfg.limit]
    dtype, amp_mode = model.precision(cfg.dtype, cfg.tool.amp, world.device)
    amp, base_name = Amp(amp_mode, world.device), base_of(adapter, cfg.model_name)
    four_bit, spread = cfg.load_in_4bit, cfg.device_map == "auto"
    base, processor = model.load_base(
        base_name, world.device, dtype, four_bit=four_bit, spread=spread
    )
    item_ids = model.add_item_tokens(base, processor.tokenizer)
    llava = load_adapter(base, adapter)
    trained = read_object(adapter.parent / "config.json").get("settings", {})
    slots, longest = trained.get("slots", "fixed5"), trained.get("max_length", 2048)
    pad, fixed = model.pad_id(processor.tokenizer), captions.fixed_tokens(processor.tokenizer)
    loader = make_eval_loader(
        captions.Captions(samples, processor, slots, longest), cfg.batch_size, world,
        workers=cfg.num_workers, collate=captions.Collate(cfg.batch_size, pad, fixed),
    )  # fmt: skip

    def nll_of(batch: captions.Batch) -> Tensor:
        with amp.autocast():
            return caption_nll(llava, batch.to(world.device), item_ids, None)

    skipped = Skipped("samples")
    loss, tokens = mean_nll(shown(loader, "validation: batch"), nll_of, world, skipped)
    metrics = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
    counts = {"samples": len(samples) - skipped.count, "tokens": tokens, "left_out": skipped.count}
    return metrics, counts, {"model_name": base_name, "slots": slots}


def _of_recommender(cfg: Config, adapter: Path, world: Any, out: Path) -> Results:
    """The test figures of stage 2's adapter; every answer goes to `out` as in a training."""
    from lavic.src.catalogue import read_titles
    from lavic.src.recommend import evaluation, model, prompts, results
    from lavic.src.recommend.data import Talks, read_conversations
    from lavic.src.vision.adapter_files import ABOUT, VISION, base_of
    from lavic.src.vision.adapters import load_adapter
    from lavic.src.vision.model import pad_id, precision
    from shared.loader import make_eval_loader
    from shared.progress import shown

    about = read_object(adapter / ABOUT)
    if not {"candidate_type", "category", "max_length", "slots"} <= about.keys():
        raise UserError(f"{adapter / ABOUT} is damaged: copy the adapter's directory again")
    kind = cfg.candidate_type or about["candidate_type"]
    category = cfg.category or about["category"]
    test = read_conversations(cfg.data_root / category / "test.jsonl", kind)[: cfg.limit]
    talks = Talks([], [], test, read_titles(cfg.data_root / "item2meta_train.json"))
    dtype, _ = precision(cfg.dtype, cfg.tool.amp, world.device)
    base_name, images = base_of(adapter, cfg.model_name), cfg.data_root / "train_images"
    recommender, encoder, processor, vectors = model.build(
        base_name, adapter / VISION, images, cfg.cache, talks, world, workers=cfg.num_workers,
        dtype=dtype, max_length=about["max_length"], slots=about["slots"],
        four_bit=cfg.load_in_4bit, spread=cfg.device_map == "auto",
    )  # fmt: skip
    recommender.model = load_adapter(recommender.model, adapter)
    collate = partial(prompts.collate_generation, pad_id=pad_id(processor.tokenizer))
    asked = prompts.Prompts(talks.asked, encoder)
    batches = make_eval_loader(asked, cfg.batch_size, world, collate=collate)
    shown_batches = shown(batches, "test: batch")
    outcome = evaluation.answer(recommender, test, shown_batches, processor.tokenizer, world)
    log.info(outcome.line())
    results.write_answers(out / f"test_results_{kind}.jsonl", kind, outcome)
    counts = outcome.counts | {"without_picture": len(vectors.without)}
    described = {"category": category, "candidate_type": kind, "model_name": base_name}
    return outcome.metrics, counts, described


if __name__ == "__main__":
    sys.exit(launch_alone(main))
