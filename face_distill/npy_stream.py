"""A .npy file written batch by batch, in the memory of one batch, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shared.files import write_atomic


def write_rows(
    path: Path,
    batches: Iterable[NDArray[Any]],
    width: int,
    before_replacing: Callable[[], None] = lambda: None,
) -> int:
    """Write the rows of `batches`, each (B, width), to `path` as float32 (N, width); N.

    Whatever `batches` raises leaves the file that was there. `before_replacing`: see write_atomic.
    """
    count = 0

    def fill(stream: IO[bytes]) -> None:
        nonlocal count
        _write_header(stream, 0, width)
        for batch in batches:
            stream.write(np.ascontiguousarray(batch, "<f4").tobytes())
            count += len(batch)
        stream.seek(0)
        _write_header(stream, count, width)  # as long as the first: NumPy leaves room to grow

    write_atomic(path, fill, before_replacing=before_replacing)
    return count


def _write_header(stream: IO[bytes], rows: int, width: int) -> None:
    layout = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(stream, layout)
