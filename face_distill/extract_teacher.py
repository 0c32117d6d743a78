"""Extract a face teacher's features into the files that train_distill.py reads.

python extract_teacher.py --weights backbone.pth                  an IResNet of InsightFace
python extract_teacher.py --weights FILE --arch resnet50          a network of torchvision
python extract_teacher.py --weights FILE --arch torchscript       a module of yours, exported
python extract_teacher.py --weights FILE --nproc 4                four processes share the work

Written: teacher_embedding.npy (N, D), teacher_feat_map.npy, teacher_labels.npy (N,) and
manifest.json, row i for image i of the selection. Train with the same --selection and --per-id.
Interrupted, even killed, it is continued by the same command.

Maps: "probability" is (N, H*W), the softmax over the H*W places of the last feature map of
energy / temperature, where a place's energy is the sum of its squared features; rows sum to 1.
"features" is that map itself, (N, C, H, W), for --at-mode zagoruyko.
"""

import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared

from shared.config import ProcessOptions, ToolOptions, option, parse
from shared.errors import UserError
from shared.launch import launch, world_size
from shared.settings import Count, Positive, Range, Workers

PROJECT_ROOT = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120, as train_distill

DATA_ROOT = os.path.join(PROJECT_ROOT, "datasets", "faces_emore")  # noqa: PTH118
TEACHER_FEAT_DIR = os.path.join(PROJECT_ROOT, "teacher_features_12k")  # noqa: PTH118
LIMIT = 12000

_PUBLISHED = re.compile(r"(\w+_Weights\.)?(IMAGENET1K_\w+|DEFAULT)")  # torchvision's names


@dataclass(frozen=True)
class Config:
    """Settings of the extraction."""

    weights: str | None = option(
        None, "the teacher's file: .pth, .pt, .safetensors; or IMAGENET1K_V1 … in torch's cache"
    )
    arch: str = option(
        "auto",
        "auto: iresnet18, 34, 50 or 100 by the names in the file; a torchvision name (resnet50 …); "
        "torchscript: runs the file's code, only from a source you trust",
    )
    data_root: Path = option(Path(DATA_ROOT), "faces_emore, or <identity>/<image>")
    selection: Literal["first_n", "per_id"] = option("first_n", "which images: see README")
    limit: int = option(LIMIT, "number of images; 0: all there are")
    per_id: Count = option(20, "images of each identity with --selection per_id")
    out: Path = option(Path(TEACHER_FEAT_DIR), "where the files go")
    map: Literal["probability", "features"] = option("probability", "what is kept of the map")
    temperature: Positive = option(1.0, "divides the energy before the softmax; above 1: flatter")
    image_size: Annotated[int, Range(32, 4096)] | None = option(
        None, "side of the teacher's input; default: 112 for faces, torchvision's own"
    )
    batch_size: Count = option(64, "images a step and process")
    workers: Workers = option(4, "loader workers a process")
    tool: ToolOptions = field(default_factory=ToolOptions)
    processes: ProcessOptions = field(default_factory=ProcessOptions)

    @property
    def weights_source(self) -> Path | str:
        """The weight file, or the name of published weights."""
        name = self.weights or ""
        return name if _PUBLISHED.fullmatch(name) else Path(name).expanduser().absolute()


def main(argv: list[str] | None = None) -> int:
    """Check the input, then extract; the exit code."""
    cfg = parse(Config, argv, __doc__)
    _check_weights(cfg)
    if cfg.tool.demo:
        cfg = _with_demo(cfg)
    _check_faces(cfg.data_root)
    if cfg.tool.dry_run:
        sys.stdout.write(_plan(cfg) + "\n")
        return 0
    from face_distill.extraction import extract

    return extract(cfg)


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the demo's 800 faces; the teacher is the user's still, the demo ships no network."""
    from face_distill.demo_data import demo

    root = Path(PROJECT_ROOT) / "demo"
    paths = demo.build(root)
    changes = {"data_root": paths.data_root, "limit": 0, "out": root / "teacher_extracted"}
    return replace(cfg, **{n: v for n, v in changes.items() if n not in cfg.tool.typed})


def _check_weights(cfg: Config) -> None:
    source = cfg.weights_source
    if cfg.weights is None:
        raise UserError(
            "--weights is missing: give the teacher's file, for example backbone.pth of "
            "InsightFace's arcface_torch"
        )
    if isinstance(source, Path) and not source.exists():
        raise UserError(f"--weights {source} is missing: give the teacher's file")
    if isinstance(source, str) and cfg.arch == "auto":
        raise UserError(
            f"--weights {source} is the name of weights of torchvision: type its network too, for "
            "example --arch resnet50"
        )


def _check_faces(root: Path) -> None:
    """Refuse a directory without faces before anything slow is imported."""
    has_folders = root.is_dir() and any(path.is_dir() for path in root.iterdir())
    if not (root / "train.rec").is_file() and not has_folders:
        raise UserError(
            f"{root} holds no faces: expected train.rec, train.idx and property of faces_emore, or "
            "<identity>/<image> folders; unpack them there, or type --data-root"
        )


def _plan(cfg: Config) -> str:
    images = f"{cfg.limit} images" if cfg.limit else "all images"
    chosen = f"{cfg.selection}, {cfg.per_id} each" if cfg.selection == "per_id" else cfg.selection
    return (
        f"{images} of {cfg.data_root} ({chosen}) through {cfg.weights_source} ({cfg.arch}), "
        f"{world_size()} process(es), maps as {cfg.map}; written to {cfg.out}"
    )


if __name__ == "__main__":
    sys.exit(launch(main))
