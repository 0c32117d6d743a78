r"""Of each vase keep the view that CLIP finds best.

python clipfilter2.py --input_dir ./filtered_vases/accepted
python clipfilter2.py --pattern '^(.+)-(\d+)\.png$'       other names: (vase)-(view).png
torchrun --nproc_per_node 4 clipfilter2.py                four processes share the files
python clipfilter2.py --demo                              the built-in pictures

score = cos(picture, mean of the good prompts of prompts.txt). Pictures that clipfilter1.py has seen
are not encoded again. Writes best_views/, best_views_report.json, filtering_stats.json,
best_views.html. A file whose name does not match --pattern is named in the report and not selected.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ProcessOptions, ToolOptions, option, parse
from shared.errors import UserError, shown
from shared.files import open_lock, write_json, write_text
from shared.launch import launch
from shared.settings import Count, Seconds, Workers

if TYPE_CHECKING:
    from vasevqa.filter.place import Table
    from vasevqa.filter.scores import Pass

FILTER = Path(__file__).resolve().parent
INPUT_DIR = FILTER / "filtered_vases" / "accepted"
OUTPUT_DIR = FILTER / "filtered_vases"
BEST_VIEWS = "best_views"
NAMED, SHOWN = 10, 48  # files in the log that do not match; vases on the page
PATTERN = r"^([A-F0-9-]+)_(\d+)_ac001001\.jpg$"  # vase, view; upper or lower case

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the selection."""

    input_dir: Path = option(INPUT_DIR, "folder of pictures, any depth")
    output_dir: Path = option(OUTPUT_DIR, "where best_views/ and the reports go")
    pattern: str = option(
        PATTERN, "regular expression of names: group 1 the vase, group 2 the view"
    )
    model_cache_dir: Path | None = option(
        None, "folder of a CLIP, or cache of the hub; default: ./model, then ./CLIP/model"
    )
    clip_model: str = option("ViT-B-32-quickgelu", "open_clip's name of the network")
    pretrained: str = option("openai", "open_clip's name of the weights, for the hub")
    prompts: Path = option(FILTER / "prompts.txt", "file of the prompts; [high] counts here")
    link: bool = option(False, "symbolic links in place of copies")
    batch_size: Count = option(32, "pictures encoded at a time")
    workers: Workers = option(2, "processes that decode pictures, for each process")
    cache_dir: Path | None = option(None, "where embeddings are kept; default: <output_dir>")
    resume: Literal["auto", "never"] = option(
        "auto", "auto: use the scores that are there; never: score again", const="auto"
    )
    run_dir: Path | None = option(None, "status and scores; default: <output_dir>/.clipfilter2")
    timeout: Seconds = option(3600.0, "seconds one process waits for another")
    tool: ToolOptions = field(default_factory=ToolOptions)
    processes: ProcessOptions = field(default_factory=ProcessOptions)

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        try:
            groups = re.compile(self.pattern).groups
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"pattern {shown(self.pattern)} is no regular expression: {error}"
            ) from None
        if groups < 2:
            raise ValueError(
                f"pattern {shown(self.pattern)} has {groups} group(s): it needs (vase) and (view)"
            )

    @property
    def state_dir(self) -> Path:
        """Where status, scores and lock are."""
        return self.run_dir or self.output_dir / ".clipfilter2"


