"""The documented flow from pictures to a model: each stage once, continuing where it broke.

    ./run_all.sh                       every stage that is not done, in the documents' order
    ./run_all.sh --from grpo           begin again there;  --only STAGE  --force
    ./run_all.sh --keep 0.5            how many pictures clipfilter1 keeps
    ./run_all.sh --demo                the built-in demo, afresh, in vasevqa/demo

Stages: classifier clipfilter1 clipfilter2 sft merge grpo merge2 evaluate (--demo: quality before
them, which trains the classifier). Each is the documented command; settings are those of its
script. evaluate needs model/data/questions.json.
"""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared import page, report
from shared.config import option, parse
from shared.errors import DONE, INTERRUPTED, STOPPED
from shared.files import read_object, write_json
from shared.launch import launch_alone
from shared.settings import ShareAboveZero, settings
from shared.stages import Stage, StageOptions, run_stages
from shared.status import Status

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
    output = RECIPE / "demo" / "runs" if cfg.demo else MODEL / "output"
    stages = list(_stages(cfg, output))
    if cfg.dry_run:
        for stage in stages:
            sys.stdout.write(f"{stage.name}: {stage.line}\n")
        return DONE
    options = cfg.stages
    if cfg.demo and not (options.from_stage or options.only):
        options = replace(options, force=True)  # a demo begins afresh
    status = Status(state_dir, recipe="vasevqa", total_steps=len(stages))
    code = run_stages(stages, options, state_dir, status)
    _close(status, code, output)
    _describe(cfg, state_dir)
    _show(state_dir, stages)
    return code


def _stages(cfg: Config, output: Path) -> Iterator[Stage]:
    """The documented commands in their order."""
    python, demo = sys.executable, ["--demo"] if cfg.demo else []
    keep = [] if cfg.keep is None else ["--keep", str(cfg.keep)]
    filtered = (output / "filter" if cfg.demo else FILTER) / "filtered_vases"
    places = ["--input_dir", filtered / "accepted", "--output_dir", filtered]
    merged, data = output / "checkpoint-merged", MODEL / "data"
    if cfg.demo:
        yield Stage("quality", [python, FILTER / "model.py", *demo])
    yield Stage("classifier", [python, FILTER / "classifier.py", *demo])
    yield Stage(
        "clipfilter1",
        [FILTER / "clipfilter1.sh", "2", "--yes", *keep, *demo],
        outputs=(filtered / "filtering_report.json",),
    )
    yield Stage(
        "clipfilter2",
        [python, FILTER / "clipfilter2.py", *(demo or places)],
        outputs=(filtered / "best_views_report.json",),
    )
    yield Stage(
        "sft",
        [MODEL / "sft.sh", *demo],
        {"data": data / "video_training_dataset.json"},
        (output / "7B",),
    )
    yield Stage("merge", [MODEL / "merge.sh", *demo], outputs=(merged,))
    yield Stage(
        "grpo",
        [MODEL / "grpo.sh", *demo],
        {"data": data / "grpo_video_dataset.json"},
        (output / "GRPO",),
    )
    yield Stage("merge2", [MODEL / "merge.sh", *demo], outputs=(merged,))
    questions = data / "questions.json"
    if cfg.demo or questions.is_file():
        yield Stage(
            "evaluate",
            [python, MODEL / "evaluate.py", *demo],
            {"questions": questions},
            (output / "evaluation",),
        )


def _describe(cfg: Config, state_dir: Path) -> None:
    """Write config.json: settings, command and versions, for the report."""
    from vasevqa.model.runs import surroundings

    described = {"settings": settings(cfg), "command": shlex.join(sys.argv), **surroundings()}
    write_json(state_dir / "config.json", described)


def _close(status: Status, code: int, output: Path) -> None:
    """Write how the chain ended, with the accuracy of each model as its result.

    It is that of the content: a base model that answers in sentences is not wrong for it.
    """
    scores = read_object(output / "evaluation" / "vqa.json")
    models = {"before": "before", "after SFT": "between", "after": "metrics"}
    right = {label: (scores.get(name) or {}).get("contained") for label, name in models.items()}
    result = {
        "name": "answers right in content",
        **right,
        "higher_is_better": True,
        "unit": "share",
        "chance": scores.get("chance"),
        "majority": scores.get("majority"),
        "n": (scores.get("counts") or {}).get("questions"),
    }
    made = [output / "checkpoint-merged", output / "evaluation" / "vqa.json"]
    made += [output / run / report.NAME for run in ("7B", "GRPO", "merge")]
    status.write(
        state=STATES.get(code, "failed"),
        exit_code=code,
        reason="the whole flow" if code == DONE else f"stage {status.fields['last'].get('stage')}",
        result=result if scores and code == DONE else None,
        outputs=[str(path) for path in made if path.exists()],
    )


def _show(state_dir: Path, stages: list[Stage]) -> None:
    """Write report.html of the chain, with a page that says when each stage was done."""
    markers = [(stage.name, read_object(state_dir / f"{stage.name}.json")) for stage in stages]
    rows = [(name, done.get("finished_at"), done.get("seconds")) for name, done in markers]
    sheet = page.Page("Stages")
    sheet.table(("stage", "done at", "seconds"), rows)
    (state_dir / "pages").mkdir(exist_ok=True)
    sheet.write(state_dir / "pages" / "stages.html")
    report.refresh(state_dir)


if __name__ == "__main__":
    sys.exit(launch_alone(main))
