"""Keep the pictures that CLIP finds good: whole vases, seen well; put the others aside.

python clipfilter1.py --analyze_only --input_dir ./images3/1      how the scores lie, nothing else
python clipfilter1.py --input_dir ./images3/1 --threshold 0.15    accepted/ from this score on
python clipfilter1.py --keep 0.9                                  the best 90 % by a sample
python clipfilter1.py --threshold 0.2                             again: decided from known scores
torchrun --nproc_per_node 4 clipfilter1.py                        four processes share the files
python clipfilter1.py --demo                                      the built-in pictures

score = cos(picture, mean of good prompts) - cos(picture, mean of bad prompts); the prompts are in
prompts.txt. Writes accepted/, rejected/, quarantine/ (what cannot be read), filtering_report.json
and .jsonl, contact_sheet.html. The pictures of --input_dir stay as they are.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ProcessOptions, ToolOptions, option, parse
from shared.device import present_gpus, visible_gpus
from shared.errors import UserError
from shared.files import open_lock, write_json, write_text
from shared.launch import launch, world_size
from shared.settings import Count, Range, Seconds, Seed, Share, ShareAboveZero, Workers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vasevqa.filter.clip import Prompts, Scorer
    from vasevqa.filter.place import Row, Table
    from vasevqa.filter.scores import Pass

FILTER = Path(__file__).resolve().parent
INPUT_DIR = FILTER / "images3" / "1"
OUTPUT_DIR = FILTER / "filtered_vases"
SAMPLE_SIZE = 500
KEEP = 0.75  # share of the sample that a threshold of its own keeps
ACCEPTED, REJECTED = "accepted", "rejected"
SHOWN = 24  # pictures of a kind on the contact sheet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the filter."""

    input_dir: Path = option(INPUT_DIR, "folder of pictures, any depth")
    output_dir: Path = option(OUTPUT_DIR, "where accepted/, rejected/ and the report go")
    threshold: Annotated[float, Range(-2, 2)] | None = option(
        None, "lowest score to accept; default: from a sample"
    )
    keep: ShareAboveZero | None = option(
        None, "share of a sample that the threshold keeps (default: 0.75)"
    )
    analyze_only: bool = option(False, "score a sample, say how the scores lie, stop")
    sample_size: Count = option(SAMPLE_SIZE, "pictures of the sample, drawn by --seed")
    model_cache_dir: Path | None = option(
        None, "folder of a CLIP, or cache of the hub; default: ./model, then ./CLIP/model"
    )
    clip_model: str = option("ViT-B-32-quickgelu", "open_clip's name of the network")
    pretrained: str = option("openai", "open_clip's name of the weights, for the hub")
    auto_select_device: bool = option(False, "ask for the device, on a terminal")
    confirm: bool = option(False, "ask before filtering by a sample's threshold, on a terminal")
    yes: bool = option(False, "ask nothing")
    prompts: Path = option(FILTER / "prompts.txt", "file of the prompts, [high] and [low]")
    dedup: bool = option(False, "of accepted files with the same content keep one")
    link: bool = option(False, "symbolic links in place of copies")
    batch_size: Count = option(32, "pictures encoded at a time")
    workers: Workers = option(2, "processes that decode pictures, for each process")
    cache_dir: Path | None = option(None, "where embeddings are kept; default: <output_dir>")
    seed: Seed = option(0, "of the sample")
    max_unreadable: Share = option(0.5, "share of unreadable files above which the run stops")
    resume: Literal["auto", "never"] = option(
        "auto", "auto: use the scores that are there; never: score again", const="auto"
    )
    run_dir: Path | None = option(None, "status and scores; default: <output_dir>/.clipfilter1")
    timeout: Seconds = option(3600.0, "seconds one process waits for another")
    tool: ToolOptions = field(default_factory=ToolOptions)
    processes: ProcessOptions = field(default_factory=ProcessOptions)

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        if self.keep is not None and self.threshold is not None:
            raise ValueError("threshold and keep cannot both be given: leave one out")

    @property
    def state_dir(self) -> Path:
        """Where status, scores and lock are."""
        return self.run_dir or self.output_dir / ".clipfilter1"


