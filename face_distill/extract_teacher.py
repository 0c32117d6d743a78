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

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
if not Path(sys.path[0], "shared").is_dir():  # the directory was copied alone
    sys.stderr.write("error: shared/ is missing beside face_distill/: copy the whole repository\n")
    sys.exit(3)

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ProcessOptions, ToolOptions, option, parse
from shared.errors import UserError
from shared.launch import launch, world_size
from shared.settings import Count, Positive, Range, Workers

if TYPE_CHECKING:  # torch comes after the input is checked
    import numpy as np
    from torch import Tensor

    from face_distill.distill.teacher import UnfinishedFeatures
    from face_distill.distill.teacher_networks import Teacher
    from face_distill.FaceDataset import FaceDataset
    from shared.distributed import World

log = logging.getLogger(__name__)

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
    return extract(cfg)


def extract(cfg: Config) -> int:
    """Write the teacher's features of the selected faces; the exit code."""
    from face_distill.distill.teacher import UnfinishedFeatures
    from face_distill.distill.teacher_networks import open_teacher
    from face_distill.FaceDataset import FaceDataset
    from shared import distributed, lock

    world = distributed.setup(cfg.tool.device)
    faces = FaceDataset(cfg.data_root, cfg.selection, cfg.limit or None, cfg.per_id, cache=False)
    faces.find_damaged()  # their rows are those of a black picture, and training leaves them out
    teacher = open_teacher(cfg.weights_source, cfg.arch, cfg.image_size).to(world.device)
    handle = lock.take(cfg.out, "--out") if world.is_main else None
    store = UnfinishedFeatures(cfg.out, describe(cfg, world, teacher, faces))
    first = distributed.broadcast_object(store.begin() if world.is_main else None, world)
    stop.hold()
    stop.all_hold()
    try:
        code = _extract(cfg, world, teacher, faces, store, first)
    finally:
        if handle is not None:
            os.close(handle)
    distributed.cleanup(world)
    return code


