"""The documented flow from pictures to a model; each stage once, going on where it broke.

    ./run_all.sh                       every stage that is not done, in the documents' order
    ./run_all.sh --from grpo           begin again there;  --only STAGE  --force
    ./run_all.sh --keep 0.5            how many pictures clipfilter1 keeps
    ./run_all.sh --demo                the built-in demo, afresh, in vasevqa/demo

Stages: classifier clipfilter1 clipfilter2 sft merge grpo merge2 evaluate (--demo: quality before
them, which trains the classifier). Each is the documented command; settings are those of its
script. evaluate needs model/data/questions.json.
"""

import logging
import os
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared import page, report
from shared.config import option, parse
from shared.errors import DONE, INTERRUPTED, STOPPED
from shared.files import open_lock, read_object, write_json
from shared.launch import launch_alone
from shared.settings import ShareAboveZero, settings
from shared.stages import Stage, StageOptions, command_stage, run_stages
from shared.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
RECIPE = Path(__file__).resolve().parent
FILTER, MODEL = RECIPE / "filter", RECIPE / "model"
STATES = {DONE: "done", INTERRUPTED: "stopped", STOPPED: "stopped"}


@dataclass(frozen=True)
class Config:
    """Settings of the chain."""

    demo: bool = option(False, "the built-in demo, in vasevqa/demo")
    keep: ShareAboveZero | None = option(
        None, "share of pictures that clipfilter1 keeps (its --keep)"
    )
    dry_run: bool = option(False, "print the commands, stop")
    state_dir: Path | None = option(None, "done-markers and status; default: vasevqa/flow")
    stages: StageOptions = field(default_factory=StageOptions)


def main(argv: list[str] | None = None) -> int:
    """Run the stages that are not done; the exit code of the first that failed."""
    cfg = parse(Config, argv, __doc__)
    state_dir = cfg.state_dir or RECIPE / ("demo/runs" if cfg.demo else "") / "flow"
    commands = list(_commands(cfg))
    if cfg.dry_run:
        for name, command, _ in commands:
            sys.stdout.write(f"{name}: {shlex.join(map(str, command))}\n")
        return DONE
    options = cfg.stages
    if cfg.demo and not (options.from_stage or options.only):
        options = replace(options, force=True)  # a demo begins afresh
    os.close(open_lock(state_dir))
    status = Status(state_dir, recipe="vasevqa", pid=os.getpid(), total_steps=len(commands))
    stages = [command_stage(name, words, outputs=made) for name, words, made in commands]
    # nothing is written before the first stage: another process may be at work here
    counted = [_counted(stage, status, lambda: _describe(cfg, state_dir)) for stage in stages]
    code = run_stages(counted, options, state_dir)
    _close(status, code, RECIPE / "demo" / "runs" if cfg.demo else MODEL / "output")
    _show(state_dir, [name for name, *_ in commands])
    return code


def _commands(cfg: Config) -> "Iterator[tuple[str, list[str | Path], tuple[Path, ...]]]":
    """Name, command and outputs of every stage, in order."""
    demo: list[str | Path] = ["--demo"] if cfg.demo else []
    runs = RECIPE / "demo" / "runs"
    filtered = runs / "filter" / "filtered_vases" if cfg.demo else FILTER / "filtered_vases"
    output = runs if cfg.demo else MODEL / "output"
    merged = output / "checkpoint-merged"
    python = sys.executable
    keep = [] if cfg.keep is None else ["--keep", str(cfg.keep)]
    if cfg.demo:
        yield "quality", [python, FILTER / "model.py", *demo], ()
    yield "classifier", [python, FILTER / "classifier.py", *demo], ()
    first = [FILTER / "clipfilter1.sh", "2", "--yes", *keep, *demo]
    yield "clipfilter1", first, (filtered / "filtering_report.json",)
    second = [python, FILTER / "clipfilter2.py", *demo]
    if not cfg.demo:
        second += ["--input_dir", filtered / "accepted", "--output_dir", filtered]
    yield "clipfilter2", second, (filtered / "best_views_report.json",)
    yield "sft", [MODEL / "sft.sh", *demo], (output / "7B",)
    yield "merge", [MODEL / "merge.sh", *demo], (merged,)
    yield "grpo", [MODEL / "grpo.sh", *demo], (output / "GRPO",)
    yield "merge2", [MODEL / "merge.sh", *demo], (merged,)
    if cfg.demo or (MODEL / "data" / "questions.json").is_file():
        yield "evaluate", [python, MODEL / "evaluate.py", *demo], (output / "evaluation",)


def _describe(cfg: Config, state_dir: Path) -> None:
    from vasevqa.model.runs import surroundings

    described = {"settings": settings(cfg), "command": shlex.join(sys.argv), **surroundings()}
    write_json(state_dir / "config.json", described)


def _counted(stage: Stage, status: Status, describe: "Callable[[], None]") -> Stage:
    """`stage`, which tells the status that it began."""

    def run() -> int:
        step = status.fields.get("step", 0) + 1
        status.write(step=step, last={"stage": stage.name})
        describe()
        return stage.run()

    return replace(stage, run=run)


def _close(status: Status, code: int, output: Path) -> None:
    """Write how the chain ended, with the accuracy before and after as its result.

    It is that of the content: a base model that answers in sentences is not wrong for it.
    """
    scores = read_object(output / "evaluation" / "vqa.json")
    before, after = (scores.get(name) or {} for name in ("before", "metrics"))
    majority, number = scores.get("majority") or 0.0, (scores.get("counts") or {}).get("questions")
    result = {
        "name": f"answers right in content (majority answer {majority:.4g}, N {number})",
        "before": before.get("contained"),
        "after": after.get("contained"),
        "higher_is_better": True,
    }
    made = [output / "checkpoint-merged", output / "evaluation" / "vqa.json"]
    made += [output / run / report.NAME for run in ("7B", "GRPO", "merge")]
    status.write(
        state=STATES.get(code, "failed"),
        exit_code=code,
        reason="the whole flow" if code == DONE else f"stage {status.fields['last'].get('stage')}",
        result=result if after and code == DONE else None,
        outputs=[str(path) for path in made if path.exists()],
    )


def _show(state_dir: Path, names: list[str]) -> None:
    """Write report.html of the chain, with a page that says when each stage was done."""
    markers = [(name, read_object(state_dir / f"{name}.json")) for name in names]
    rows = [(name, done.get("finished_at"), done.get("seconds")) for name, done in markers]
    sheet = page.Page("Stages")
    sheet.table(("stage", "done at", "seconds"), rows)
    (state_dir / "pages").mkdir(exist_ok=True)
    sheet.write(state_dir / "pages" / "stages.html")
    report.refresh(state_dir)


if __name__ == "__main__":
    sys.exit(launch_alone(main))
