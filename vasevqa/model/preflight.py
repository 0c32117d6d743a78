"""Check data, model and surroundings of a training run in under a second, before swift is imported.

python preflight.py --dataset data/train.json                 rows and pictures for SFT
python preflight.py --dataset data/grpo.json --grpo           … and for GRPO
python preflight.py --model models/Qwen2.5-VL-7B-Instruct     weights too

./sft.sh and ./grpo.sh do this by themselves (`--dry-run` stops after it). swift replaces a row
whose picture is missing or broken by another one and trains on; here such a row ends the run.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ToolOptions, option, parse
from shared.errors import USER_ERROR, UserError, one_line
from shared.launch import launch_alone

if TYPE_CHECKING:
    from vasevqa.model.pictures import Seen
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
    """What the checks came to: the data sets, and a line for each other thing that is wrong."""

    files: list[TrainingFile] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """All that is wrong, a line each."""
        return self.others + [line for file in self.files for line in file.problems]

    @property
    def num_rows(self) -> int:
        """Rows that can be trained on."""
        return sum(len(file.rows) for file in self.files)

    @property
    def counts(self) -> dict[str, int]:
        """Rows given, left out and trained on."""
        left_out = sum(file.left_out for file in self.files)
        given = self.num_rows + left_out
        return {"rows": given, "rows left out": left_out} if left_out else {"rows": given}

    def leave_out_bad_rows(self) -> None:
        """Train on the other rows, and name those that are left out."""
        for file in self.files:
            for line in file.problems:
                log.warning("left out: %s", line)
            file.leave_out()
            if not file.rows:
                self.others.append(f"{file.path} has no row that can be trained on")


def main(argv: list[str] | None = None) -> int:
    """Check, say what was found; the exit code: 2 when something is wrong."""
    cfg = parse(Config, argv, __doc__)
    from vasevqa.model import needs

    paths = [Path(name).absolute() for name in cfg.dataset]
    found = check_data(paths, [Path.cwd(), HERE], is_grpo=cfg.grpo)
    if cfg.model:
        found.others += needs.model({"model": [str(cfg.model)]}, is_grpo=cfg.grpo)
    if cfg.image_check and not found.problems:
        check_pictures(found.files, Path("output") / MEMORY)
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
    problems += needs.deepspeed(plan.flags, os.environ)
    problems += needs.plugins(plan.flags)
    problems += needs.system_prompt(plan.flags)
    problems += needs.other_paths(plan.flags)
    problems += needs.stop_file()
    if plan.is_grpo:
        problems += needs.divisible(plan.flags, plan.world_size)
    found = check_data(plan.datasets, roots, is_grpo=plan.is_grpo)
    found.others = problems + found.others + _room(plan, found.num_rows)
    return found


def check_data(paths: Sequence[Path], roots: Sequence[Path], *, is_grpo: bool) -> Findings:
    """Every row of the data sets, and a sample of the pictures."""
    from vasevqa.model import pictures, training_files

    found = Findings()
    for path in paths:
        try:
            file = training_files.open_file(path, roots, is_grpo=is_grpo)
        except UserError as error:
            found.others.append(one_line(error))
            continue
        file.mark(pictures.unusable(pictures.check(pictures.sample(file.pictures))))
        found.files.append(file)
    return found


def check_rows(plan: Plan, files: Sequence[TrainingFile]) -> None:
    """What takes longer than a second: every picture, every address, the length of every row."""
    seen: dict[Path, Seen] = {}
    if plan.wants_all_pictures:
        seen = check_pictures(files, plan.output_dir.parent / MEMORY)
    check_lengths(plan, files, seen)


def check_pictures(files: Sequence[TrainingFile], memory: Path) -> dict[Path, Seen]:
    """Mark the rows with a picture that cannot be used; what `memory` holds is not read again."""
    from vasevqa.model import addresses, pictures

    every = dict.fromkeys(path for file in files for path in file.pictures)
    seen = pictures.check_all(list(every), memory, _report)
    for file in files:
        file.mark(pictures.unusable(seen))
        addresses.mark_dead(file)
    return seen


def check_lengths(plan: Plan, files: Sequence[TrainingFile], seen: Mapping[Path, Seen]) -> None:
    """Mark the rows that are longer than --max_length; a --truncation_strategy has its own way."""
    from vasevqa.model import lengths, rows, swift_flags
    from vasevqa.model import plan as planning

    model = Path(swift_flags.text(plan.flags, "model"))
    most = swift_flags.whole(plan.flags, "max_length", 0)
    is_qwen = planning.architecture(str(model)) == planning.ARCHITECTURE
    has_tokenizer = (model / "tokenizer.json").is_file()
    if not (most and is_qwen and has_tokenizer) or "truncation_strategy" in plan.flags:
        return
    counter = lengths.Counter(model, planning.max_pixels(os.environ))
    for file in files:
        for row in file.rows:
            sizes = zip(filter(rows.is_file, row.images), file.pictures_of(row), strict=True)
            known = {name: seen[path].size for name, path in sizes if path in seen}
            if (count := counter.tokens(row, known)) > most:
                file.bad.setdefault(
                    row.number,
                    f"has {count} tokens, more than --max_length {most}: raise it, shorten the "
                    "row, or type --truncation_strategy right",
                )


def _report(so_far: int, total: int) -> None:
    log.info("pictures decoded: %d of %d", so_far, total)


def _room(plan: Plan, num_rows: int) -> list[str]:
    from vasevqa.model import needs
    from vasevqa.model import plan as planning

    steps = planning.num_steps(plan, num_rows)
    size, count = planning.checkpoint_bytes(plan), planning.num_checkpoints(plan, steps)
    return list(needs.disk(plan.output_dir, size, count))


if __name__ == "__main__":
    sys.exit(launch_alone(main))
