"""Verify faces with the untrained student, the trained one and its teacher; compare them.

python evaluate.py                                       the best student, every set of faces_emore
python evaluate.py --data-root lfw.bin --limit 600       600 pairs of one set
python evaluate.py --teacher backbone.pth                with the teacher beside it
python evaluate.py --demo                                the student of ./train.sh --demo

Sets are insightface's lfw.bin, cfp_fp.bin, agedb_30.bin, calfw.bin and cplfw.bin. Prints one table
and writes verification.json, verification.html and roc_<set>.svg.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared.config import ToolOptions, option, parse
from shared.errors import UserError
from shared.files import make_output
from shared.launch import launch_alone
from shared.settings import Count, Range

# --- configuration: edit here, or type the flag of the same name ----------------------------------
PROJECT_ROOT = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120, as documented

BLIP_PATH = os.path.join(PROJECT_ROOT, "blip2_weights")  # noqa: PTH118
DATA_ROOT = os.path.join(PROJECT_ROOT, "datasets", "faces_emore")  # noqa: PTH118
CHECKPOINT = os.path.join(PROJECT_ROOT, "checkpoints", "best_student_adapter_face.pth")  # noqa: PTH118
# --------------------------------------------------------------------------------------------------

SETS = ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw")
FEWEST_PAIRS = 10  # one a fold


@dataclass(frozen=True)
class Config:
    """Settings of the evaluation."""

    checkpoint: Path = option(
        Path(CHECKPOINT), "trained student, exported adapter or run directory"
    )
    data_root: Path = option(Path(DATA_ROOT), "directory of lfw.bin …, or one .bin file")
    out: Path | None = option(None, "where results go; default: evaluation, beside the checkpoint")
    limit: Annotated[int, Range(FEWEST_PAIRS)] | None = option(
        None, "pairs of each set, spread over it; default: all"
    )
    blip_path: Path | None = option(None, "BLIP-2 directory; default: the run's, or blip2_weights")
    teacher: Path | None = option(
        None, "a network's weights, or a directory of its embeddings of the pairs (lfw.npy …)"
    )
    teacher_arch: str = option(
        "auto", "the network in --teacher: auto (IResNets), a torchvision name, torchscript"
    )
    batch_size: Count = option(128, "images embedded at a time")
    tool: ToolOptions = field(default_factory=ToolOptions)


def main(argv: list[str] | None = None) -> int:
    """Check the input, then evaluate; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.tool.demo:
        cfg = _with_demo(cfg)

    from face_distill.distill import student_files

    checkpoint = student_files.checkpoint_at(cfg.checkpoint)
    tower = student_files.tower_of(checkpoint, cfg.blip_path, Path(BLIP_PATH))
    files = _set_files(cfg.data_root)
    if cfg.teacher and not cfg.teacher.exists():
        raise UserError(f"--teacher {cfg.teacher} is missing: give a weight file, or embeddings")
    out = cfg.out or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "evaluation"
    if cfg.tool.dry_run:
        names = ", ".join(file.name for file in files)
        sys.stdout.write(f"{checkpoint} on the tower {tower}, with {names}; results in {out}\n")
        return 0
    make_output(out)
    return _evaluate(replace(cfg, checkpoint=checkpoint, blip_path=tower, out=out), files)


def _with_demo(cfg: Config) -> Config:
    """`cfg` on what ./train.sh --demo left: its paths where none were typed."""
    from face_distill.demo_data import demo
    from face_distill.distill.student_files import demo_student

    root = Path(PROJECT_ROOT) / "demo"
    changes = demo_student(root, cfg.tool.typed)
    paths = demo.build(root)
    if "data_root" not in cfg.tool.typed:  # its teacher has seen no other pictures
        changes["data_root"] = paths.pairs
        if "teacher" not in cfg.tool.typed:
            changes["teacher"] = paths.teacher_pairs
    return replace(cfg, **changes)


def _set_files(data_root: Path) -> list[Path]:
    """The pair files that `data_root` means. Raises UserError when there are none."""
    if data_root.is_file():
        return [data_root]
    files = [path for name in SETS if (path := data_root / f"{name}.bin").is_file()]
    if not files:
        raise UserError(
            f"{data_root} holds no verification set: expected {' '.join(f'{s}.bin' for s in SETS)} "
            "(faces_emore brings them), or type --data-root FILE.bin"
        )
    return files


def _evaluate(cfg: Config, files: list[Path]) -> int:
    from face_distill import evaluation, evaluation_report
    from face_distill.evaluation import STUDENT, TEACHER, UNTRAINED
    from shared import report
    from shared.device import resolve
    from shared.images import printable

    assert cfg.blip_path and cfg.out
    # What can be refused comes first, the long work of the student's tower last.
    sets = [evaluation.read_set(path, cfg.limit) for path in files]
    evaluation.check_checkpoint(cfg.checkpoint)
    device = resolve(cfg.tool.device, 0, os.environ)
    student = partial(
        evaluation.student_distances,
        cfg.blip_path, cfg.checkpoint, device, cfg.tool.amp, cfg.batch_size,
    )  # fmt: skip
    models = {STUDENT: partial(student, tuned=True), UNTRAINED: partial(student, tuned=False)}
    if cfg.teacher:
        teacher = (cfg.teacher, cfg.teacher_arch, sets, device, cfg.batch_size)
        models = {TEACHER: partial(evaluation.teacher_distances, *teacher), **models}
    results = evaluation.compare(models, sets)
    about = {
        "checkpoint": printable(str(cfg.checkpoint)),
        "data": printable(str(cfg.data_root)),
        "blip_path": printable(str(cfg.blip_path)),
        "teacher": printable(str(cfg.teacher)) if cfg.teacher else None,
        "amp": cfg.tool.amp,
        "limit": cfg.limit,
    }
    written = evaluation_report.write(cfg.out, sets, results, about)
    report.refresh(cfg.out.parent)  # of the run, whose report shows the page
    sys.stdout.write(evaluation_report.text_table(sets, results) + "\n\n")
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(launch_alone(main))
