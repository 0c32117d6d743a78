"""What clipfilter1.py does: a sample, a threshold, scores for all, a decision, its report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shared import distributed
from shared.distributed import World
from vasevqa.filter import clip_model, clip_source, decision, filter_report, rows
from vasevqa.filter import prompts as prompt_files
from vasevqa.filter.decision import Threshold
from vasevqa.filter.embedding_cache import EmbeddingCache
from vasevqa.filter.job import Job
from vasevqa.filter.ledger import QUARANTINE, Ledger
from vasevqa.filter.placing import Folders
from vasevqa.filter.rows import Parts
from vasevqa.filter.scoring import Scorer, list_pictures

if TYPE_CHECKING:
    from vasevqa.filter.clipfilter1 import Config

log = logging.getLogger(__name__)

ACCEPTED, REJECTED = "accepted", "rejected"
FOLDERS = (ACCEPTED, REJECTED, QUARANTINE)
Ask = Callable[[float], float | None]


def filter_pictures(cfg: Config, ask: Ask | None) -> int:
    """Filter; the exit code. ask: confirms a threshold that a sample proposes."""
    world = distributed.setup(cfg.tool.device, cfg.timeout)
    names = list_pictures(cfg.input_dir)
    with Job(cfg.state_dir, cfg, world) as job:
        scorer = open_scorer(cfg, world)
        with scorer.cache:
            code = _Filtering(cfg, world, job, scorer, names).run(ask)
    distributed.cleanup(world)
    return code


def open_scorer(cfg: Config, world: World) -> Scorer:
    """The CLIP of the settings with its prompts and cache."""
    source = clip_source.find(cfg.model_cache_dir, cfg.clip_model, cfg.pretrained)
    clip = clip_model.load(source, world.device, cfg.tool.amp)
    cache = EmbeddingCache(cfg.cache_dir, clip.identity, clip.dim)
    return Scorer(clip, prompt_files.read(cfg.prompts), cache, cfg.batch_size, cfg.workers)


class _Filtering:
    """One run of the filter, step after step; every rank takes every step."""

    def __init__(
        self, cfg: Config, world: World, job: Job, scorer: Scorer, names: list[str]
    ) -> None:
        self._cfg, self._world, self._job = cfg, world, job
        self._scorer, self._names = scorer, names
        self._parts = Parts(cfg.state_dir / f"scores-{scorer.identity}", world)
        self._began = time.monotonic()

    def run(self, ask: Ask | None) -> int:
        threshold = Threshold(self._cfg.threshold or 0.0, "typed")
        if self._cfg.threshold is None or self._cfg.analyze_only:
            if self._score(rows.sample(self._names, self._cfg.sample_size, self._cfg.seed)):
                return self._job.finish()
            chosen = self._analyse(ask)
            if self._cfg.analyze_only or chosen is None:
                return self._job.finish(
                    "analysed" if chosen else "not filtered: not confirmed",
                    outputs=[str(self._analysis)],
                )
            threshold = chosen
        if self._score(self._names):
            return self._job.finish()
        self._decide(threshold)
        if self._place():
            return self._job.finish()
        return self._conclude(threshold)

    def _score(self, names: list[str]) -> bool:
        """Rows for `names`, by all ranks; whether the run is to stop."""
        self._scorer.run(self._job, self._parts, self._cfg.input_dir, names, "scoring")
        return self._job.meet()

    @property
    def _analysis(self) -> Path:
        return self._cfg.output_dir / "analysis.json"

    def _analyse(self, ask: Ask | None) -> Threshold | None:
        """The sample's statistics, printed and stored; the threshold, the same on every rank."""
        chosen: Threshold | None = None
        if self._world.is_main:
            cfg = self._cfg
            drawn = rows.sample(self._names, cfg.sample_size, cfg.seed)
            present = rows.keys_of(cfg.input_dir, drawn)
            with Ledger.build(cfg.state_dir / "sample.db", self._parts, present) as ledger:
                scores = list(ledger.scores())
                chosen = decision.from_sample(scores, cfg.keep or decision.KEEP)
                filter_report.write_analysis(self._analysis, scores, ledger, chosen, len(drawn))
            if ask and not cfg.analyze_only:
                value = ask(chosen.value)
                is_proposed = value == chosen.value
                chosen = (
                    None
                    if value is None
                    else chosen if is_proposed else Threshold(value, "typed")
                )  # fmt: skip
        return distributed.broadcast_object(chosen, self._world)

    @property
    def _database(self) -> Path:
        return self._cfg.state_dir / "decision.db"

    def _decide(self, threshold: Threshold) -> None:
        if self._world.is_main:
            present = rows.keys_of(self._cfg.input_dir, self._names)
            with Ledger.build(self._database, self._parts, present) as ledger:
                if len(ledger) != len(self._names):
                    log.warning("%d files came, went or changed while they were scored",
                                abs(len(ledger) - len(self._names)))  # fmt: skip
                ledger.decide(ACCEPTED, REJECTED, threshold.value)
                ledger.group_duplicates(ACCEPTED)
                if self._cfg.dedup:
                    ledger.reject_duplicates(ACCEPTED, REJECTED)
                ledger.refuse_mostly_unreadable(self._cfg.max_unreadable, "filtered")
        distributed.barrier(self._world)

    @property
    def _folders(self) -> Folders:
        return Folders(self._cfg.input_dir, self._cfg.output_dir, FOLDERS, self._cfg.link)

    def _place(self) -> bool:
        """This rank's files into their folders; whether the run is to stop."""
        with Ledger(self._database) as ledger:
            return self._folders.place_share(ledger, self._job, self._world)

    def _conclude(self, threshold: Threshold) -> int:
        outputs: list[str] = []
        counts: dict[str, int] = {}
        if self._world.is_main:
            cfg = self._cfg
            with Ledger(self._database) as ledger:
                self._folders.move_strays(ledger, cfg.state_dir / "aside")
                seconds = time.monotonic() - self._began
                report = filter_report.Report(cfg.input_dir, cfg.output_dir, threshold, seconds)
                outputs = [str(path) for path in report.write(ledger, self._scorer.prompts)]
                counts = ledger.counts()
        accepted, total = counts.get(ACCEPTED, 0), sum(counts.values())
        return self._job.finish(
            f"{accepted} of {total} pictures accepted (score at least {threshold.value:.4f}), "
            f"{counts.get(REJECTED, 0)} rejected, {counts.get(QUARANTINE, 0)} unreadable",
            outputs=outputs,
            data=counts,
        )
