"""The figures of an evaluation as text, JSON, HTML and charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from face_distill.distill.verification import FAR_TARGETS, Roc
from face_distill.evaluation import Figures, PairSet, Results
from shared.files import write_json
from shared.page import Page, write_chart

SCHEMA = 1
HEADLINE = "tar_at_far"
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
_TAR_HEADERS = [f"TAR@FAR={target:g}" for target in FAR_TARGETS]
_ROC_AXES: dict[str, Any] = {
    "x_label": "false accept rate (FAR)",
    "y_label": "true accept rate (TAR)",
    "log_x": True,
}
_HEADERS = ("set", "model", "accuracy", "threshold", "AUC", *_TAR_HEADERS)


def write(
    out: Path, sets: Sequence[PairSet], results: Results, about: dict[str, Any]
) -> list[Path]:
    """Write verification.json, verification.html and one roc_<set>.svg a set into `out`.

    about: what the JSON says beside figures and counts: "checkpoint", "data" and settings.
    Returns the files.
    """
    written = [out / "verification.json", out / "verification.html"]
    write_json(written[0], record(sets, results) | about)
    _page(sets, results, about).write(written[1])
    for s in sets:
        lines, path = _roc_lines(results[s.name]), out / f"roc_{s.name}.svg"
        written += write_chart(path, lines, title=s.name, **_ROC_AXES)
    return written


def record(sets: Sequence[PairSet], results: Results) -> dict[str, Any]:
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
    exact = {
        f"{p.target:g}": {
            "tar": p.tar, "far": p.far, "threshold": p.threshold, "reason": p.reason,
        }
        for p in figures.tar_at_far
    }  # fmt: skip
    folded = {
        f"{p.target:g}": {"tar": p.tar, "tar_std": p.tar_std, "far": p.far, "reason": p.reason}
        for p in figures.folded_tar_at_far
    }
    return {
        "accuracy": accuracy.mean,
        "accuracy_std": accuracy.std,
        "accuracy_folds": accuracy.folds,
        "threshold": accuracy.threshold,
        "auc": figures.auc,
        "tar_at_far": exact,
        "tar_at_far_10_fold": folded,
    }


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


def text_table(sets: Sequence[PairSet], results: Results) -> str:
    """The one table, aligned, and under it how finely each set tells FARs apart."""
    rows = [_HEADERS, *_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADERS))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *map(_resolution, sets)])


def _rows(results: Results) -> list[tuple[str, ...]]:
    return [
        (
            name,
            model,
            f"{figures.accuracy.mean:.4f} ± {figures.accuracy.std:.4f}",
            f"{figures.accuracy.threshold:.2f}",
            f"{figures.auc:.4f}",
            *("-" if p.tar is None else f"{p.tar:.4f}" for p in figures.tar_at_far),
        )
        for name, models in results.items()
        for model, figures in models.items()
    ]


def _resolution(pair_set: PairSet) -> str:
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


def _staircase(curve: Roc) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The curve as it is between its points: TAR at a FAR is that of the largest FAR reached."""
    far, first = np.unique(curve.far, return_index=True)
    tar = curve.tar[np.append(first[1:], len(curve.far)) - 1]  # the highest at each FAR
    return np.repeat(far, 2)[1:], np.repeat(tar, 2)[:-1]


def _page(sets: Sequence[PairSet], results: Results, about: dict[str, Any]) -> Page:
    page = Page("Face verification")
    page.text(f"Checkpoint: {about['checkpoint']}. Data: {about['data']}.")
    page.table(_HEADERS, _rows(results), "TAR at FAR: exact, on all pairs of a set.")
    for line in map(_resolution, sets):
        page.text(line)
    page.section("How it is measured")
    page.table(["figure", "meaning"], list(PROTOCOL.items()))
    for pair_set in sets:
        models = results[pair_set.name]
        page.section(pair_set.name)
        page.chart("ROC, FAR on a logarithmic axis", _roc_lines(models), **_ROC_AXES)
        page.table(
            ["model", *_TAR_HEADERS],
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
