"""Evaluate a trained model: who finds whom among held-out pictures, sounds and their captions.

python evaluate.py                                          outputs/, on the test splits in data/
python evaluate.py --checkpoint FILE.pt --datasets coco clotho
python evaluate.py --split val --limit 500                  500 items of each, spread over the split
python evaluate.py --demo                                   what run_training.py --demo has trained

Prints R@1, R@5, R@10 and mAP@10 both ways, with all five captions of an item, and mAP of the
labels; writes them as evaluation.json and evaluation.txt, and into the newest report of the run.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
sys.path.sort(key=lambda path: path == str(Path(__file__).resolve().parent))  # datasets.py last

from shared.config import ToolOptions, option, parse
from shared.errors import UserError, did_you_mean
from shared.files import make_output, write_json, write_text
from shared.launch import launch_alone
from shared.settings import Count, Workers

RECIPE = Path(__file__).resolve().parent
OUTPUTS = RECIPE / "outputs"
DATA_ROOT = RECIPE / "data"
NAMES = ("coco", "clotho", "audiocaps", "voxceleb")


@dataclass(frozen=True)
class Config:
    """Settings of the evaluation."""

    checkpoint: Path = option(OUTPUTS, "a checkpoint, or a run's output directory (its best model)")
    data_root: Path | None = option(None, "where the data sets lie; default: the run's, or data/")
    datasets: tuple[str, ...] = option((), "evaluate these; default: all that are there")
    split: Literal["val", "test"] = option("test", "which held-out split")
    limit: Count | None = option(
        None, "items of each data set, spread over the split; default: all"
    )
    out: Path | None = option(None, "where results go; default: evaluation/ in the run's directory")
    report: bool = option(True, "add the figures to the newest report of the run")
    batch_size: Count = option(64, "pictures or sounds at a time")
    workers: Workers = option(4, "processes that read files; 0: none but this")
    tool: ToolOptions = field(default_factory=ToolOptions)

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in self.datasets:
            if name not in NAMES:
                raise ValueError(
                    f"datasets: {name} is none of {', '.join(NAMES)}{did_you_mean(name, NAMES)}"
                )


DEMO = {"checkpoint": RECIPE / "demo" / "runs" / "outputs", "workers": 0}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then evaluate; the exit code."""
    cfg = parse(Config, argv, __doc__, DEMO)
    from multimodal.trained import checkpoint_at

    checkpoint = checkpoint_at(cfg.checkpoint)
    run_dir = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None
    out = cfg.out or (run_dir or checkpoint.parent) / "evaluation"
    if cfg.data_root:
        _there(cfg.datasets, cfg.data_root)
    if cfg.tool.dry_run:
        sys.stdout.write(f"{checkpoint}, {cfg.split} splits; results go to {out}\n")
        return 0
    make_output(out)
    return _evaluate(cfg, checkpoint, out, run_dir)


def _evaluate(cfg: Config, checkpoint: Path, out: Path, run_dir: Path | None) -> int:
    from multimodal import evaluation
    from multimodal.trained import Embedder, open_trained
    from shared.device import resolve

    device = resolve(cfg.tool.device, 0, os.environ)
    trained = open_trained(checkpoint, device)
    data_root = cfg.data_root or _root_of(trained.settings)
    names = _there(cfg.datasets, data_root)
    embed = Embedder(trained, device, cfg.tool.amp, cfg.batch_size, cfg.workers)
    results = evaluation.evaluate(names, data_root, cfg.split, embed, cfg.limit)
    record = evaluation.record(results, checkpoint, data_root)
    write_json(out / "evaluation.json", record)
    write_text(out / "evaluation.txt", evaluation.text_table(results) + "\n")
    sys.stdout.write(evaluation.text_table(results) + "\n")
    if run_dir and cfg.report:
        _add_to_report(run_dir, record)
    sys.stdout.write(f"{out / 'evaluation.json'}\n")
    return 0


def _root_of(settings: dict[str, object]) -> Path:
    """Where the run found its data, if that is still there."""
    stored = Path(str(settings.get("data_root") or DATA_ROOT))
    return stored if stored.is_dir() else DATA_ROOT


def _there(names: tuple[str, ...], data_root: Path) -> tuple[str, ...]:
    """The data sets to evaluate. Raises UserError when none is there, or a typed one is not."""
    found = tuple(name for name in names or NAMES if (data_root / name).is_dir())
    missing = [name for name in names if name not in found]
    if missing or not found:
        raise UserError(
            f"--data-root {data_root} holds no {', '.join(missing or NAMES)}: fetch them by python "
            "download_datasets.py, or give another directory"
        )
    return found


def _add_to_report(run_dir: Path, record: dict[str, object]) -> None:
    from multimodal.report import add_section, newest

    path = newest(run_dir)
    if path:
        rows, counts = record["retrieval"], record["counts"]
        metrics = record["metrics"]
        assert isinstance(metrics, dict)
        labels = {name: value for name, value in metrics.items() if "mAP of" in name}
        add_section(path, "retrieval", rows)
        add_section(
            path, "evaluation", {"checkpoint": record["checkpoint"], **labels, "counts": counts}
        )
        sys.stdout.write(f"{path.with_suffix('.md')}\n")


if __name__ == "__main__":
    sys.exit(launch_alone(main))
