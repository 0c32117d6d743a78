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

import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ProcessOptions, ToolOptions, option, parse
from shared.errors import UserError, shown
from shared.files import open_lock
from shared.launch import launch
from shared.settings import Count, Seconds, Workers

FILTER = Path(__file__).resolve().parent
INPUT_DIR = FILTER / "filtered_vases" / "accepted"
OUTPUT_DIR = FILTER / "filtered_vases"
CACHE_DIR = FILTER / ".clip_cache"
PATTERN = r"^([A-F0-9-]+)_(\d+)_ac001001\.jpg$"  # vase, view; upper or lower case


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
    cache_dir: Path = option(CACHE_DIR, "embeddings of all pictures ever encoded")
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
    from vasevqa.filter.selection import select_views

    return select_views(cfg)


def _check(cfg: Config) -> None:
    """Refuse missing inputs in one line each, before anything slow is imported."""
    from vasevqa.filter import clip_source, prompts

    if not cfg.input_dir.is_dir():
        raise UserError(
            f"--input_dir {cfg.input_dir} is not a folder: filter the pictures with "
            "./clipfilter1.sh first, or give the folder with the pictures"
        )
    if (cfg.output_dir / "best_views").resolve().is_relative_to(cfg.input_dir.resolve()):
        raise UserError(
            f"--output_dir {cfg.output_dir}: best_views/ would lie inside --input_dir "
            f"{cfg.input_dir}, and be read again; choose a folder beside it"
        )
    prompts.read(cfg.prompts)
    clip_source.find(cfg.model_cache_dir, cfg.clip_model, cfg.pretrained)


if __name__ == "__main__":
    sys.exit(launch(main))