def main(argv: list[str] | None = None) -> int:
    """Check the input, then filter; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.tool.demo:
        from vasevqa.filter import demo

        cfg = replace(cfg, **demo.for_clipfilter1(cfg.tool.typed))
    _check(cfg)
    if cfg.tool.dry_run:
        from shared.images import find_images

        print(f"{len(find_images(cfg.input_dir))} pictures of {cfg.input_dir} → {cfg.output_dir}")
        return 0
    os.close(open_lock(cfg.state_dir))  # better refused now than after the model was loaded
    if cfg.auto_select_device and not cfg.yes and world_size() == 1:
        cfg = replace(cfg, tool=replace(cfg.tool, device=_ask_for_device(cfg.tool.device)))
    return filter_pictures(cfg)


def _check(cfg: Config) -> None:
    """Refuse missing inputs in one line each, before anything slow is imported."""
    from vasevqa.filter import clip

    if not cfg.input_dir.is_dir():
        raise UserError(
            f"--input_dir {cfg.input_dir} is not a folder: sort the pictures with "
            "python classifier.py first, or give the folder with the pictures"
        )
    if cfg.output_dir.resolve().is_relative_to(cfg.input_dir.resolve()):
        raise UserError(
            f"--output_dir {cfg.output_dir} lies inside --input_dir {cfg.input_dir}: its pictures "
            "would be filtered again; choose a folder beside it"
        )
    clip.read_prompts(cfg.prompts)
    clip.find(cfg.model_cache_dir, cfg.clip_model, cfg.pretrained)


# --- the filter -----------------------------------------------------------------------------------


def filter_pictures(cfg: Config) -> int:
    """The whole filter; the exit code."""
    from shared import distributed
    from vasevqa.filter import clip, scores

    world = distributed.setup(cfg.tool.device, cfg.timeout)
    names = scores.list_pictures(cfg.input_dir)
    with scores.Pass(cfg.state_dir, cfg, world) as run:
        source = clip.find(cfg.model_cache_dir, cfg.clip_model, cfg.pretrained)
        kept = cfg.cache_dir or cfg.output_dir
        scorer = clip.Scorer(source, cfg.prompts, kept, world, cfg.tool.amp)
        run.open_scores(scorer.made_by)
        code = _filter(cfg, run, scorer, names, is_main=world.is_main)
    distributed.cleanup(world)
    return code


def _filter(cfg: Config, run: Pass, scorer: Scorer, names: list[str], *, is_main: bool) -> int:
    from vasevqa.filter import scores

    threshold, source = cfg.threshold, "typed"
    if threshold is None or cfg.analyze_only:
        drawn = scores.sample(names, cfg.sample_size, cfg.seed)
        if scorer.score(run, cfg.input_dir, drawn, cfg.batch_size, cfg.workers):
            return run.finish()
        if is_main:  # the others decide nothing
            threshold, source = _analyse(cfg, run.table(cfg.input_dir, drawn))
        analysis = [cfg.output_dir / "analysis.json"]
        if cfg.analyze_only:
            return run.finish("analysed", outputs=analysis)
        if cfg.confirm and _can_ask(cfg) and world_size() == 1:
            assert threshold is not None
            proposed, threshold = threshold, _ask_for_threshold(threshold)
            if threshold is None:
                return run.finish("not filtered: not confirmed", outputs=analysis)
            source = source if threshold == proposed else "typed"
    if scorer.score(run, cfg.input_dir, names, cfg.batch_size, cfg.workers):
        return run.finish()
    ending: dict[str, Any] = {}
    if is_main:
        assert threshold is not None
        ending = _place(cfg, run, names, scorer.prompts, (threshold, source))
    return run.finish() if run.meet() else run.finish(**ending)


def _analyse(cfg: Config, table: Table) -> tuple[float, str]:
    """Print and store how the scores of a sample lie; the threshold it proposes, and why."""
    import numpy as np

    from vasevqa.filter import place

    found = table.scores[table.is_readable]
    if not len(found):
        raise UserError("no picture of the sample can be read: there is nothing to decide from")
    keep = cfg.keep or KEEP
    threshold = float(np.percentile(found, 100 * (1 - keep)))
    source = f"keeps {keep:.0%} of a sample of {len(found)}"
    statistics, histogram = place.statistics(found), place.histogram(found)
    unreadable = {item["filename"]: item["reason"] for item in table.unreadable()}
    advice = [
        {"threshold": statistics[f"p{n}"], "percentile": n, "keeps": (100 - n) / 100}
        for n in place.PERCENTILES
    ]
    log.info("scores of %d pictures (%d of the sample unreadable):", len(found), len(unreadable))
    log.info("\n%s", place.text_histogram(histogram, threshold))
    log.info("mean %(mean).4f | std %(std).4f | min %(min).4f | median %(median).4f | "
             "max %(max).4f", statistics)  # fmt: skip
    for line in advice:
        log.info("threshold %.4f keeps about %.0f%%", line["threshold"], 100 * line["keeps"])
    log.info("proposed threshold: %.4f (%s)", threshold, source)
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(cfg.output_dir / "analysis.json", {
        "statistics": statistics,
        "recommendations": advice,
        "threshold": threshold,
        "threshold_source": source,
        "sample_size": len(table),
        "unreadable": unreadable,
        "histogram": histogram,
    })  # fmt: skip
    return threshold, source


def _place(
    cfg: Config, run: Pass, names: list[str], prompts: Prompts, threshold: tuple[float, str]
) -> dict[str, Any]:
    """Decide, bring the files to their folders, report; what the run ends with."""
    from vasevqa.filter.place import QUARANTINE, Folders

    table = run.table(cfg.input_dir, names, ("score", "high", "low"))
    table.decide(threshold[0], ACCEPTED, REJECTED)
    table.find_duplicates(ACCEPTED)
    if cfg.dedup:
        table.reject_duplicates(ACCEPTED, REJECTED)
    table.refuse_mostly_unreadable(cfg.max_unreadable, "filtered")
    folders = Folders(cfg.input_dir, cfg.output_dir, (ACCEPTED, REJECTED, QUARANTINE), cfg.link)
    if not run.place(folders, table):
        return {}
    outputs = write_reports(cfg, table, prompts, threshold, run.seconds)
    counts = {place: table.count(place) for place in folders.names}
    return {
        "reason": f"{counts[ACCEPTED]} of {len(table)} pictures accepted (score at least "
        f"{threshold[0]:.4f}), {counts[REJECTED]} rejected, {counts[QUARANTINE]} unreadable",
        "outputs": outputs,
        "data": counts,
    }


# --- reports --------------------------------------------------------------------------------------


def write_reports(
    cfg: Config, table: Table, prompts: Prompts, threshold: tuple[float, str], seconds: float
) -> list[Path]:
    """filtering_report.json, the same rows with each prompt's score as JSON lines, the page."""
    from vasevqa.filter import place

    total = len(table)
    found = table.scores[table.is_readable]
    head: dict[str, Any] = {
        "input_directory": str(cfg.input_dir),
        "output_directory": str(cfg.output_dir),
        "total_images": total,
        "accepted_images": table.count(ACCEPTED),
        "rejected_images": table.count(REJECTED),
        "acceptance_rate": table.count(ACCEPTED) / total if total else 0.0,
        "threshold": threshold[0],
        "processing_time_seconds": seconds,
        "unreadable_images": table.count(place.QUARANTINE),
        "threshold_source": threshold[1],
        "prompts": {"high": prompts.high, "low": prompts.low},
        "unreadable": table.unreadable(),
    }
    if len(found):
        head["histogram"] = place.histogram(found)
    files = ("filtering_report.json", "filtering_report.jsonl", "contact_sheet.html")
    paths = [cfg.output_dir / name for name in files]
    place.write_report(paths[0], head, (found for found in _results(table) if found))
    place.write_lines(paths[1], _lines(table))
    write_text(paths[2], _sheet(cfg, table, head))
    return paths


