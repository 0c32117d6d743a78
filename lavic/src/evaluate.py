"""Evaluate an adapter of either stage: what it says about pictures, or what it recommends.

python evaluate.py                                              stage 1's best, on the validation
python evaluate.py --checkpoint out_finetuned                   stage 2's, on its category's test
python evaluate.py --checkpoint out_finetuned --category amazon_home    on another's
python evaluate.py --checkpoint … --limit 100 --out DIRECTORY   the first 100; results elsewhere
python evaluate.py --demo                                       stage 2 of the demo

Prints the figures and writes evaluation.json; of stage 2 also every answer.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared.config import ToolOptions, option, parse
from shared.errors import UserError
from shared.files import make_output, read_object, write_json
from shared.launch import launch_alone
from shared.settings import Count, Workers

SRC = Path(__file__).resolve().parent
DATA = SRC.parent / "data"
RESULTS = "evaluation.json"


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
    cache: Path = option(SRC / "vector_cache", "keeps the pictures' vectors")
    tool: ToolOptions = field(default_factory=ToolOptions)


def main(argv: list[str] | None = None) -> int:
    """Check the input, then evaluate; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.tool.demo:
        cfg = _with_demo(cfg)
    adapter = _adapter_at(cfg.checkpoint)
    out = cfg.out or adapter.parent / "evaluation"
    from lavic.src.adapter_files import stage_of

    stage = stage_of(adapter)
    if stage is None:
        raise UserError(f"{adapter} is of neither stage: give what they have written")
    _check_data(cfg, adapter, stage)
    if cfg.tool.dry_run:
        sys.stdout.write(f"stage {stage}: {adapter} on {cfg.data_root}; results go to {out}\n")
        return 0
    make_output(out)
    return _evaluate(cfg, adapter, stage, out)


def _with_demo(cfg: Config) -> Config:
    """`cfg` on what the demo has left: its paths where none were typed."""
    from lavic import demo

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


def _check_data(cfg: Config, adapter: Path, stage: int) -> None:
    """Refuse a missing base model and missing data before anything slow is imported."""
    from lavic.src.adapter_files import ABOUT, base_of

    base_of(adapter, cfg.model_name)
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
    from lavic.src.adapter_files import DISTILLED, RECOMMENDER, SETTINGS, trained_in

    found = trained_in(checkpoint)
    if found is None:
        raise UserError(
            f"{checkpoint} holds no adapter ({SETTINGS}, or a run's {RECOMMENDER} or {DISTILLED}): "
            "train first with ./run_training.sh, or give --checkpoint PATH"
        )
    return found


def _evaluate(cfg: Config, adapter: Path, stage: int, out: Path) -> int:
    from lavic.src import evaluation
    from shared.device import resolve

    device = resolve(cfg.tool.device, 0, os.environ)
    if stage == 1:
        metrics, counts, about = evaluation.of_vision(cfg, adapter, device)
    else:
        metrics, counts, about = evaluation.of_recommender(cfg, adapter, device, out)
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


if __name__ == "__main__":
    sys.exit(launch_alone(main))
