"""What clipfilter2.py does: scores for all views, the best of each vase, the reports."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared import distributed
from shared.distributed import World
from shared.errors import UserError
from shared.files import write_json, write_text
from shared.page import Page
from vasevqa.filter import clip_model, clip_source, contact_sheet, rows, views
from vasevqa.filter import prompts as prompt_files
from vasevqa.filter.embedding_cache import EmbeddingCache
from vasevqa.filter.filter_report import write_stream
from vasevqa.filter.job import Job
from vasevqa.filter.ledger import Ledger
from vasevqa.filter.placing import Folders
from vasevqa.filter.rows import Parts, Row
from vasevqa.filter.scoring import Scorer, list_pictures
from vasevqa.filter.views import Vase

if TYPE_CHECKING:
    from vasevqa.filter.clipfilter2 import Config

log = logging.getLogger(__name__)

BEST_VIEWS = "best_views"
NAMED, SHOWN = 10, 48  # unmatched files in the log; vases on the page


@dataclass
class Tally:
    """Running numbers over the selected views; what was left out, and why."""

    vases: int = 0
    views: int = 0
    unmatched: list[str] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    without_view: list[str] = field(default_factory=list)
    distribution: Counter[int] = field(default_factory=Counter)
    total: float = 0.0
    squares: float = 0.0
    lowest: float = float("inf")
    highest: float = float("-inf")

    def add(self, vase: Vase, score: float) -> None:
        """Count a vase and its selected view's score."""
        self.vases += 1
        self.total += score
        self.squares += score * score
        self.lowest, self.highest = min(self.lowest, score), max(self.highest, score)
        self.distribution[len(vase.views)] += 1

    @property
    def mean(self) -> float:
        """The mean score of the selected views; 0 without any."""
        return self.total / self.vases if self.vases else 0.0

    @property
    def std(self) -> float:
        """Their standard deviation, as numpy's."""
        if not self.vases:
            return 0.0
        return max(0.0, self.squares / self.vases - self.mean**2) ** 0.5


def select_views(cfg: Config) -> int:
    """Select; the exit code."""
    world = distributed.setup(cfg.tool.device, cfg.timeout)
    began = time.monotonic()
    names = list_pictures(cfg.input_dir)
    with Job(cfg.state_dir, cfg, world) as job:
        source = clip_source.find(cfg.model_cache_dir, cfg.clip_model, cfg.pretrained)
        clip = clip_model.load(source, world.device, cfg.tool.amp)
        with EmbeddingCache(cfg.cache_dir, clip.identity, clip.dim) as cache:
            prompts = prompt_files.read(cfg.prompts)
            scorer = Scorer(clip, prompts, cache, cfg.batch_size, cfg.workers)
            parts = Parts(cfg.state_dir / f"scores-{scorer.identity}", world)
            scorer.run(job, parts, cfg.input_dir, names, "scoring")
            code = job.finish() if job.meet() else _conclude(cfg, world, job, parts, names, began)
    distributed.cleanup(world)
    return code


def _conclude(
    cfg: Config, world: World, job: Job, parts: Parts, names: list[str], began: float
) -> int:
    """Select and report, on rank 0: there is one small file a vase to bring."""
    if not world.is_main:
        return job.finish()
    tally = Tally()
    present = rows.keys_of(cfg.input_dir, names)
    matched = _matched(cfg, parts, tally)
    with Ledger.build(cfg.state_dir / "decision.db", matched, present) as ledger:
        _note_left_out(cfg, ledger, tally)
        if not ledger.mark_best(vase.best.filename for vase in _vases(ledger) if vase.best):
            raise UserError(
                f"no vase in {cfg.input_dir}: {len(tally.unmatched)} of {len(ledger)} names do not "
                f"match --pattern {cfg.pattern}, {len(tally.unreadable)} files cannot be read; "
                "nothing was selected"
            )
        folders = Folders(cfg.input_dir, cfg.output_dir, (BEST_VIEWS,), cfg.link)
        for _ in folders.place(ledger.share(0, 1, BEST_VIEWS)):
            pass
        folders.move_strays(ledger, cfg.state_dir / "aside")
        outputs = _write(cfg, ledger, tally, time.monotonic() - began)
    return job.finish(
        f"{tally.vases} vases, {tally.views} views, {len(tally.unmatched)} names do not match, "
        f"{len(tally.unreadable)} unreadable",
        outputs=[str(path) for path in outputs],
        data={"vases": tally.vases, "views": tally.views, "unreadable": len(tally.unreadable),
              "unmatched": len(tally.unmatched)},
    )  # fmt: skip


