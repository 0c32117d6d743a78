"""Where the demo of the filters is, and the settings that suit it; built when first needed.

Settings are those of --demo alone: what the user has typed is not among them.

vasevqa/demo/data/images, images2    pictures (demo_data/vases.py)
vasevqa/demo/weights/clip            a tiny CLIP (demo_data/clip.py)
vasevqa/demo/runs/filter/            what the four scripts make of them, one from another
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from shared.errors import UserError
from vasevqa.demo_data import vases

ROOT = Path(__file__).resolve().parents[1] / "demo"
DATA, CLIP, RUNS = ROOT / "data", ROOT / "weights" / "clip", ROOT / "runs" / "filter"
SORTED, FILTERED = RUNS / "images3", RUNS / "filtered_vases"
QUALITY = RUNS / "quality"
BEST = "best_image_quality_model.pth"


def for_model(typed: Collection[str]) -> dict[str, Any]:
    """Settings of model.py: what suits 240 pictures and two CPU cores."""
    pictures = vases.build_images(DATA)
    settings = {
        "data_dir": pictures.labelled,
        "output_dir": QUALITY,
        "arch": "resnet10",
        "image_size": 64,
        "batch_size": 32,
        "num_epochs": 10,
        "pretrained": "none",
        "workers": 0,
    }
    return _untyped(settings, typed)


def for_classifier(typed: Collection[str]) -> dict[str, Any]:
    """Settings of classifier.py, whose model may be typed."""
    pictures = vases.build_images(DATA)
    model = QUALITY / BEST
    if "model_path" not in typed:
        _made(model, "python model.py --demo")
    settings = {"source_dir": pictures.images, "target_dir": SORTED, "model_path": model}
    return _untyped({**settings, "workers": 0}, typed)


def for_clipfilter1(typed: Collection[str]) -> dict[str, Any]:
    """Settings of clipfilter1.py, whose pictures may be typed."""
    good = SORTED / "1"
    if "input_dir" not in typed:
        _made(good, "python classifier.py --demo")
    return _untyped({"input_dir": good, "output_dir": FILTERED, **_clip()}, typed)


def for_clipfilter2(typed: Collection[str]) -> dict[str, Any]:
    """Settings of clipfilter2.py, whose pictures may be typed."""
    accepted = FILTERED / "accepted"
    if "input_dir" not in typed:
        _made(accepted, "python clipfilter1.py --demo")
    return _untyped({"input_dir": accepted, "output_dir": FILTERED, **_clip()}, typed)


def _clip() -> dict[str, Any]:
    from vasevqa.demo_data import clip

    folder = clip.build(CLIP)
    return {"model_cache_dir": folder, "workers": 0}


def _untyped(settings: dict[str, Any], typed: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in typed}


def _made(path: Path, command: str) -> None:
    if not path.exists():
        raise UserError(f"the demo has no {path.name} yet: type {command} first")