def _results(table: Table) -> Iterator[dict[str, Any] | None]:
    """Each picture under the report's names; None for what cannot be read."""
    is_readable = table.is_readable
    for number, (name, (score, high, low), place, first) in enumerate(table.entries()):
        found: dict[str, Any] = {
            "filename": name,
            "quality_score": score,
            "high_quality_similarity": high,
            "low_quality_similarity": low,
            "accepted": place == ACCEPTED,
        }
        if first != number:
            found["same_content_as"] = table.names[first]
        yield found if is_readable[number] else None


def _lines(table: Table) -> Iterator[Row]:
    """Every picture's result, with the prompts' cosines of those that can be read."""
    for row, result in zip(table.rows(), _results(table), strict=True):
        if result is None:
            yield {"filename": row["filename"], "accepted": False, "problem": row["problem"]}
        else:
            yield result | {"prompt_scores": row["prompts"], "content": row["content"]}


def _sheet(cfg: Config, table: Table, head: dict[str, Any]) -> str:
    """The page with the pictures near the threshold, and the best and worst on either side."""
    import numpy as np

    from shared.page import Page
    from vasevqa.filter import place

    page, threshold = Page("CLIP filter"), head["threshold"]
    page.text(
        f"{head['accepted_images']} of {head['total_images']} pictures of {cfg.input_dir} "
        f"accepted: score at least {threshold:.4f} ({head['threshold_source']}). "
        f"{head['rejected_images']} rejected, {head['unreadable_images']} unreadable."
    )
    if "histogram" in head:
        edges, counts = head["histogram"]["edges"], head["histogram"]["counts"]
        steps = (np.repeat(edges, 2)[1:-1].tolist(), np.repeat(counts, 2).tolist())
        upright = ([threshold, threshold], [0, max(counts)])
        page.chart("Scores", {"pictures": steps, "threshold": upright},
                   x_label="score", y_label="pictures")  # fmt: skip
    best = np.argsort(-table.scores, kind="stable")  # NaN, what cannot be read, is last
    near = np.argsort(np.abs(table.scores - threshold), kind="stable")
    accepted, rejected = (best[table.places[best] == name] for name in (ACCEPTED, REJECTED))
    for heading, rows in {
        "Borderline: nearest to the threshold": near[table.is_readable[near]],
        "Accepted, the best": accepted,
        "Accepted, the worst": accepted[::-1],
        "Rejected, the best": rejected,
        "Rejected, the worst": rejected[::-1],
    }.items():
        page.section(heading)
        shown = [(table.names[n], table.scores[n], table.places[n]) for n in rows[:SHOWN]]
        captions = [(n, f"{s:+.4f} {p} {n.rpartition('/')[2]}") for n, s, p in shown]
        page.pictures(place.gallery(cfg.input_dir, captions))
    if head["unreadable"]:
        page.section("Unreadable")
        rows = [(item["filename"], item["reason"]) for item in head["unreadable"][:200]]
        page.table(("file", "reason"), rows)
    return page.render()


