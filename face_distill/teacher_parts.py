"""An extraction in parts that survive a kill: one file for some rows, put together at the end.

    <out>/parts/plan.json     what is being extracted: the coming manifest.json
    <out>/parts/000012.npz    embeddings and maps of the rows of part 12
    <out>/…                   what teacher.py reads; manifest.json comes last

Parts count only for the plan they were made by. A directory with another extraction is moved aside.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from face_distill.distill.teacher import EMBEDDING, LABELS, MANIFEST, MAP
from shared import lock
from shared.errors import UserError, one_line
from shared.files import (
    check_regular,
    move_aside,
    read_json,
    remove_stale_temporaries,
    write_atomic,
    write_json,
)
from shared.settings import differing

STATUS = "status.json"
_OURS = (EMBEDDING, MAP, LABELS, MANIFEST, STATUS, "parts")
_MOST_PARTS = 1000  # more files than that would make a directory slow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The parts of the extraction that `plan` describes, in the directory `out`."""

    out: Path
    plan: dict[str, Any]

    def __len__(self) -> int:
        return -(-self.num_rows // self.rows_each)

    @property
    def num_rows(self) -> int:
        """Rows of the finished files, one an image."""
        return self.plan["num_images"]

    @property
    def rows_each(self) -> int:
        """Rows of every part but the last: one batch, or as many as keep to a thousand parts."""
        batch_size = self.plan["batch_size"]
        return batch_size * -(-self.num_rows // (batch_size * _MOST_PARTS))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each array that a part holds."""
        return {name: tuple(self.plan[f"{name}_shape"]) for name in ("embedding", "map")}

    def begin(self) -> list[int] | None:
        """Make `out` ready; the parts to compute, or None when it holds all of this, finished.

        Parts of the same plan stay. Whatever else of an extraction is there is moved aside, with a
        line that says where and why; files of other names stay where they are.
        """
        manifest = read_json(self.out / MANIFEST)
        started = read_json(self.out / "parts" / "plan.json")
        if manifest == self.plan and _is_complete(self.out, self.num_rows):
            self._drop()
            return None
        if started != self.plan:
            _clear(self.out, self.plan, manifest or started)
            (self.out / "parts").mkdir()
            write_json(self.out / "parts" / "plan.json", self.plan)
        remove_stale_temporaries(self.out)
        remove_stale_temporaries(self.out / "parts")
        self._check_space()
        return self.missing()

    def missing(self) -> list[int]:
        """The numbers of the parts that are still to be computed."""
        return [number for number in range(len(self)) if not self._path(number).is_file()]

    def rows(self, number: int) -> range:
        """The rows of a part."""
        first = number * self.rows_each
        return range(first, min(first + self.rows_each, self.num_rows))

    def write(self, number: int, embeddings: np.ndarray, maps: np.ndarray) -> None:
        """Keep a part, whole or not at all: embeddings (n, D) and maps (n, …) of its n rows."""
        write_atomic(self._path(number), lambda f: np.savez(f, embedding=embeddings, map=maps))

    def assemble(self, labels: np.ndarray) -> None:
        """Write the files that teacher.py reads, part by part, the manifest last; drop the parts.

        labels: (N,) int64. Raises UserError when a part is missing or damaged; a damaged one is
        deleted, so that the next run computes it again.
        """
        write_atomic(self.out / EMBEDDING, self._joined("embedding"))
        write_atomic(self.out / MAP, self._joined("map"))
        write_atomic(self.out / LABELS, lambda f: np.save(f, labels, allow_pickle=False))
        write_json(self.out / MANIFEST, self.plan)
        self._drop()

    def _drop(self) -> None:
        shutil.rmtree(self.out / "parts", ignore_errors=True)

    def _check_space(self) -> None:
        """Raise UserError when the missing parts, and the files made of all, will not fit."""
        numbers = sum(math.prod(shape) for shape in self.shapes.values())
        there = sum(path.stat().st_size for path in (self.out / "parts").glob("*.npz"))
        needed = 2 * 4 * numbers * self.num_rows - there
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise UserError(
                f"{self.out}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for the "
                f"features of {self.num_rows} images and, until the end, their parts; free some "
                "space, choose another --out, or lower --limit"
            )

    def _path(self, number: int) -> Path:
        return self.out / "parts" / f"{number:06d}.npz"

    def _joined(self, name: str) -> Callable[[IO[bytes]], None]:
        """The writer of one .npy file out of all parts, of which one at a time is in memory."""
        shape = (self.num_rows, *self.shapes[name])

        def write(stream: IO[bytes]) -> None:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for number in range(len(self)):
                stream.write(self._read(number, name).astype("<f4").tobytes())

        return write

    def _read(self, number: int, name: str) -> np.ndarray:
        path, expected = self._path(number), (len(self.rows(number)), *self.shapes[name])
        try:
            check_regular(path)
            with np.load(path, allow_pickle=False) as stored:
                array = stored[name]
            if array.shape != expected or array.dtype != np.float32:
                raise ValueError(f"{array.dtype} {array.shape}, expected float32 {expected}")
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: --out has to be a directory that all processes share; type "
                "the same command again, it computes what is missing"
            ) from None
        except Exception as error:  # damage shows in any of a dozen ways
            path.unlink(missing_ok=True)
            raise UserError(
                f"{path} was damaged ({one_line(error)}) and is deleted: type the same command "
                "again, it computes this part alone"
            ) from None
        return array


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold `out`, made now when it is missing, for this process alone.

    Raises UserError when it cannot be written, or another live extraction holds it.
    """
    handle = lock.take(out, "--out")
    try:
        yield
    finally:
        os.close(handle)


def _clear(out: Path, plan: dict[str, Any], found: Any) -> None:
    """Move what an earlier extraction left in `out` aside, if it got as far as any features."""
    features = [out / name for name in (EMBEDDING, MAP, LABELS, MANIFEST)]
    if not any(path.exists() for path in features) and not list((out / "parts").glob("*.npz")):
        shutil.rmtree(out / "parts", ignore_errors=True)
        return
    aside = move_aside(out, [name for name in _OURS if (out / name).exists()])
    why = "they were not made by this command"
    if isinstance(found, dict):
        why = "; ".join(differing(found, plan)) or "they are not complete"
    log.info("the features that were in %s are now in %s: %s", out, aside, why)


def _is_complete(out: Path, num_rows: int) -> bool:
    paths = [out / name for name in (EMBEDDING, MAP, LABELS)]
    try:
        for path in paths:
            check_regular(path)
        arrays = [np.load(path, "r", allow_pickle=False) for path in paths]
    except (OSError, ValueError, EOFError):
        return False
    return all(len(array) == num_rows for array in arrays)
