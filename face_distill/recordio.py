"""RecordIO files (`train.rec` with `train.idx`) read and written without mxnet.

A record file is a row of parts, each a little-endian head and a payload padded with zeros to a
multiple of 4 bytes:

    u32 0xced7230a | u32 kind << 29 | length | payload | 0..3 zero bytes

Kind 0 is a whole record; 1, 2, 3 are the first, middle and last part of a record whose payload
holds the magic number at a multiple of 4 bytes: the writer leaves those 4 bytes out and starts a
new part there, the reader puts them back. A labelled payload begins with four fields (u32 flag,
f32 label, u64 id, u64 id2); with flag > 0, that many float32 labels follow and the label among the
fields is 0. An index file holds one `key<TAB>byte offset` line a record (record_reader.py).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from shared.errors import UserError
from shared.files import check_regular, write_atomic

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_HEAD = struct.Struct("<II")  # magic, kind << 29 | length
LABEL_HEADER = struct.Struct("<IfQQ")  # flag, label, id, id2
_LENGTH_BITS = 29
_MAX_LENGTH = (1 << _LENGTH_BITS) - 1
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
SHORT_LABELS = 10  # labels that fit in the first 64 bytes of a payload
LABEL_START = LABEL_HEADER.size + 4 * SHORT_LABELS
_FIRST_READ = 16 * 1024  # bytes; most face records are smaller, so one system call fetches them


class RecordError(UserError):
    """A damaged or ill-fitting record or index file; names the file and the byte offset."""


class LabelledRecord(NamedTuple):
    """One unpacked payload: `labels` is a float for flag 0, a float32 array (flag,) otherwise."""

    flag: int
    labels: float | np.ndarray
    record_id: int
    content: bytes


# --- payloads -------------------------------------------------------------------------------------


def pack(labels: float | np.ndarray, content: bytes, record_id: int = 0) -> bytes:
    """The payload of `content` with its label: flag 0 for a number, flag n for an array of n."""
    if isinstance(labels, np.ndarray):
        values = labels.astype("<f4").ravel()
        return LABEL_HEADER.pack(values.size, 0.0, record_id, 0) + values.tobytes() + content
    return LABEL_HEADER.pack(0, labels, record_id, 0) + content


def unpack(payload: bytes, where: str = "payload") -> LabelledRecord:
    """The label, id and content of a payload that `pack`, or mxnet, made.

    `where` names the record in the error. Raises RecordError when the payload is too short.
    """
    if len(payload) < LABEL_HEADER.size:
        raise RecordError(
            f"{where}: {len(payload)} bytes are too few for a label header of "
            f"{LABEL_HEADER.size}; this is not a file of labelled images"
        )
    flag, label, record_id, _ = LABEL_HEADER.unpack_from(payload)
    if flag == 0:
        return LabelledRecord(0, label, record_id, payload[LABEL_HEADER.size :])
    end = LABEL_HEADER.size + 4 * flag
    if len(payload) < end:
        raise RecordError(
            f"{where}: the header promises {flag} labels, {end} bytes, but the record has "
            f"{len(payload)}; this is not a file of labelled images, or it is damaged"
        )
    labels = np.frombuffer(payload, "<f4", flag, LABEL_HEADER.size).astype(np.float32)
    return LabelledRecord(flag, labels, record_id, payload[end:])


# --- writing --------------------------------------------------------------------------------------


def encode(payload: bytes) -> bytes:
    """The bytes of one record, split where the payload holds the magic number 4-aligned.

    Raises RecordError for a payload of 2**29 bytes or more, which the format cannot hold.
    """
    if len(payload) > _MAX_LENGTH:
        raise RecordError(f"a record of {len(payload)} bytes: RecordIO holds at most {_MAX_LENGTH}")
    parts = _split_at_magic(payload)
    kinds = [_MIDDLE] * len(parts)
    kinds[0], kinds[-1] = _FIRST, _LAST
    if len(parts) == 1:
        kinds = [_WHOLE]
    heads = (
        _HEAD.pack(MAGIC, k << _LENGTH_BITS | len(p)) for k, p in zip(kinds, parts, strict=True)
    )
    body = b"".join(head + part for head, part in zip(heads, parts, strict=True))
    return body + bytes(-len(parts[-1]) % 4)


def _split_at_magic(payload: bytes) -> list[bytes]:
    parts, start = [], 0
    found = payload.find(_MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            parts.append(payload[start:found])
            start = found + 4
        # The 4 bytes of the magic number differ, so two of them never overlap.
        found = payload.find(_MAGIC_BYTES, found + 4)
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


# --- reading --------------------------------------------------------------------------------------


class RecordFile:
    """Records of one file by byte offset, from any number of forked or spawned processes.

    Each process opens the file when it first reads; reads use `os.pread` and share no position.
    Every RecordError names the file and the byte offset.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
        self._opened_by = 0
        try:
            check_regular(self.path)
            self.size = self.path.stat().st_size
        except FileNotFoundError:
            raise RecordError(f"{path} is missing: unpack or fetch the data set again") from None
        except OSError as error:
            raise RecordError(f"{path} cannot be read: {error.strerror}") from None

    def read(self, offset: int) -> tuple[bytes, int]:
        """The payload of the record that starts at a byte, and the byte behind the record."""
        part, kind, end = self._read_part(offset, offset)
        if kind == _WHOLE:
            return part, end
        if kind != _FIRST:
            raise RecordError(
                f"{self.path} at byte {offset}: this is part {kind} of a longer record, not its "
                "start; the index belongs to another file: fetch both again"
            )
        parts = [part]
        while kind != _LAST:
            part_offset = end
            part, kind, end = self._read_part(part_offset, offset)
            if kind not in (_MIDDLE, _LAST):
                raise RecordError(
                    f"{self.path} at byte {part_offset}: a new record begins inside the one at "
                    f"byte {offset}; the file is damaged: fetch it again"
                )
            parts.append(part)
        return _MAGIC_BYTES.join(parts), end

    def read_start(self, offset: int, size: int) -> bytes:
        """The first bytes of a payload, at most `size`, without the rest of a whole record."""
        chunk = self._pread(_HEAD.size + size, offset)
        kind, length = self._part_head(chunk, offset, offset)
        end = _HEAD.size + min(length, size)
        if kind == _WHOLE and len(chunk) >= end:
            return chunk[_HEAD.size : end]
        return self.read(offset)[0][:size]

    def close(self) -> None:
        """Close this process's descriptor; the next read opens it again."""
        if self._descriptor is not None and self._opened_by == os.getpid():
            os.close(self._descriptor)
        self._descriptor = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None, "_opened_by": 0}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None and os is not None:  # None at exit
            self.close()

    def _read_part(self, offset: int, record: int) -> tuple[bytes, int, int]:
        """One part's payload, its kind, and the byte behind its padding."""
        chunk = self._pread(_FIRST_READ, offset)
        kind, length = self._part_head(chunk, offset, record)
        end = _HEAD.size + length
        padded = end + -length % 4
        if len(chunk) < padded:
            chunk += self._pread(padded - len(chunk), offset + len(chunk))
        if len(chunk) < padded:
            raise self._cut_off(offset, record, f"a part of {length} bytes with its padding")
        return chunk[_HEAD.size : end], kind, offset + padded

    def _part_head(self, chunk: bytes, offset: int, record: int) -> tuple[int, int]:
        if len(chunk) < _HEAD.size:
            raise self._cut_off(offset, record, "the 8 bytes that open a part")
        magic, packed = _HEAD.unpack_from(chunk)
        if magic != MAGIC:
            raise RecordError(
                f"{self.path} at byte {offset}: expected the magic number {MAGIC:#x}, got "
                f"{magic:#x} (record at byte {record}); the file is damaged, or its index is of "
                "another file: fetch both again"
            )
        kind = packed >> _LENGTH_BITS
        if kind > _LAST:
            raise RecordError(
                f"{self.path} at byte {offset}: part kind {kind}, allowed are 0 to 3; the file is "
                "damaged: fetch it again"
            )
        return kind, packed & _MAX_LENGTH

    def _cut_off(self, offset: int, record: int, what: str) -> RecordError:
        return RecordError(
            f"{self.path} ends at byte {self.size}, inside {what} at byte {offset} (record at byte "
            f"{record}); the file is cut off: fetch it again"
        )

    def _pread(self, count: int, offset: int) -> bytes:
        if self._descriptor is None or self._opened_by != os.getpid():
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._opened_by = os.getpid()
        data = os.pread(self._descriptor, count, offset)
        # A network file system may hand over less than was asked for; only b"" is the end.
        while 0 < len(data) < count and offset + len(data) < self.size:
            more = os.pread(self._descriptor, count - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


def scan(path: Path) -> Iterator[tuple[int, bytes]]:
    """Byte offset and payload of every record in file order, without an index.

    Raises RecordError, naming file and offset, where the file is damaged or cut off; a file cut
    exactly between two records can only be noticed with its index.
    """
    file = RecordFile(path)
    offset = 0
    while offset < file.size:
        payload, end = file.read(offset)
        yield offset, payload
        offset = end
    file.close()
