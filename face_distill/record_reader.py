"""Records by key: an index file, and a reader that holds it against its record file at once."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np

from face_distill.recordio import (
    LABEL_HEADER,
    LABEL_START,
    SHORT_LABELS,
    LabelledRecord,
    RecordError,
    RecordFile,
    unpack,
)
from shared.files import read_bytes


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
