"""Embed a folder of face crops with the trained student.

python embed.py faces/                                   embeddings.npy and embeddings.json
python embed.py faces/ --checkpoint checkpoints          with the best student of that run
python embed.py faces/ --out gallery.npy --no-flip       the image alone, without its mirror image
python embed.py faces/ --demo                            with the student of ./train.sh --demo

Row i of the .npy (N, D), float32, belongs to file i of the .json. The images (jpg jpeg png bmp
webp, any depth) should be cropped and aligned to 112 x 112 pixels like those of the training data.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
if not Path(sys.path[0], "shared").is_dir():  # the directory was copied alone
    sys.stderr.write("error: shared/ is missing beside face_distill/: copy the whole repository\n")
    sys.exit(3)

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ToolOptions, option, parse
from shared.errors import UserError
from shared.files import read_json, write_atomic, write_json
from shared.launch import launch_alone
from shared.settings import Count, Workers

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from face_distill.distill.model import FaceEmbedder

PROJECT_ROOT = Path(__file__).resolve().parent
CHECKPOINT = PROJECT_ROOT / "checkpoints" / "best_student_adapter_face.pth"
BLIP_PATH = PROJECT_ROOT / "blip2_weights"
OUT = PROJECT_ROOT / "embeddings.npy"

NAMED = 10  # unreadable files that the log names; the .json names all
SHOWN = 5  # images whose nearest other image is shown
SEARCHED = 20_000  # rows up to which it is looked for
EVERY_SECONDS = 10.0

Face = tuple["Tensor | None", str]  # crop, uint8 (3, 112, 112); why there is none, or _RESIZED
_RESIZED = "resized"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the embedding."""

    folder: Path | None = option(None, "folder of face images", positional=True)
    checkpoint: Path = option(CHECKPOINT, "trained student, run directory or exported adapter")
    blip_path: Path | None = option(None, "BLIP-2 directory; default: the run's, or blip2_weights")
    out: Path = option(OUT, "where the rows go (.npy); the names go beside it (.json)")
    batch_size: Count = option(64, "images embedded at a time")
    flip: bool = option(True, "add the embedding of the mirror image, as in verification")
    normalise: bool = option(True, "bring each row to unit length")
    workers: Workers = option(4, "threads that decode images")
    tool: ToolOptions = field(default_factory=ToolOptions)

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.out.suffix != ".npy":
            raise ValueError(f"--out {self.out} must end with .npy")

    @property
    def names(self) -> Path:
        """The file of the row order."""
        return self.out.with_suffix(".json")


@dataclass
class Tally:
    """What became of each image."""

    files: list[str] = field(default_factory=list)
    resized: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)

    def take(self, name: str, face: Face) -> list[Tensor]:
        """The crop of an image in a list; [] where there is none."""
        from shared.images import printable

        crop, note = face
        if crop is None:
            self.skipped.append({"file": printable(name), "reason": note})
            if len(self.skipped) <= NAMED:
                log.warning("skipped %s: %s", printable(name), note)
            return []
        self.files.append(printable(name))
        self.resized += note == _RESIZED
        return [crop]


def main(argv: list[str] | None = None) -> int:
    """Check the input, then embed; the exit code."""
    cfg = parse(Config, argv, __doc__)
    if cfg.tool.demo:
        cfg = _with_demo(cfg)
    from face_distill.distill import student_files
    from shared.images import SUFFIXES, find_images

    assert cfg.folder is not None
    images = find_images(cfg.folder)
    if not images:
        kinds = " ".join(sorted(SUFFIXES))
        raise UserError(f"{cfg.folder} holds no images ({kinds}): give the folder with the faces")
    checkpoint = student_files.checkpoint_at(cfg.checkpoint)
    tower = student_files.tower_of(checkpoint, cfg.blip_path, BLIP_PATH)
    log.info("%d images in %s, student %s on the tower %s", len(images), cfg.folder, checkpoint,
             tower)  # fmt: skip
    if cfg.tool.dry_run:
        return 0
    _prepare_out(cfg.out, cfg.names)
    return _embed(cfg, images, tower, checkpoint)


def _with_demo(cfg: Config) -> Config:
    """`cfg` with the demo's student and tower, where none were typed."""
    from face_distill.distill.student_files import demo_student

    demo = PROJECT_ROOT / "demo"
    out = cfg.out if "out" in cfg.tool.typed else demo / OUT.name
    return replace(cfg, out=out, **demo_student(demo, cfg.tool.typed))