def _extract(
    cfg: Config, world: World, teacher: Teacher, faces: FaceDataset, store: UnfinishedFeatures,
    first: int | None,
) -> int:  # fmt: skip
    """From row `first` on; None: all is there."""
    from shared import distributed

    report = Report(cfg, world, store, first)
    if first is None:
        return report.conclude("extracted before; nothing to do")
    batches = -(-(len(faces) - first) // cfg.batch_size)
    mine = _features(cfg, world, teacher, faces, first)
    # One batch a rank and round: rank 0 writes them, then all learn whether one was asked to stop.
    for begun in range(0, batches, world.size):
        found = next(mine, None)
        start = first + (begun + world.rank) * cfg.batch_size
        for other in distributed.gather_objects(found and (start, found), world):
            if other and world.is_main and other[0] == report.rows:
                store.write(other[0], *other[1])
                report.show(other[0] + len(other[1][0]))
        number = distributed.largest(stop.number(), world)
        if number:
            reason = f"{stop.name_of(number)}: {report.rows} of {len(faces)} rows are kept"
            code = stop.exit_code_for(number)
            return report.conclude(f"{reason}; the same command continues", code)
    if world.is_main:
        store.finish(faces.labels)
        log.info("next: %s", _next_step(cfg))
    return report.conclude(report.summary())


def _features(
    cfg: Config, world: World, teacher: Teacher, faces: FaceDataset, first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Embeddings and maps of this rank's batches; ends after a batch when asked to stop.

    Every batch but the very last is whole, so a row's batch is the same whoever computes it.
    Raises UserError for NaN or infinity.
    """
    import numpy as np
    from torch.utils.data import Subset

    from shared.distributed import World
    from shared.loader import make_eval_loader

    starts = range(first, len(faces), cfg.batch_size)[world.rank :: world.size]
    rows = [row for s in starts for row in range(s, min(s + cfg.batch_size, len(faces)))]
    alone = World(device=world.device)  # the rows are this rank's share already
    for images, _, indices in make_eval_loader(
        Subset(faces, rows), cfg.batch_size, alone, workers=cfg.workers
    ):
        found = features(cfg, teacher, images.to(world.device, non_blocking=True))
        whole = [np.isfinite(part.reshape(len(part), -1)).all(axis=1) for part in found]
        bad = np.flatnonzero(~(whole[0] & whole[1]))
        if bad.size:
            row = int(indices[bad[0]])
            raise UserError(
                f"the teacher gives NaN or infinity for row {row} (key {faces.keys[row]} of "
                f"{faces.root}): try --amp off, or look at the weights"
            )
        yield found
        if stop.number():
            return


def features(cfg: Config, teacher: Teacher, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (B, D) and maps of uint8 faces (B, 3, H, W) on the teacher's device, float32.

    Raises UserError for maps that are no square. On CUDA convolutions are repeatable and in full
    float32: TensorFloat-32, cuDNN's default, rounds factors to three digits.
    """
    import torch

    from face_distill.distill.teacher_networks import spatial_probability
    from shared.amp import Amp

    exact = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with exact, Amp(cfg.tool.amp, images.device).autocast():
        embeddings, maps = teacher(images)
    if maps.shape[-1] != maps.shape[-2]:
        raise UserError(
            f"{teacher.weights_file} gives maps of {maps.shape[-2]} x {maps.shape[-1]} "
            "places: training reads squares"
        )
    if cfg.map == "probability":
        maps = spatial_probability(maps, cfg.temperature)
    return embeddings.cpu().numpy(), maps.cpu().numpy()


def describe(cfg: Config, world: World, teacher: Teacher, faces: FaceDataset) -> dict[str, Any]:
    """What decides about the numbers: the content of manifest.json, plain JSON values."""
    import hashlib

    from shared.amp import Amp

    embeddings, maps = features(cfg, teacher, faces.images([0]).to(world.device))
    wanted = teacher.preprocessing
    with teacher.weights_file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "schema": 1,
        "teacher": teacher.arch,
        "weights": teacher.weights_file.name,
        "weights_sha256": digest,
        "selection": cfg.selection,
        "selection_sha256": faces.selection_sha256(),
        "limit": len(faces),
        "per_id": cfg.per_id if cfg.selection == "per_id" else None,
        "num_images": len(faces),
        "image_size": wanted.image_size,
        "resize": "bicubic, antialias",
        "colours": "RGB",
        "mean": list(wanted.mean),
        "std": list(wanted.std),
        "embedding_shape": list(embeddings.shape[1:]),
        "map": cfg.map,
        "map_shape": list(maps.shape[1:]),
        "temperature": cfg.temperature if cfg.map == "probability" else None,
        "amp": Amp(cfg.tool.amp, world.device).mode,
        "batch_size": cfg.batch_size,
        "device": world.device.type,
    }


def _next_step(cfg: Config) -> str:
    chosen = f" --selection per_id --per-id {cfg.per_id}" if cfg.selection == "per_id" else ""
    return f"train_distill.py --data-root {cfg.data_root} --teacher-feat-dir {cfg.out}{chosen}"


class Report:
    """What rank 0 tells of an extraction: progress, status.json, how it ended."""

    def __init__(
        self, cfg: Config, world: World, store: UnfinishedFeatures, first: int | None
    ) -> None:
        from shared import outcome
        from shared.progress import Progress
        from shared.status import Status

        self.rows = store.num_rows if first is None else first
        self._world, self._store, self._first = world, store, self.rows
        self._batch, self._began = cfg.batch_size, time.monotonic()
        outcome.announce(cfg.out)
        self._progress: Progress | None = None
        if not world.is_main:
            return
        self._status = Status(
            cfg.out, recipe="face_distill", pid=outcome.launcher_pid(), world_size=world.size,
            total_steps=self._batches(store.num_rows),
        )  # fmt: skip
        self._status.write(step=self._batches(self.rows))
        total = self._batches(store.num_rows)
        self._progress = Progress(total, self._batches(self.rows), self._batch)
        if first:
            log.info("continuing: %d of %d rows are there", first, store.num_rows)

    def _batches(self, rows: int) -> int:
        return -(-rows // self._batch)

    def show(self, rows: int) -> None:
        """Report that so many rows are written."""
        self.rows = rows
        if self._progress:
            done = self._batches(rows)
            self._progress.show(done, 0, {})
            if self._status.is_due:
                self._status.write(step=done, eta_s=self._progress.eta_s(done))

    def summary(self) -> str:
        """What was extracted, and how fast."""
        speed = (self.rows - self._first) / max(time.monotonic() - self._began, 1e-9)
        plan = self._store.plan
        maps = " x ".join(str(size) for size in plan["map_shape"])
        return (
            f"{self.rows} embeddings of {plan['embedding_shape'][0]} numbers and maps of {maps} in "
            f"{self._store.out}, {speed:.4g} images/s"
        )

    def conclude(self, reason: str, code: int = 0) -> int:
        """Close the status; returns `code`, on every rank when the files are whole."""
        from shared import distributed

        if self._progress:
            self._progress.close()
            state = "stopped" if code else "done"
            step = self._batches(self.rows)
            self._status.write(state=state, exit_code=code, reason=reason, step=step)
        distributed.barrier(self._world)
        return code


# --- the input ------------------------------------------------------------------------------------


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
