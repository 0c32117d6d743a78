"""Verify faces with the untrained student, the trained one and its teacher; compare them.

python evaluate.py                                       the best student, every set of faces_emore
python evaluate.py --data-root lfw.bin --limit 600       600 pairs of one set
python evaluate.py --teacher backbone.pth                with the teacher beside it
python evaluate.py --demo                                the student of ./train.sh --demo

Sets are insightface's lfw.bin, cfp_fp.bin, agedb_30.bin, calfw.bin and cplfw.bin, or a folder with
LFW's pairs.txt and <name>/<name>_0001.jpg, aligned crops of 112 x 112 pixels as in training. Prints
one table and writes verification.json, verification.html and roc_<set>.svg.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
if not Path(sys.path[0], "shared").is_dir():  # the directory was copied alone
    sys.stderr.write("error: shared/ is missing beside face_distill/: copy the whole repository\n")
    sys.exit(3)

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ToolOptions, option, parse
from shared.errors import UserError, one_line
from shared.files import make_output, write_json
from shared.launch import launch_alone
from shared.settings import Count, Range

if TYPE_CHECKING:  # torch comes after the input is checked
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from face_distill.distill.pairs import PairSet
    from face_distill.distill.verification import Figures, Roc
    from shared.page import Page

    Results = dict[str, dict[str, Figures]]  # of each set's name, of each model

log = logging.getLogger(__name__)

# --- configuration: edit here, or type the flag of the same name ----------------------------------
PROJECT_ROOT = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120, as documented

BLIP_PATH = os.path.join(PROJECT_ROOT, "blip2_weights")  # noqa: PTH118
DATA_ROOT = os.path.join(PROJECT_ROOT, "datasets", "faces_emore")  # noqa: PTH118
CHECKPOINT = os.path.join(PROJECT_ROOT, "checkpoints", "best_student_adapter_face.pth")  # noqa: PTH118
# --------------------------------------------------------------------------------------------------

SETS = ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw")
FEWEST_PAIRS = 10  # one a fold
UNTRAINED, STUDENT, TEACHER = "untrained student", "student", "teacher"  # the order of the table
SCHEMA = 1
HEADLINE = "tar_at_far"
ROC_AXES: dict[str, Any] = {
    "x_label": "false accept rate (FAR)",
    "y_label": "true accept rate (TAR)",
    "log_x": True,
}
PROTOCOL = {
    "embedding": "unit length, of the image plus of its mirror image",
    "distance": "squared, 0 to 4; a pair counts as one person strictly below the threshold",
    "accuracy": "mean of 10 contiguous folds, each at the threshold best on the other nine",
    "threshold": "the lowest that is best on all pairs, in steps of 0.01",
    "auc": "probability that a pair of one person is nearer than one of two; ties count half",
    "tar_at_far": "on the whole set, at the largest threshold whose FAR is at most the one named",
    "tar_at_far_10_fold": "10 folds, each at the threshold of tar_at_far on the other nine",
    "headline": HEADLINE,
}


@dataclass(frozen=True)
class Config:
    """Settings of the evaluation."""

    checkpoint: Path = option(
        Path(CHECKPOINT), "trained student, exported adapter or run directory"
    )
    data_root: Path = option(
        Path(DATA_ROOT), "directory of lfw.bin …, one .bin file, or LFW with pairs.txt"
    )
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
    names = [*(f"{name}.bin" for name in SETS), "pairs.txt"]
    files = [path for name in names if (path := data_root / name).is_file()]
    if not files:
        raise UserError(
            f"{data_root} holds no verification set: expected {' '.join(f'{s}.bin' for s in SETS)} "
            "(faces_emore brings them) or LFW's pairs.txt, or type --data-root FILE.bin"
        )
    return files


def _evaluate(cfg: Config, files: list[Path]) -> int:
    from face_distill.distill import pairs, student_files
    from shared import report
    from shared.device import resolve
    from shared.images import printable

    assert cfg.blip_path and cfg.out
    # What can be refused comes first, the long work of the student's tower last.
    is_demos = cfg.tool.demo and "data_root" not in cfg.tool.typed
    sets = [pairs.read_set(f, cfg.limit, "drawn pairs" if is_demos else "") for f in files]
    student_files.adapter_shape(student_files.read_trained(cfg.checkpoint), cfg.checkpoint)
    device = resolve(cfg.tool.device, 0, os.environ)
    results = _compare(cfg, sets, device)
    about = {
        "checkpoint": printable(str(cfg.checkpoint)),
        "data": printable(str(cfg.data_root)),
        "blip_path": printable(str(cfg.blip_path)),
        "teacher": printable(str(cfg.teacher)) if cfg.teacher else None,
        "amp": cfg.tool.amp,
        "limit": cfg.limit,
    }
    written = _write(cfg.out, sets, results, about)
    report.refresh(cfg.out.parent)  # of the run, whose report shows the page
    sys.stdout.write(_text_table(sets, results) + "\n\n")
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0


# --- the models -----------------------------------------------------------------------------------


def _compare(cfg: Config, sets: Sequence[PairSet], device: torch.device) -> Results:
    """The figures of every model on every set it knows; one model is in memory at a time."""
    from face_distill.distill import verification

    results: Results = {s.name: {} for s in sets}
    for name in (TEACHER, STUDENT, UNTRAINED) if cfg.teacher else (STUDENT, UNTRAINED):
        found = _distances(cfg, name, sets, device)
        for s in sets:
            if s.name not in found:
                log.warning("no embeddings of the %s for %s: it is left out there", name, s.name)
                continue
            figures = verification.judge(found[s.name], s.pairs.same)
            results[s.name][name] = figures
            log.info("%s on %s: accuracy %.4f", name, s.name, figures.accuracy.mean)
    order = (UNTRAINED, STUDENT, TEACHER)
    return {s: {n: models[n] for n in order if n in models} for s, models in results.items()}


def _distances(
    cfg: Config, name: str, sets: Sequence[PairSet], device: torch.device
) -> dict[str, NDArray[Any]]:
    """Squared distances (N,) of each set's pairs by one model, under the set's name."""
    from face_distill.distill import verification

    if name == TEACHER and cfg.teacher and (cfg.teacher.is_dir() or cfg.teacher.suffix == ".npy"):
        return verification.stored_distances(cfg.teacher, sets)
    embed = _opened(cfg, name, device)
    found = {}
    for pair_set in sets:
        try:
            images = pair_set.pairs.images
            rows = verification.flip_embeddings(embed, images, cfg.batch_size, pair_set.name)
            found[pair_set.name] = verification.pair_distances(rows.numpy())
        except UserError as error:
            raise UserError(f"{name} on {pair_set.name}: {one_line(error)}") from error
    return found


def _opened(cfg: Config, name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A model: uint8 images (B, 3, H, W) → embeddings (B, D).

    Raises UserError when a file is missing or damaged, or the tower is not the checkpoint's.
    """
    from face_distill.distill import model, teacher_networks

    assert cfg.blip_path
    if name == TEACHER:
        assert cfg.teacher
        teacher = teacher_networks.open_teacher(cfg.teacher, cfg.teacher_arch).to(device)
        return lambda images: teacher(images.to(device))[0]
    checkpoint = cfg.checkpoint if name == STUDENT else None
    size = model.stored_image_size(cfg.checkpoint)
    student = model.open_student(cfg.blip_path, checkpoint, image_size=size)
    return model.FaceEmbedder(student, device, cfg.tool.amp)