def _matched(cfg: Config, parts: Parts, tally: Tally) -> Iterator[Row]:
    """The rows with the vase and view of their names; the ledger sorts them by vase."""
    pattern = re.compile(cfg.pattern, re.IGNORECASE)
    for row in parts:
        found = views.parse_name(pattern, row["filename"])
        name, view = found or ("", 0)
        yield row | {"vase": name.upper(), "written": name, "view": view}


def _vases(ledger: Ledger) -> Iterator[Vase]:
    return views.vases(row for row in ledger.rows(order="vase") if row["vase"])


def _note_left_out(cfg: Config, ledger: Ledger, tally: Tally) -> None:
    for row in ledger.rows():
        if not row["vase"]:
            tally.unmatched.append(row["filename"])
            if len(tally.unmatched) <= NAMED:
                log.warning("kept out: %s does not match --pattern", row["filename"])
        elif "problem" in row:
            tally.unreadable.append({"filename": row["filename"], "reason": row["problem"]})
    if len(tally.unmatched) > NAMED:
        log.warning("%d more names do not match", len(tally.unmatched) - NAMED)
    for vase in _vases(ledger):
        tally.views += len(vase.views)
        if vase.best:
            tally.add(vase, vase.best.score)
        else:
            tally.without_view.append(vase.id)
            log.warning("vase %s: no view can be read", vase.id)


def _write(cfg: Config, ledger: Ledger, tally: Tally, seconds: float) -> list[Path]:
    names = ("best_views_report.json", "filtering_stats.json", "best_views.html")
    paths = [cfg.output_dir / name for name in names]
    results = (vase.result() for vase in _vases(ledger) if vase.best)
    write_stream(paths[0], _head(cfg, len(ledger), tally, seconds), results)
    write_json(paths[1], _statistics(len(ledger), tally, seconds))
    write_text(paths[2], _page(cfg, ledger, tally).render())
    return paths


def _head(cfg: Config, total: int, tally: Tally, seconds: float) -> dict[str, Any]:
    return {
        "input_directory": str(cfg.input_dir),
        "output_directory": str(cfg.output_dir),
        "processing_time_seconds": seconds,
        "total_vases": tally.vases,
        "total_original_images": total,
        "total_selected_images": tally.vases,
        "reduction_rate": 1 - tally.vases / total,
        "average_clip_score": tally.mean,
        "pattern": cfg.pattern,
        "unmatched_files": tally.unmatched,
        "unreadable_files": tally.unreadable,
        "vases_without_readable_view": tally.without_view,
    }


def _statistics(total: int, tally: Tally, seconds: float) -> dict[str, Any]:
    return {
        "summary": {
            "total_vases": tally.vases,
            "original_images": total,
            "selected_images": tally.vases,
            "reduction_rate": f"{100 * (1 - tally.vases / total):.1f}%",
            "average_clip_score": f"{tally.mean:.4f}",
            "processing_time_minutes": seconds / 60,
            "unmatched_files": len(tally.unmatched),
            "unreadable_files": len(tally.unreadable),
        },
        "view_distribution": {str(n): count for n, count in sorted(tally.distribution.items())},
        "clip_score_stats": {
            "min": tally.lowest,
            "max": tally.highest,
            "mean": tally.mean,
            "std": tally.std,
        },
    }


def _page(cfg: Config, ledger: Ledger, tally: Tally) -> Page:
    page = Page("Best views")
    page.text(f"{tally.vases} vases with {tally.views} readable views in {cfg.input_dir}.")
    page.section("The selected view and the others")
    cells = []
    for vase, _ in zip((v for v in _vases(ledger) if v.best), range(SHOWN), strict=False):
        ordered = sorted(vase.views, key=lambda view: view.rank)
        captions = [(view.filename, f"view {view.number}: {view.score:.4f}") for view in ordered]
        cells.append((vase.id, contact_sheet.gallery(cfg.input_dir, captions[:6])))
    page.table(("vase", "best first"), cells)
    if tally.unmatched:
        page.section("Names that do not match")
        page.table(("file",), [(name,) for name in tally.unmatched[:200]])
    return page
