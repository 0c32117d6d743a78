"""Record files written as mxnet writes them, byte for byte (form: distill/recordio.py)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from face_distill.distill.recordio import (
    FIRST,
    HEAD,
    LABEL_HEADER,
    LAST,
    LENGTH_BITS,
    MAGIC,
    MAGIC_BYTES,
    MAX_LENGTH,
    MIDDLE,
    WHOLE,
    RecordError,
)
from shared.files import write_atomic


def pack(labels: float | np.ndarray, content: bytes, record_id: int = 0) -> bytes:
    """The payload of `content` with its label: flag 0 for a number, flag n for an array of n."""
    if isinstance(labels, np.ndarray):
        values = labels.astype("<f4").ravel()
        return LABEL_HEADER.pack(values.size, 0.0, record_id, 0) + values.tobytes() + content
    return LABEL_HEADER.pack(0, labels, record_id, 0) + content


def encode(payload: bytes) -> bytes:
    """The bytes of one record, split where the payload holds the magic number 4-aligned.

    Raises RecordError for a payload of 2**29 bytes or more, which the format cannot hold.
    """
    if len(payload) > MAX_LENGTH:
        raise RecordError(f"a record of {len(payload)} bytes: RecordIO holds at most {MAX_LENGTH}")
    parts = _split_at_magic(payload)
    kinds = [MIDDLE] * len(parts)
    kinds[0], kinds[-1] = FIRST, LAST
    if len(parts) == 1:
        kinds = [WHOLE]
    heads = (HEAD.pack(MAGIC, k << LENGTH_BITS | len(p)) for k, p in zip(kinds, parts, strict=True))
    body = b"".join(head + part for head, part in zip(heads, parts, strict=True))
    return body + bytes(-len(parts[-1]) % 4)


def _split_at_magic(payload: bytes) -> list[bytes]:
    parts, start = [], 0
    found = payload.find(MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            parts.append(payload[start:found])
            start = found + 4
        # The 4 bytes of the magic number differ, so two of them never overlap.
        found = payload.find(MAGIC_BYTES, found + 4)
    return [*parts, payload[start:]]


def write_records(rec: Path, idx: Path, items: Iterable[tuple[int, bytes]]) -> None:
    """Write (key, payload) pairs as a record file and its index, byte for byte as mxnet does.

    Both files appear whole or not at all; the index comes second.
    """
    lines: list[str] = []

    def write(stream: IO[bytes]) -> None:
        for key, payload in items:
            lines.append(f"{key}\t{stream.tell()}\n")
            stream.write(encode(payload))

    write_atomic(rec, write)
    text = "".join(lines).encode()
    write_atomic(idx, lambda stream: (stream.write(text), None)[1])