# --- the results ----------------------------------------------------------------------------------


def _tar_headers(results: Results) -> list[str]:
    figures = next(figures for models in results.values() for figures in models.values())
    return [f"TAR@FAR={point.target:g}" for point in figures.tar_at_far]


def _write(
    out: Path, sets: Sequence[PairSet], results: Results, about: dict[str, Any]
) -> list[Path]:
    """Write verification.json, verification.html and one roc_<set>.svg a set into `out`.

    about: what the JSON says beside figures and counts: "checkpoint", "data" and settings.
    Returns the files.
    """
    from shared.page import write_chart

    written = [out / "verification.json", out / "verification.html"]
    write_json(written[0], _record(sets, results) | about)
    _page(sets, results, about).write(written[1])
    for s in sets:
        lines, path = _roc_lines(results[s.name]), out / f"roc_{s.name}.svg"
        written += write_chart(path, lines, title=s.name, **ROC_AXES)
    return written


def _record(sets: Sequence[PairSet], results: Results) -> dict[str, Any]:
    """Plain values for JSON: schema, protocol, metrics of each set and model, counts of each set.

    A figure that the set cannot resolve is null, with the reason beside it.
    """
    return {
        "schema": SCHEMA,
        "protocol": PROTOCOL,
        "metrics": {
            name: {model: _plain(figures) for model, figures in models.items()}
            for name, models in results.items()
        },
        "counts": {s.name: _counts(s) for s in sets},
    }


