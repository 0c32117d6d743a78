"""Evaluate a trained retriever: Recall@1/10/20/30/40 and mAP@10 of every query picture.

python evaluate.py --checkpoint work_dirs/resnet50-arcface_8xb32_inshop     its best epoch
python evaluate.py --checkpoint …/epoch_50.pth --data-root /data/inshop     one file, other place
python evaluate.py --checkpoint … --limit 500                               500 queries only
python evaluate.py --checkpoint … --gallery DIR --query DIR --out DIR    pictures of your own
python evaluate.py --demo                         what run_arcface.py --demo has trained

Prints a table and writes retrieval.json, retrieval.txt and a contact sheet: queries with their ten
nearest pictures, right and wrong ones marked. Of your own pictures, in directories <class>/<image>
or not, it writes neighbours.json, neighbours.csv and the contact sheet.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ToolOptions, option, parse
from shared.errors import UserError
from shared.files import make_output, read_object
from shared.launch import launch_alone
from shared.settings import Count, Seed

if TYPE_CHECKING:  # torch comes after the input is checked
    from arcface.inshop_retrieval.encoders import Encoder, Preprocess
    from arcface.inshop_retrieval.evaluation import Context
    from arcface.inshop_retrieval.recipe import Recipe, Settings
    from shared.distributed import World

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
    gallery: Path | None = option(None, "a directory of pictures to search in, with --query")
    query: Path | None = option(None, "a directory of pictures to search for, with --gallery")
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
    if cfg.gallery or cfg.query:
        return _search(cfg, checkpoint)
    settings, seed = _settings(cfg, checkpoint)
    out = cfg.out or checkpoint.parent / "evaluation"
    from arcface.inshop_retrieval.recipe import check_data

    parts = {"val_dataloader": settings.recipe.query, "model.prototype": settings.recipe.gallery}
    remarks = check_data(parts, seed)
    # an evaluation makes those of the data when it opens the lists
    for remark in [*settings.remarks, *(remarks if cfg.tool.dry_run else ())]:
        log.warning(remark)
    if cfg.tool.dry_run:
        sys.stdout.write(f"{checkpoint} on {settings.recipe.query.root}; results go to {out}\n")
        return 0
    make_output(out)
    return _evaluate(cfg, checkpoint, settings.recipe, seed, out)


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


def _settings(cfg: Config, checkpoint: Path) -> tuple[Settings, int]:
    """The settings, and the seed that a directory without a list was split by."""
    from arcface.inshop_retrieval import recipe

    run = read_object(checkpoint.parent / "config.json").get("settings")
    seed = run.get("seed") if isinstance(run, dict) else None
    over = recipe.Overrides(cfg.cfg_options, cfg.data_root, seed=seed if type(seed) is int else 0)
    return recipe.settle(_configuration(cfg, checkpoint), over, Path.cwd()), over.seed


def _configuration(cfg: Config, checkpoint: Path) -> dict[str, Any]:
    """That of --config or, without one, of the run beside the checkpoint."""
    from arcface.inshop_retrieval import recipe
    from arcface.inshop_retrieval.config import find_config, read_config

    if cfg.config:
        return read_config(find_config(cfg.config, Path.cwd()))
    return recipe.stored_configuration(checkpoint.parent)


def _search(cfg: Config, checkpoint: Path) -> int:
    """Find what is nearest to each picture of --query in --gallery."""
    from arcface.inshop_retrieval import recipe as recipes
    from shared.images import find_images

    for flag, folder in (("--gallery", cfg.gallery), ("--query", cfg.query)):
        if folder is None or not find_images(folder):
            what = "is missing: type both" if folder is None else f"{folder} holds no picture"
            raise UserError(f"{flag} {what}; --gallery DIR is searched for each picture of --query")
    assert cfg.gallery and cfg.query
    out = cfg.out or checkpoint.parent / "neighbours"
    over = recipes.Overrides(cfg.cfg_options)
    settings = recipes.without_data(_configuration(cfg, checkpoint), over, Path.cwd())
    if cfg.tool.dry_run:
        sys.stdout.write(f"{checkpoint}: {cfg.query} in {cfg.gallery}; results go to {out}\n")
        return 0
    make_output(out)
    from arcface.inshop_retrieval import evaluation
    from arcface.inshop_retrieval.inshop import InShop
    from arcface.inshop_retrieval.pipeline import build_pipeline

    loader = settings.recipe.query
    pipeline = build_pipeline(loader.pipeline, "val_dataloader.dataset.pipeline")
    query, gallery = (
        evaluation.Split(
            InShop.of_files(folder, pipeline), cfg.batch_size or loader.batch_size, loader.workers
        )
        for folder in (cfg.query, cfg.gallery)
    )
    encoder, preprocess, world, autocast = _model(cfg, checkpoint, settings.recipe)
    rows = evaluation.nearest(encoder, preprocess, query, gallery, world, autocast)
    written = evaluation.write_neighbours(
        out, rows, query, gallery, checkpoint=checkpoint, examples=cfg.examples, seed=cfg.seed
    )
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0


def _model(
    cfg: Config, checkpoint: Path, recipe: Recipe
) -> tuple[Encoder, Preprocess, World, Context]:
    """The trained encoder and its normalisation on the device, and the precision to embed in."""
    import torch

    from arcface.inshop_retrieval import encoders
    from shared.amp import Amp
    from shared.device import keep_freed_memory, resolve
    from shared.distributed import World

    device = resolve(cfg.tool.device, 0, os.environ)
    if device.type == "cpu":
        keep_freed_memory()
    encoder = encoders.build_encoder(recipe.encoder, "random")
    encoders.load_weights(encoder, None, checkpoint)
    encoder.to(device).to(memory_format=torch.channels_last)
    preprocess = encoders.Preprocess(recipe.mean, recipe.std).to(device)
    return encoder, preprocess, World(device=device), Amp(cfg.tool.amp, device).autocast


def _evaluate(cfg: Config, checkpoint: Path, recipe: Recipe, seed: int, out: Path) -> int:
    import torch

    from arcface.inshop_retrieval import evaluation
    from shared import report

    encoder, preprocess, world, autocast = _model(cfg, checkpoint, recipe)
    query, gallery = (
        replace(split, batch_size=cfg.batch_size or split.batch_size)
        for split in (evaluation.open_split(part, seed) for part in (recipe.query, recipe.gallery))
    )
    total = len(query.dataset)
    if cfg.limit and cfg.limit < total:
        query = replace(query, numbers=torch.arange(cfg.limit) * total // cfg.limit)
    outcome = evaluation.evaluate(
        encoder, preprocess, query, gallery, world, autocast=autocast,
        recall_at=recipe.depths("Recall"), map_at=recipe.depths("mAP"),
    )  # fmt: skip
    written = evaluation.write_figures(
        out, outcome, query, gallery, checkpoint=checkpoint, data=str(recipe.query.root),
        examples=cfg.examples, seed=cfg.seed,
    )  # fmt: skip
    report.refresh(out.parent)  # of the run, whose report shows the page
    sys.stdout.write(evaluation.text_table(outcome, query, gallery) + "\n")
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(launch_alone(main))
