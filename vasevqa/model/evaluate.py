"""How many questions about vases a merged model answers rightly, beside what it was made from.

python evaluate.py                                      output/checkpoint-merged and its bases
python evaluate.py --checkpoint DIR --data-root questions.json --limit 200
python evaluate.py --before DIR                         beside another model; --before none: alone
python evaluate.py --demo                               what ./merge.sh --demo left

--data-root is a JSON or JSONL file of rows as for training, each with its answer. Prints accuracy
over all rows and for each attribute (fabric, technique, shape, provenance, date, attribution,
decoration): exact, normalised, contained among other words, and what chance and each attribute's
most frequent answer would reach; writes vqa.json and answers.jsonl. After SFT and GRPO there are
three models: before, between, after.
"""

import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ToolOptions, option, parse
from shared.errors import UserError
from shared.files import read_json, read_text, write_json, write_text
from shared.launch import launch_alone
from shared.settings import Count

if TYPE_CHECKING:
    from vasevqa.model.evaluation import Settings
    from vasevqa.model.rows import Row

HERE = Path(__file__).resolve().parent
NONE = "none"


@dataclass(frozen=True)
class Config:
    """Settings of the evaluation."""

    checkpoint: Path = option(HERE / "output" / "checkpoint-merged", "a merged model")
    data_root: Path = option(HERE / "data" / "questions.json", "JSON or JSONL file of rows")
    out: Path | None = option(None, "where results go; default: evaluation, beside the model")
    limit: Count | None = option(None, "questions, spread over the file; default: all")
    before: str | None = option(None, "the model to compare with, or none; default: its bases")
    system: str | None = option(None, "system prompt: a text, or a file that ends in .txt")
    batch_size: Count = option(8, "questions answered at a time")
    max_new_tokens: Count = option(64, "tokens of an answer at most")
    tool: ToolOptions = field(default_factory=ToolOptions)


def main(argv: list[str] | None = None) -> int:
    """Check the input, then answer and score; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.tool.demo:
        cfg = _with_demo(cfg)
    from vasevqa.model import needs, pictures, plan, training_files

    pixels = plan.max_pixels(os.environ)

    models = _models(cfg)
    for directory in models.values():
        for problem in needs.model({"model": [f"{directory}/"]}, is_grpo=False):
            raise UserError(problem)
    data = training_files.open_file(cfg.data_root, [Path.cwd(), HERE], is_grpo=False)
    for problem in data.problems:
        raise UserError(problem)
    rows = data.rows
    if cfg.limit is not None and cfg.limit < len(rows):
        rows = [rows[at * len(rows) // cfg.limit] for at in range(cfg.limit)]
    asked = pictures.check(path for row in rows for path in data.pictures_of(row))
    for path, reason in pictures.unusable(asked).items():
        raise UserError(f"the picture {path} {reason}")
    system = _system(cfg.system)
    if cfg.tool.dry_run:
        sys.stdout.write(f"{len(data.rows)} questions to {', '.join(map(str, models.values()))}\n")
        return 0
    import torch

    from shared.device import resolve
    from vasevqa.model import evaluation

    device = resolve(cfg.tool.device, 0, os.environ)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = evaluation.Settings(
        cfg.batch_size, cfg.max_new_tokens, pixels, system, dtype, device
    )  # fmt: skip
    return _evaluate(cfg, models, rows, data.root, settings)


def _with_demo(cfg: Config) -> Config:
    """`cfg` on what the demo made and merged, where no path was typed."""
    from vasevqa.demo_data import demo

    paths = demo.build(HERE.parent / "demo")
    changes = {
        "checkpoint": paths.merged,
        "data_root": paths.questions,
        "max_new_tokens": 12,
        "batch_size": 32,
    }
    return replace(cfg, **{n: v for n, v in changes.items() if n not in cfg.tool.typed})


def _models(cfg: Config) -> dict[str, Path]:
    """{'before': …, 'between': …, 'after': …}, without those that are not to be had."""
    if cfg.before is None:
        bases = _bases(cfg.checkpoint)
    else:
        bases = [] if cfg.before == NONE else [Path(cfg.before).absolute()]
    models = {"before": bases[-1]} if bases else {}
    if len(bases) > 1:
        models["between"] = bases[0]
    return {**models, "after": cfg.checkpoint}


def _bases(model: Path) -> list[Path]:
    """What a model was merged into, and what that was merged into, as far as merging noted it."""
    bases: list[Path] = []
    while isinstance(note := read_json(model / "merged_from.json"), dict):
        model = Path(note.get("base") or "/nowhere")
        if not model.is_dir() or model in bases:
            break
        bases.append(model)
    return bases


def _evaluate(
    cfg: Config, models: dict[str, Path], rows: "list[Row]", root: Path, settings: "Settings"
) -> int:
    from vasevqa.model import evaluation

    answers = {
        name: list(evaluation.Answerer(path, settings).answer(rows, root))
        for name, path in models.items()
    }
    scores = {name: evaluation.score(rows, texts) for name, texts in answers.items()}
    metrics, counts = {name: found for name, (found, _) in scores.items()}, scores["after"][1]
    chance, majority = round(evaluation.chance(rows), 6), round(evaluation.majority(rows), 6)
    sys.stdout.write(evaluation.table(metrics, counts) + "\n")
    sys.stdout.write(f"chance {chance:.3f}; each attribute's most frequent answer {majority:.3f}\n")
    result = {
        "schema": 1,
        "metrics": metrics["after"],
        "between": metrics.get("between"),
        "before": metrics.get("before"),
        "chance": chance,
        "majority": majority,
        "counts": counts,
        "checkpoint": str(cfg.checkpoint),
        "compared_with": str(models["before"]) if "before" in models else None,
        "data": str(cfg.data_root),
    }
    _write(cfg.out or cfg.checkpoint.parent / "evaluation", result, rows, answers)
    return 0


def _write(
    out: Path, result: dict[str, object], rows: "list[Row]", answers: dict[str, list[str]]
) -> None:
    from vasevqa.model.evaluation import attribute_of

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "vqa.json", result)
    lines = []
    for at, row in enumerate(rows):
        said = {name: texts[at] for name, texts in answers.items()}
        asked = {"row": row.number, "images": row.images, "attribute": attribute_of(row)}
        asked |= {"question": row.question, "reference": row.reference}
        lines.append(json.dumps(asked | said, ensure_ascii=False))
    write_text(out / "answers.jsonl", "".join(f"{line}\n" for line in lines))
    sys.stdout.write(f"{out / 'vqa.json'}\n{out / 'answers.jsonl'}\n")


def _system(value: str | None) -> str | None:
    if value is None or not value.endswith(".txt"):
        return value
    try:
        return read_text(Path(value))
    except OSError as error:
        raise UserError(f"--system {value} cannot be read: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(launch_alone(main))