def _plain(figures: Figures) -> dict[str, Any]:
    accuracy = figures.accuracy
    return {
        "accuracy": accuracy.mean,
        "accuracy_std": accuracy.std,
        "accuracy_folds": accuracy.folds,
        "threshold": accuracy.threshold,
        "auc": figures.auc,
        "tar_at_far": _by_target(figures.tar_at_far),
        "tar_at_far_10_fold": _by_target(figures.folded_tar_at_far),
    }


def _by_target(points: Sequence[Any]) -> dict[str, dict[str, Any]]:
    plain = map(asdict, points)
    return {f"{point.pop('target'):g}": point for point in plain}


def _counts(pair_set: PairSet) -> dict[str, Any]:
    same = pair_set.pairs.same
    num_same = int(same.sum())
    return {
        "pairs": len(same),
        "same": num_same,
        "different": len(same) - num_same,
        "far_step": 1 / (len(same) - num_same),
        "pairs_in_file": pair_set.num_images // 2,
    }


def _text_table(sets: Sequence[PairSet], results: Results) -> str:
    """The one table, aligned, and under it how finely each set tells FARs apart."""
    rows = _rows(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *map(_resolution, sets)])


def _rows(results: Results) -> list[list[str]]:
    """The table's header and rows."""
    header = ["set", "model", "accuracy", "threshold", "AUC", *_tar_headers(results)]
    return [header] + [
        [
            name,
            model,
            f"{figures.accuracy.mean:.4f} ± {figures.accuracy.std:.4f}",
            f"{figures.accuracy.threshold:.2f}",
            f"{figures.auc:.4f}",
            *("-" if p.tar is None else f"{p.tar:.4f}" for p in figures.tar_at_far),
        ]
        for name, models in results.items()
        for model, figures in models.items()
    ]


def _resolution(pair_set: PairSet) -> str:
    from face_distill.distill.verification import FAR_TARGETS

    counts = _counts(pair_set)
    used = "" if counts["pairs"] == counts["pairs_in_file"] else f" of {counts['pairs_in_file']}"
    text = (
        f"{pair_set.name}: {counts['pairs']}{used} pairs, {counts['different']} of two people: "
        f"FAR moves in steps of {counts['far_step']:.2g}"
    )
    beyond = [f"{target:g}" for target in FAR_TARGETS if target * counts["different"] < 1 - 1e-9]
    return text + (f"; {', '.join(beyond)} would be less than one pair (-)" if beyond else "")


def _roc_lines(models: dict[str, Figures]) -> dict[str, Any]:
    """TAR over FAR, one line a model."""
    return {
        f"{model}, AUC {figures.auc:.4f}": _staircase(figures.curve)
        for model, figures in models.items()
    }


def _staircase(curve: Roc) -> tuple[NDArray[Any], NDArray[Any]]:
    """The curve as it is between its points: TAR at a FAR is that of the largest FAR reached."""
    import numpy as np

    far, first = np.unique(curve.far, return_index=True)
    tar = curve.tar[np.append(first[1:], len(curve.far)) - 1]  # the highest at each FAR
    return np.repeat(far, 2)[1:], np.repeat(tar, 2)[:-1]


def _page(sets: Sequence[PairSet], results: Results, about: dict[str, Any]) -> Page:
    from shared.page import Page

    page = Page("Face verification")
    page.text(f"Checkpoint: {about['checkpoint']}. Data: {about['data']}.")
    header, *rows = _rows(results)
    page.table(header, rows, "TAR at FAR: exact, on all pairs of a set.")
    for line in map(_resolution, sets):
        page.text(line)
    page.section("How it is measured")
    page.table(["figure", "meaning"], list(PROTOCOL.items()))
    for pair_set in sets:
        models = results[pair_set.name]
        page.section(pair_set.name)
        page.chart("ROC, FAR on a logarithmic axis", _roc_lines(models), **ROC_AXES)
        page.table(
            ["model", *_tar_headers(results)],
            _folded_rows(models),
            "TAR over ten folds, mean ± deviation, and in brackets the FAR of the fold tried.",
        )
    return page


def _folded_rows(models: dict[str, Figures]) -> list[tuple[str | None, ...]]:
    return [
        (
            model,
            *(
                None if p.tar is None else f"{p.tar:.4f} ± {p.tar_std:.4f} ({p.far:.2g})"
                for p in figures.folded_tar_at_far
            ),
        )
        for model, figures in models.items()
    ]


if __name__ == "__main__":
    sys.exit(launch_alone(main))