def main(argv: list[str] | None = None) -> int:
    """Check the input, then select; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.tool.demo:
        from vasevqa.filter import demo

        cfg = replace(cfg, **demo.for_clipfilter2(cfg.tool.typed))
    _check(cfg)
    if cfg.tool.dry_run:
        from shared.images import find_images

        print(f"{len(find_images(cfg.input_dir))} pictures of {cfg.input_dir} → {cfg.output_dir}")
        return 0
    os.close(open_lock(cfg.state_dir))  # better refused now than after the model was loaded
    return select_views(cfg)


def _check(cfg: Config) -> None:
    """Refuse missing inputs in one line each, before anything slow is imported."""
    from vasevqa.filter import clip

    if not cfg.input_dir.is_dir():
        raise UserError(
            f"--input_dir {cfg.input_dir} is not a folder: filter the pictures with "
            "./clipfilter1.sh first, or give the folder with the pictures"
        )
    if (cfg.output_dir / BEST_VIEWS).resolve().is_relative_to(cfg.input_dir.resolve()):
        raise UserError(
            f"--output_dir {cfg.output_dir}: best_views/ would lie inside --input_dir "
            f"{cfg.input_dir}, and be read again; choose a folder beside it"
        )
    clip.read_prompts(cfg.prompts)
    clip.find(cfg.model_cache_dir, cfg.clip_model, cfg.pretrained)


# --- the selection --------------------------------------------------------------------------------


def select_views(cfg: Config) -> int:
    """The whole selection; the exit code."""
    from shared import distributed
    from vasevqa.filter import clip, scores

    world = distributed.setup(cfg.tool.device, cfg.timeout)
    names = scores.list_pictures(cfg.input_dir)
    with scores.Pass(cfg.state_dir, cfg, world) as run:
        source = clip.find(cfg.model_cache_dir, cfg.clip_model, cfg.pretrained)
        kept = cfg.cache_dir or cfg.output_dir
        scorer = clip.Scorer(source, cfg.prompts, kept, world, cfg.tool.amp)
        run.open_scores(scorer.made_by)
        ending: dict[str, Any] = {}
        is_stopped = scorer.score(run, cfg.input_dir, names, cfg.batch_size, cfg.workers)
        if not is_stopped:
            ending = _select(cfg, run, names) if world.is_main else {}
            is_stopped = run.meet()
        code = run.finish(**({} if is_stopped else ending))
    distributed.cleanup(world)
    return code


@dataclass
class Vase:
    """A vase: the rows of its readable views, by view number, and of those that cannot be read."""

    id: str  # as its first file is called
    views: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the views
    unreadable: list[int] = field(default_factory=list)
    best: int = -1  # the row of the selected view

    @property
    def total(self) -> int:
        """How many files it has."""
        return len(self.views) + len(self.unreadable)


def parse_name(pattern: re.Pattern[str], filename: str) -> tuple[str, int] | None:
    """(vase, view) of a file, from the last part of its path; None when it does not match."""
    found = pattern.search(filename.rpartition("/")[2])
    if found is None or found[1] is None or not (found[2] or "").isdigit():
        return None
    return found[1], int(found[2])


def group(table: Table, pattern: re.Pattern[str]) -> tuple[list[Vase], list[str]]:
    """The vases of a table, by name, with their best views, and the files that do not match.

    Case alone makes no other vase. The best view has the highest score; of equals it is the one
    with the lowest number, then the first by name.
    """
    vases: dict[str, Vase] = {}
    unmatched = []
    readable = table.is_readable
    for row, filename in enumerate(table.names):
        found = parse_name(pattern, filename)
        if found is None:
            unmatched.append(filename)
            continue
        vase = vases.setdefault(found[0].upper(), Vase(found[0]))
        if readable[row]:
            vase.views.append(row)
            vase.numbers.append(found[1])
        else:
            vase.unreadable.append(row)
    for vase in vases.values():
        order = sorted(zip(vase.numbers, vase.views, strict=True))
        vase.numbers, vase.views = [n for n, _ in order], [row for _, row in order]
        vase.best = max(vase.views, key=lambda row: table.scores[row], default=-1)
    return [vases[name] for name in sorted(vases)], unmatched


def _select(cfg: Config, run: Pass, names: list[str]) -> dict[str, Any]:
    """Select, bring the views to best_views/, report; what the run ends with."""
    from vasevqa.filter import place

    table = run.table(cfg.input_dir, names, ("high",))
    vases, unmatched = group(table, re.compile(cfg.pattern, re.IGNORECASE))
    selected = [vase for vase in vases if vase.views]
    unreadable = table.unreadable()
    if not selected:
        raise UserError(
            f"no vase in {cfg.input_dir}: {len(unmatched)} of {len(table)} names do not match "
            f"--pattern {cfg.pattern}, {len(unreadable)} files cannot be read; nothing was selected"
        )
    for name in unmatched[:NAMED]:
        log.warning("kept out: %s does not match --pattern", name)
    if len(unmatched) > NAMED:
        log.warning("%d more names do not match", len(unmatched) - NAMED)
    without_view = [vase.id for vase in vases if not vase.views]
    for name in without_view:
        log.warning("vase %s: no view can be read", name)
    table.places[[vase.best for vase in selected]] = BEST_VIEWS
    if not run.place(place.Folders(cfg.input_dir, cfg.output_dir, (BEST_VIEWS,), cfg.link), table):
        return {}
    more = {"unmatched_files": unmatched, "unreadable_files": unreadable,
            "vases_without_readable_view": without_view}  # fmt: skip
    outputs = _write(cfg, table, vases, more, run.seconds)
    views = sum(len(vase.views) for vase in vases)
    return {
        "reason": f"{len(selected)} vases, {views} views, {len(unmatched)} names do not match, "
        f"{len(unreadable)} unreadable",
        "outputs": outputs,
        "data": {"vases": len(selected), "views": views, "unreadable": len(unreadable),
                 "unmatched": len(unmatched)},
    }  # fmt: skip


# --- reports --------------------------------------------------------------------------------------


def _write(
    cfg: Config, table: Table, vases: list[Vase], more: dict[str, Any], seconds: float
) -> list[Path]:
    """best_views_report.json, filtering_stats.json, best_views.html.

    As in the original, vases and images are those whose names match, readable or not.
    """
    from vasevqa.filter import place

    selected = [vase for vase in vases if vase.views]
    scores = table.scores[[vase.best for vase in selected]]
    images = sum(vase.total for vase in vases)
    reduction = 1 - len(selected) / images
    head = {
        "input_directory": str(cfg.input_dir),
        "output_directory": str(cfg.output_dir),
        "processing_time_seconds": seconds,
        "total_vases": len(vases),
        "total_original_images": images,
        "total_selected_images": len(selected),
        "reduction_rate": reduction,
        "average_clip_score": float(scores.mean()),
        "pattern": cfg.pattern,
        **more,
    }
    summary = {
        "total_vases": len(vases),
        "original_images": images,
        "selected_images": len(selected),
        "reduction_rate": f"{100 * reduction:.1f}%",
        "average_clip_score": f"{scores.mean():.4f}",
        "processing_time_minutes": f"{seconds / 60:.1f}",
        "unmatched_files": len(more["unmatched_files"]),
        "unreadable_files": len(more["unreadable_files"]),
    }
    distribution = Counter(vase.total for vase in vases)
    names = ("best_views_report.json", "filtering_stats.json", "best_views.html")
    paths = [cfg.output_dir / name for name in names]
    place.write_report(paths[0], head, (_result(table, vase) for vase in selected))
    write_json(paths[1], {
        "summary": summary,
        "view_distribution": {str(n): count for n, count in sorted(distribution.items())},
        "clip_score_stats": {
            "min": float(scores.min()),
            "max": float(scores.max()),
            "mean": float(scores.mean()),
            "std": float(scores.std()),
        },
    })  # fmt: skip
    write_text(paths[2], _page(cfg, table, selected, more["unmatched_files"]))
    return paths


def _result(table: Table, vase: Vase) -> dict[str, Any]:
    """The vase's entry in best_views_report.json."""
    views = [
        {
            "view_number": number,
            "filename": table.names[row],
            "clip_score": float(table.scores[row]),
        }
        for number, row in zip(vase.numbers, vase.views, strict=True)
    ]
    best = views[vase.views.index(vase.best)]
    found = {
        "vase_id": vase.id,
        "selected_view": best["view_number"],
        "selected_filename": best["filename"],
        "clip_score": best["clip_score"],
        "total_views": vase.total,
        "reason": "only_one_view" if vase.total == 1 else "best_clip_score",
    }
    if vase.total > 1:
        found["all_view_scores"] = views
    if vase.unreadable:
        found["unreadable_views"] = [table.names[row] for row in vase.unreadable]
    return found


def _page(cfg: Config, table: Table, vases: list[Vase], unmatched: Sequence[str]) -> str:
    from shared.page import Page
    from vasevqa.filter import place

    page, scores = Page("Best views"), table.scores
    views = sum(len(vase.views) for vase in vases)
    page.text(f"{len(vases)} vases with {views} readable views in {cfg.input_dir}.")
    page.section("The selected view and the others")
    cells = []
    for vase in vases[:SHOWN]:
        numbered = sorted(zip(vase.numbers, vase.views, strict=True), key=lambda v: -scores[v[1]])
        shown = [(table.names[row], f"view {n}: {scores[row]:.4f}") for n, row in numbered[:6]]
        cells.append((vase.id, place.gallery(cfg.input_dir, shown)))
    page.table(("vase", "best first"), cells)
    if unmatched:
        page.section("Names that do not match")
        page.table(("file",), [(name,) for name in unmatched[:200]])
    return page.render()


if __name__ == "__main__":
    sys.exit(launch(main))
