"""RecordIO files (`train.rec` with `train.idx`) read without mxnet: by byte offset, and by key.

A record file is a row of parts, each a little-endian head and a payload padded with zeros to a
multiple of 4 bytes:

    u32 0xced7230a | u32 kind << 29 | length | payload | 0..3 zero bytes

Kind 0 is a whole record; 1, 2, 3 are the first, middle and last part of a record whose payload
holds the magic number at a multiple of 4 bytes: the writer leaves those 4 bytes out and starts a
new part there, the reader puts them back. A labelled payload begins with four fields (u32 flag,
f32 label, u64 id, u64 id2); with flag > 0, that many float32 labels follow and the label among the
fields is 0. An index file holds one `key<TAB>byte offset` line a record.
"""

from __future__ import annotations

import copy
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from shared.errors import UserError
from shared.files import check_regular, read_bytes

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
HEAD = struct.Struct("<II")  # magic, kind << 29 | length
LABEL_HEADER = struct.Struct("<IfQQ")  # flag, label, id, id2
LENGTH_BITS = 29
MAX_LENGTH = (1 << LENGTH_BITS) - 1
WHOLE, FIRST, MIDDLE, LAST = range(4)
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


# --- by byte offset ----------------------------------------------------------------------------


class RecordFile:
    """Records of one file by byte offset, from any number of forked or spawned processes.

    Reads use `os.pread`, which shares no position with another process; a copy that was sent to
    one opens the file again.
    Every RecordError names the file and the byte offset.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None
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
        if kind == WHOLE:
            return part, end
        if kind != FIRST:
            raise RecordError(
                f"{self.path} at byte {offset}: this is part {kind} of a longer record, not its "
                "start; the index belongs to another file: fetch both again"
            )
        parts = [part]
        while kind != LAST:
            part_offset = end
            part, kind, end = self._read_part(part_offset, offset)
            if kind not in (MIDDLE, LAST):
                raise RecordError(
                    f"{self.path} at byte {part_offset}: a new record begins inside the one at "
                    f"byte {offset}; the file is damaged: fetch it again"
                )
            parts.append(part)
        return MAGIC_BYTES.join(parts), end

    def read_start(self, offset: int, size: int) -> bytes:
        """The first bytes of a payload, at most `size`, without the rest of a whole record."""
        chunk = self._pread(HEAD.size + size, offset)
        kind, length = self._part_head(chunk, offset, offset)
        end = HEAD.size + min(length, size)
        if kind == WHOLE and len(chunk) >= end:
            return chunk[HEAD.size : end]
        return self.read(offset)[0][:size]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None and os is not None:  # None at exit
            os.close(cast(int, self._descriptor))

    def _read_part(self, offset: int, record: int) -> tuple[bytes, int, int]:
        """One part's payload, its kind, and the byte behind its padding."""
        chunk = self._pread(_FIRST_READ, offset)
        kind, length = self._part_head(chunk, offset, record)
        end = HEAD.size + length
        padded = end + -length % 4
        if len(chunk) < padded:
            chunk += self._pread(padded - len(chunk), offset + len(chunk))
        if len(chunk) < padded:
            raise self._cut_off(offset, record, f"a part of {length} bytes with its padding")
        return chunk[HEAD.size : end], kind, offset + padded

    def _part_head(self, chunk: bytes, offset: int, record: int) -> tuple[int, int]:
        if len(chunk) < HEAD.size:
            raise self._cut_off(offset, record, "the 8 bytes that open a part")
        magic, packed = HEAD.unpack_from(chunk)
        if magic != MAGIC:
            raise RecordError(
                f"{self.path} at byte {offset}: expected the magic number {MAGIC:#x}, got "
                f"{magic:#x} (record at byte {record}); the file is damaged, or its index is of "
                "another file: fetch both again"
            )
        kind = packed >> LENGTH_BITS
        if kind > LAST:
            raise RecordError(
                f"{self.path} at byte {offset}: part kind {kind}, allowed are 0 to 3; the file is "
                "damaged: fetch it again"
            )
        return kind, packed & MAX_LENGTH

    def _cut_off(self, offset: int, record: int, what: str) -> RecordError:
        return RecordError(
            f"{self.path} ends at byte {self.size}, inside {what} at byte {offset} (record at byte "
            f"{record}); the file is cut off: fetch it again"
        )

    def _pread(self, count: int, offset: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._descriptor, count, offset)
        # A network file system may hand over less than was asked for; only b"" is the end.
        while 0 < len(data) < count and offset + len(data) < self.size:
            more = os.pread(self._descriptor, count - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


# --- by key ---------------------------------------------------------------------------------------


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and byte offsets of an index file, two int64 arrays in the file's order.

    5.9 million lines take about a second. Raises RecordError with the number of a bad line.
    """
    text = _index_text(path)
    try:
        numbers = np.fromstring(text, np.int64, sep=" ")
    except ValueError:
        raise _bad_line(path, text) from None
    if not _alternates(text, len(numbers)) or (numbers < 0).any():
        raise _bad_line(path, text)
    return numbers[0::2].copy(), numbers[1::2].copy()


def _index_text(path: Path) -> bytes:
    try:
        text = read_bytes(path)
    except FileNotFoundError:
        raise RecordError(
            f"{path} is missing: the index belongs beside the record file; unpack the data again"
        ) from None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from None
    text = text.replace(b"\r\n", b"\n").rstrip(b"\n")
    if not text:
        raise RecordError(f"{path} is empty: expected one 'key<TAB>byte offset' line a record")
    return text


def _alternates(text: bytes, count: int) -> bool:
    """Whether `count` numbers are separated by tab, line end, tab, …, and by nothing else."""
    symbols = np.frombuffer(text, np.uint8)
    separators = symbols[(symbols < ord("0")) | (symbols > ord("9"))]
    tabs, ends = separators[0::2], separators[1::2]
    alternate = bool((tabs == ord("\t")).all() and (ends == ord("\n")).all())
    return alternate and count % 2 == 0 and len(separators) == count - 1


def _bad_line(path: Path, text: bytes) -> RecordError:
    for number, line in enumerate(text.split(b"\n"), 1):
        fields = line.split(b"\t")
        if len(fields) != 2 or not all(field.isdigit() for field in fields):
            shown = line[:60].decode("utf-8", "replace")
            return RecordError(
                f"{path} line {number}: expected 'key<TAB>byte offset', got {shown!r}; "
                "the index is damaged, unpack the data set again"
            )
    return RecordError(f"{path} holds a number that is too large; unpack the data set again")


class RecordReader:
    """Records of one file by key, with the index held against the file at once.

    `keys` and `offsets` are int64, in ascending order of keys. An offset outside the file, a file
    that ends too early and one that goes on behind its last indexed record are a RecordError here,
    not in the middle of a run. Safe under fork and spawn, as RecordFile is.
    """

    def __init__(self, rec: Path, idx: Path) -> None:
        self.idx = Path(idx)
        self.file = RecordFile(rec)
        keys, offsets = read_index(self.idx)
        if (keys[1:] < keys[:-1]).any():  # the common packing scripts write key 0 last
            order = np.argsort(keys, kind="stable")
            keys, offsets = keys[order], offsets[order]
        self.keys, self.offsets = keys, offsets
        self._check_lines()
        self._check_ends()

    def select(self, keys: np.ndarray) -> RecordReader:
        """A reader of these keys alone: small to send to a worker process.

        Raises RecordError for a key that the index lacks.
        """
        chosen = copy.copy(self)
        chosen.keys = np.unique(np.asarray(keys, np.int64))
        chosen.offsets = np.array([self.offset_of(int(key)) for key in chosen.keys], np.int64)
        return chosen

    def __len__(self) -> int:
        return len(self.keys)

    def offset_of(self, key: int) -> int:
        """The byte offset of a key's record. Raises RecordError when the index lacks the key."""
        position = int(np.searchsorted(self.keys, key))
        if position == len(self.keys) or self.keys[position] != key:
            raise RecordError(
                f"{self.idx} has no key {key} (its {len(self.keys)} keys go from {self.keys[0]} to "
                f"{self.keys[-1]}); no offset in {self.file.path} is known for it"
            )
        return int(self.offsets[position])

    def read(self, key: int) -> bytes:
        """The payload of a record. Raises RecordError, naming file and offset, when damaged."""
        return self.file.read(self.offset_of(key))[0]

    def labelled(self, key: int) -> LabelledRecord:
        """The record of a key, taken apart into label and content."""
        return unpack(self.read(key), self.where(key))

    def label_of(self, key: int) -> float | np.ndarray:
        """The label of a record, a float or a float32 array, without reading its image."""
        start = self.start_of(key)
        if len(start) == LABEL_START and LABEL_HEADER.unpack_from(start)[0] > SHORT_LABELS:
            return self.labelled(key).labels
        return unpack(start, self.where(key)).labels

    def is_bare(self, key: int) -> bool:
        """Whether a record holds two labels and no image, as headers and identity records do."""
        start = self.start_of(key)
        return len(start) == LABEL_HEADER.size + 8 and LABEL_HEADER.unpack_from(start)[0] == 2

    def start_of(self, key: int) -> bytes:
        """The first 64 bytes of a payload, fewer when it is shorter."""
        return self.file.read_start(self.offset_of(key), LABEL_START)

    def where(self, key: int) -> str:
        """Where a record stands, for messages: file, key and byte offset."""
        return f"{self.file.path} key {key} at byte {self.offset_of(key)}"

    def _check_lines(self) -> None:
        same = np.flatnonzero(self.keys[1:] == self.keys[:-1])
        if same.size:
            raise RecordError(
                f"{self.idx} lists key {self.keys[same[0]]} twice, at bytes "
                f"{self.offsets[same[0]]} and {self.offsets[same[0] + 1]} of {self.file.path}; "
                "the index is damaged, unpack the data set again"
            )
        odd = np.flatnonzero(self.offsets % 4)
        if odd.size:
            raise RecordError(
                f"{self.idx} puts key {self.keys[odd[0]]} at byte {self.offsets[odd[0]]} of "
                f"{self.file.path}, which is no multiple of 4; the index is damaged, unpack the "
                "data set again"
            )

    def _check_ends(self) -> None:
        last, size = int(self.offsets.max()), self.file.size
        if last >= size:
            raise RecordError(
                f"{self.file.path} ends at byte {size}, but {self.idx} has a record at byte "
                f"{last}; the file is cut off, or the two do not belong together: fetch both again"
            )
        end = self.file.read(last)[1]
        if end != size:
            raise RecordError(
                f"{self.file.path} goes on behind its last indexed record, from byte {end} to "
                f"{size}; {self.idx} is cut off or belongs to another file: fetch both again"
            )
