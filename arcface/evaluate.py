"""Evaluate a trained retriever: Recall@1/10/20/30/40 and mAP@10 of every query picture.

python evaluate.py --checkpoint work_dirs/resnet50-arcface_8xb32_inshop     its best epoch
python evaluate.py --checkpoint …/epoch_50.pth --data-root /data/inshop     one file, other place
python evaluate.py --checkpoint … --limit 500                               500 queries only
python evaluate.py --demo                         what run_arcface.py --demo has trained

Prints a table and writes retrieval.json, retrieval.txt and contact_sheet.html: queries with their
ten nearest pictures, right and wrong ones marked.
"""

import logging
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared.config import ToolOptions, option, parse
from shared.errors import UserError
from shared.files import make_output
from shared.launch import launch_alone
from shared.settings import Count, Seed

if TYPE_CHECKING:
    from arcface.run_settings import Settings

RECIPE = Path(__file__).resolve().parent
CHECKPOINT = RECIPE / "work_dirs" / "resnet50-arcface_8xb32_inshop"
DEMO_CHECKPOINT = RECIPE / "demo" / "runs" / "resnet18-arcface_demo"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the evaluation."""

    checkpoint: Path = option(CHECKPOINT, "best_….pth, epoch_N.pth, or a run directory")
    data_root: Path | None = option(None, "the inshop directory; default: the run's")
    out: Path | None = option(None, "where results go; default: evaluation, beside the checkpoint")
    limit: Count | None = option(
        None, "queries, spread over the list, against the whole gallery; default: all"
    )
    config: str | None = option(
        None, "configuration file; default: what the run beside the checkpoint was trained with"
    )
    cfg_options: tuple[str, ...] = option((), "key=value pairs over the configuration")
    batch_size: Count | None = option(None, "pictures embedded at a time; default: the run's")
    examples: Count = option(24, "queries on the contact sheet")
    seed: Seed = option(0, "seed of the choice of these queries")
    tool: ToolOptions = field(default_factory=ToolOptions)


def main(argv: list[str] | None = None) -> int:
    """Check the input, then evaluate; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.tool.demo and "checkpoint" not in cfg.tool.typed:
        cfg = replace(cfg, checkpoint=DEMO_CHECKPOINT)
    checkpoint = _file(cfg)
    settings = _settings(cfg, checkpoint)
    out = cfg.out or checkpoint.parent / "evaluation"
    from arcface.run_settings import check_data

    remarks = check_data(settings)
    for remark in settings.remarks:
        log.warning(remark)
    if cfg.tool.dry_run:
        for remark in remarks:  # which an evaluation makes when it opens the lists
            log.warning(remark)
        data = settings.roots[settings.recipe.query.name]
        sys.stdout.write(f"{checkpoint} on {data}; results go to {out}\n")
        return 0
    make_output(out)
    return _evaluate(cfg, checkpoint, settings, out)


def _file(cfg: Config) -> Path:
    """The weight file that --checkpoint means: of a run directory the best, else the newest."""
    given = cfg.checkpoint
    if given.is_dir():
        best = sorted(given.glob("best_retrieval_*.pth"))
        found = [*best, *(path for path in (given / "last.pt",) if path.is_file())]
        if not found:
            raise UserError(f"{given} holds no best_….pth and no last.pt: is it a run directory?")
        return found[0]
    if given.is_file():
        return given
    way = "type run_scripts/run_arcface.py --demo first" if cfg.tool.demo else "train one, or type"
    raise UserError(f"{given} is missing: {way}{'' if cfg.tool.demo else ' --checkpoint PATH'}")


def _settings(cfg: Config, checkpoint: Path) -> "Settings":
    from arcface import run_settings

    overrides = run_settings.Overrides(cfg.cfg_options, cfg.data_root)
    if cfg.config:
        return run_settings.load(cfg.config, overrides, Path.cwd())
    return run_settings.load_stored(checkpoint.parent, overrides, Path.cwd())


def _evaluate(cfg: Config, checkpoint: Path, settings: "Settings", out: Path) -> int:
    from arcface import evaluation_report, trained
    from shared import report
    from shared.device import resolve

    device = resolve(cfg.tool.device, 0, os.environ)
    result = trained.evaluate(
        settings, checkpoint, device,
        amp=cfg.tool.amp, batch_size=cfg.batch_size, limit=cfg.limit,
    )  # fmt: skip
    written = evaluation_report.write(out, result, examples=cfg.examples, seed=cfg.seed)
    report.refresh(out.parent)  # of the run, whose report shows the page
    sys.stdout.write(evaluation_report.text_table(result) + "\n")
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(launch_alone(main))
