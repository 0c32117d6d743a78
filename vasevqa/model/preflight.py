"""Check data, model and surroundings of a training run in under a second, before swift is imported.

python preflight.py --dataset data/train.json                 rows and pictures for SFT
python preflight.py --dataset data/grpo.json --grpo           … and for GRPO
python preflight.py --model models/Qwen2.5-VL-7B-Instruct     weights too

./sft.sh and ./grpo.sh do this by themselves (`--dry-run` stops after it). swift replaces a row
whose picture is missing or broken by another one and trains on; here such a row ends the run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared.config import ToolOptions, option, parse
from shared.errors import USER_ERROR, UserError, one_line
from shared.launch import launch_alone

if TYPE_CHECKING:
    from vasevqa.model.plan import Plan
    from vasevqa.model.training_files import TrainingFile

log = logging.getLogger(__name__)
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    """What to check."""

    dataset: tuple[str, ...] = option((), "JSON or JSONL files of rows")
    grpo: bool = option(False, "check the rows for GRPO, which needs pictures and a reference")
    model: Path | None = option(None, "a model directory, to check its weights")
    image_check: bool = option(True, "decode every picture, not a sample of 64 alone")
    tool: ToolOptions = field(default_factory=ToolOptions)


@dataclass
class Findings:
    """What the checks came to: the data sets, and a line for each thing that is wrong."""

    files: list[TrainingFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Rows that can be trained on."""
        return sum(len(file.rows) for file in self.files)


def main(argv: list[str] | None = None) -> int:
    """Check, say what was found; the exit code: 2 when something is wrong."""
    cfg = parse(Config, argv, __doc__)
    from vasevqa.model import needs

    paths = [Path(name).absolute() for name in cfg.dataset]
    found = check_data(paths, [Path.cwd(), HERE], is_grpo=cfg.grpo)
    if cfg.model:
        found.problems += needs.model({"model": [str(cfg.model)]}, is_grpo=cfg.grpo)
    if cfg.image_check and not found.problems:
        found.problems += check_pictures(found.files, Path("output") / MEMORY)
    for problem in found.problems:
        sys.stderr.write(f"error: {problem}\n")
    if not found.problems:
        sys.stdout.write(f"{found.num_rows} rows, nothing wrong\n")
    return USER_ERROR if found.problems else 0


MEMORY = ".pictures_checked.json"  # beside the run directories


def check(plan: Plan, roots: Sequence[Path]) -> Findings:
    """Everything that can be checked within a second. Raises UserError for what ends it at once."""
    from vasevqa.model import needs

    needs.packages(plan.flags, is_grpo=plan.is_grpo)
    problems = list(needs.model(plan.flags, is_grpo=plan.is_grpo))
    problems += needs.plugins(plan.flags)
    problems += needs.system_prompt(plan.flags)
    problems += needs.other_paths(plan.flags)
    problems += needs.stop_file()
    if plan.is_grpo:
        problems += needs.divisible(plan.flags, plan.world_size)
    found = check_data(plan.datasets, roots, is_grpo=plan.is_grpo)
    found.problems = problems + found.problems + _room(plan, found.num_rows)
    return found


def check_data(paths: Sequence[Path], roots: Sequence[Path], *, is_grpo: bool) -> Findings:
    """Every row of the data sets, and a sample of the pictures."""
    from vasevqa.model import pictures, training_files

    found = Findings()
    for path in paths:
        try:
            found.files.append(training_files.open_file(path, roots, is_grpo=is_grpo))
        except UserError as error:
            found.problems.append(one_line(error))
    found.problems += [problem for file in found.files for problem in file.problems]
    if not found.problems:
        for file in found.files:
            where = file.pictures
            bad = pictures.check(pictures.sample(list(where)))
            found.problems += _lines(bad, where)
    return found


def check_pictures(files: Sequence[TrainingFile], memory: Path) -> list[str]:
    """A line for every picture that cannot be decoded; what `memory` holds is not read again."""
    from vasevqa.model import pictures

    where: dict[Path, str] = {}
    for file in files:
        where = file.pictures | where
    return _lines(pictures.check_all(list(where), memory, _report), where)


def _report(so_far: int, total: int) -> None:
    log.info("pictures decoded: %d of %d", so_far, total)


def _lines(bad: dict[Path, str], where: dict[Path, str]) -> list[str]:
    return [
        f"{where[path]}: the picture {path} cannot be decoded ({reason}): replace it, or drop the "
        "row; swift would train on another row in its place"
        for path, reason in bad.items()
    ]


def _room(plan: Plan, num_rows: int) -> list[str]:
    from vasevqa.model import needs
    from vasevqa.model import plan as planning

    steps = planning.num_steps(plan, num_rows)
    size, count = planning.checkpoint_bytes(plan), planning.num_checkpoints(plan, steps)
    return list(needs.disk(plan.output_dir, size, count))


if __name__ == "__main__":
    sys.exit(launch_alone(main))