def _prepare_out(out: Path, names: Path) -> None:
    """Find out before the work, not after it, whether the result can be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {out.parent} cannot be made: {error.strerror}") from None
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written: choose another file")
    written = read_json(names)
    if names.exists() and not (isinstance(written, dict) and "files" in written):
        raise UserError(
            f"{names}, where the names would go, is something else: choose another --out"
        )


def _embed(cfg: Config, images: list[str], tower: Path, checkpoint: Path) -> int:
    from face_distill.distill.model import FaceEmbedder, open_student
    from shared.device import resolve

    device = resolve(cfg.tool.device, 0, os.environ)
    embed = FaceEmbedder(open_student(tower, checkpoint), device, cfg.tool.amp)
    tally, width = Tally(), embed.student.embedding_dim
    rows = _rows(cfg, embed, images, tally)
    _write_rows(cfg, rows, width)
    write_json(cfg.names, _description(cfg, tally, checkpoint, width))
    _conclude(cfg, tally, width)
    return 0


def _rows(
    cfg: Config, embed: FaceEmbedder, images: list[str], tally: Tally
) -> Iterator[np.ndarray]:
    """Embeddings (B, D), batch after batch. Raises UserError when most images are unreadable."""
    import torch
    from torch.nn.functional import normalize

    began = shown_at = time.monotonic()
    for batch in _decoded(cfg, images):
        crops = [crop for name, face in batch for crop in tally.take(name, face)]
        if crops:
            faces = torch.stack(crops)
            rows = embed(faces) + embed(faces.flip(-1)) if cfg.flip else embed(faces)
            if not bool(torch.isfinite(rows).all()):
                raise UserError(
                    "the student gives embeddings that are not finite: its run diverged, or this "
                    "--amp is too coarse for it (--amp off)"
                )
            yield (normalize(rows) if cfg.normalise else rows).cpu().numpy()
        if time.monotonic() - shown_at >= EVERY_SECONDS:
            shown_at = time.monotonic()
            done = len(tally.files) + len(tally.skipped)
            log.info("%d of %d images, %.4g a second", done, len(images), done / (shown_at - began))
    _refuse_when_most_are_unreadable(cfg, tally, len(images))


def _decoded(cfg: Config, images: list[str]) -> Iterator[list[tuple[str, Face]]]:
    """The faces batch by batch, with their names; one batch is decoded ahead, in threads."""
    from face_distill.distill.images import fitted
    from shared.images import read_rgb

    folder = cfg.folder or Path()

    def read(name: str) -> Face:
        try:
            image = read_rgb(folder / name)
        except ValueError as error:
            return None, str(error)
        crop = fitted(image)
        return crop, "" if crop.shape == image.shape else _RESIZED

    with ThreadPoolExecutor(max(cfg.workers, 1)) as pool:
        names: list[str] = []
        decoded: Iterable[Face] = ()
        for start in range(0, len(images) + cfg.batch_size, cfg.batch_size):
            following = images[start : start + cfg.batch_size]
            ahead = pool.map(read, following)
            yield list(zip(names, decoded, strict=True))
            names, decoded = following, ahead


def _write_rows(cfg: Config, batches: Iterable[np.ndarray], width: int) -> None:
    """Write batches (B, width) as one array (N, width), float32, in the memory of one batch.

    Whatever `batches` raises leaves the file that was there.
    """
    import numpy as np

    def write_header(stream: IO[bytes], rows: int) -> None:
        layout = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(stream, layout)

    def fill(stream: IO[bytes]) -> None:
        count = 0
        write_header(stream, 0)
        for batch in batches:
            stream.write(np.ascontiguousarray(batch, "<f4").tobytes())
            count += len(batch)
        stream.seek(0)
        write_header(stream, count)  # as long as the first: NumPy leaves room to grow

    # Rows are never beside the names of other rows: no names for a moment is better.
    write_atomic(cfg.out, fill, before_replacing=lambda: cfg.names.unlink(missing_ok=True))


def _refuse_when_most_are_unreadable(cfg: Config, tally: Tally, total: int) -> None:
    bad = len(tally.skipped)
    if bad > NAMED:
        log.warning("skipped %d more", bad - NAMED)
    if 2 * bad > total:
        raise UserError(
            f"{bad} of {total} images in {cfg.folder} could not be read: nothing was written; "
            "give a folder of images, or fetch them again"
        )


def _description(cfg: Config, tally: Tally, checkpoint: Path, width: int) -> dict[str, Any]:
    from shared.images import printable

    return {
        "schema": 1,
        "files": tally.files,
        "shape": [len(tally.files), width],
        "folder": printable(str(cfg.folder)),
        "checkpoint": printable(str(checkpoint)),
        "flip": cfg.flip,
        "normalised": cfg.normalise,
        "resized": tally.resized,
        "skipped": tally.skipped,
    }


def _conclude(cfg: Config, tally: Tally, width: int) -> None:
    if tally.resized:
        log.warning(
            "%d of %d images were no aligned crops of 112 x 112 and were resized: embeddings of "
            "faces that are not cropped and aligned as in training compare badly",
            tally.resized,
            len(tally.files),
        )
    for name, other, similarity in _nearest(cfg.out, tally.files):
        log.info("nearest to %s: %s (cosine %.3f)", name, other, similarity)
    log.info("%d x %d embeddings in %s, their files in %s (%d images skipped)", len(tally.files),
             width, cfg.out, cfg.names, len(tally.skipped))  # fmt: skip


def _nearest(path: Path, files: list[str]) -> list[tuple[str, str, float]]:
    """The first images, the other image nearest to each, and the cosine of the two."""
    import numpy as np

    if not 2 <= len(files) <= SEARCHED:
        return []
    rows = np.load(path)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosines = rows[:SHOWN] @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    best = cosines.argmax(1)
    return [(files[i], files[j], float(cosines[i, j])) for i, j in enumerate(best)]


if __name__ == "__main__":
    sys.exit(launch_alone(main))