# --- questions on a terminal ----------------------------------------------------------------------


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _can_ask(cfg: Config) -> bool:
    return not cfg.yes and _is_terminal()


def processes_that_fit(argv: list[str], visible: int) -> int:
    """One process where a question is asked: of several, none has the terminal."""
    cfg = parse(Config, argv)
    asks = (cfg.auto_select_device or cfg.confirm) and _can_ask(cfg)
    return 1 if asks else visible


def _ask_for_device(chosen: str) -> str:
    """A device by its number in a list; without a terminal or an answer the one chosen."""
    devices = ["cpu", *(f"cuda:{n}" for n in range(visible_gpus(os.environ, present_gpus())))]
    if not _is_terminal():
        log.info("--auto_select_device asks on a terminal alone: device %s", chosen)
        return chosen
    print("\n".join(f"{number}. {name}" for number, name in enumerate(devices, 1)))
    answer = input(f"device (1 to {len(devices)}, Enter for {chosen}): ").strip()
    if answer.isdigit() and 1 <= int(answer) <= len(devices):
        return devices[int(answer) - 1]
    return chosen


def _ask_for_threshold(proposed: float) -> float | None:
    """The threshold to use: the proposed one, a typed one, or None to stop."""
    answer = input(f"filter with threshold {proposed:.4f}? (y, n, or another number): ").strip()
    if answer.lower() in ("", "y", "yes"):
        return proposed
    try:
        return float(answer)
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(launch(main, processes_that_fit))
