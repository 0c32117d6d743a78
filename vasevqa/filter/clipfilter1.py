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
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ProcessOptions, ToolOptions, option, parse
from shared.device import present_gpus, visible_gpus
from shared.errors import UserError
from shared.files import open_lock
from shared.launch import launch, world_size
from shared.settings import Count, Range, Seconds, Seed, Share, ShareAboveZero, Workers

FILTER = Path(__file__).resolve().parent
INPUT_DIR = FILTER / "images3" / "1"
OUTPUT_DIR = FILTER / "filtered_vases"
CACHE_DIR = FILTER / ".clip_cache"
SAMPLE_SIZE = 500

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
    cache_dir: Path = option(CACHE_DIR, "embeddings of all pictures ever encoded")
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
    from vasevqa.filter.filtering import filter_pictures

    ask = _ask_for_threshold if cfg.confirm and _can_ask(cfg) and world_size() == 1 else None
    return filter_pictures(cfg, ask)


def _check(cfg: Config) -> None:
    """Refuse missing inputs in one line each, before anything slow is imported."""
    from vasevqa.filter import clip_source, prompts

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
    prompts.read(cfg.prompts)
    clip_source.find(cfg.model_cache_dir, cfg.clip_model, cfg.pretrained)


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
