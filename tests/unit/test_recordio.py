"""The record format against bytes written out by hand, and damage of every kind."""

import multiprocessing
import struct

import numpy as np
import pytest

from face_distill.demo_data.records import encode, pack, write_records
from face_distill.distill.recordio import RecordError, RecordFile, RecordReader, read_index, unpack

MAGIC = b"\x0a\x23\xd7\xce"


def scan(path):
    """Byte offset and payload of every record in file order, without an index."""
    file, offset = RecordFile(path), 0
    while offset < file.size:
        payload, end = file.read(offset)
        yield offset, payload
        offset = end


def written(tmp_path, payloads, keys=None):
    rec, idx = tmp_path / "train.rec", tmp_path / "train.idx"
    write_records(rec, idx, zip(keys or range(len(payloads)), payloads, strict=True))
    return rec, idx


LONG = b"abcd" + MAGIC + b"efgh" + MAGIC + b"ij"


@pytest.mark.parametrize(
    ("payload", "written"),
    [
        (b"hello", MAGIC + b"\x05\x00\x00\x00hello\x00\x00\x00"),
        (b"", MAGIC + b"\x00\x00\x00\x00"),
        # kinds 1, 2 and 3: the first, a middle and the last part
        (LONG, MAGIC + b"\x04\x00\x00\x20abcd" + MAGIC + b"\x04\x00\x00\x40efgh"
         + MAGIC + b"\x02\x00\x00\x60ij\x00\x00"),
        (MAGIC, MAGIC + b"\x00\x00\x00\x20" + MAGIC + b"\x00\x00\x00\x60"),
        (b"a" + MAGIC + b"bcd", MAGIC + b"\x08\x00\x00\x00a" + MAGIC + b"bcd"),  # not aligned
    ],
)  # fmt: skip
def test_a_record_has_the_documented_bytes(payload, written):
    assert encode(payload) == written


def test_both_label_forms_have_the_documented_bytes_and_come_back():
    scalar = bytes.fromhex("000000000000e04009000000000000000000000000000000")
    assert pack(7.0, b"jpeg", 9) == scalar + b"jpeg"
    assert unpack(scalar + b"jpeg") == (0, 7.0, 9, b"jpeg")
    several = bytes.fromhex("020000000000000000000000000000000000000000000000")
    several += struct.pack("<2f", 1, 3) + b"x"
    assert pack(np.array([1, 3], np.float32), b"x") == several
    record = unpack(several)
    assert record.flag == 2 and record.labels.tolist() == [1, 3] and record.content == b"x"


@pytest.mark.parametrize("payload", [b"short", struct.pack("<IfQQ", 5, 0, 0, 0) + b"\0" * 8])
def test_unpack_refuses_payloads_that_are_too_short(payload):
    with pytest.raises(RecordError, match="here"):
        unpack(payload, "here")


def test_ten_thousand_random_records_come_back(tmp_path):
    rng = np.random.default_rng(0)
    payloads = []
    for number in range(10_000):
        size = 40_001 if number == 7 else int(rng.integers(0, 200))  # one is longer than a read
        payload = bytearray(rng.bytes(size))
        for _ in range(number % 4):  # a magic number at any place, aligned or not
            place = int(rng.integers(0, len(payload) + 1))
            payload[place:place] = MAGIC
        payloads.append(bytes(payload))
    assert sum(len(encode(p)) > len(p) + 11 for p in payloads) > 1000  # many have several parts
    rec, idx = written(tmp_path, payloads)
    reader = RecordReader(rec, idx)
    assert len(reader) == 10_000
    order = rng.permutation(10_000)
    assert all(reader.read(int(key)) == payloads[key] for key in order)
    assert [payload for _, payload in scan(rec)] == payloads


def test_every_cut_of_a_file_is_an_error_that_names_file_and_offset(tmp_path):
    payloads = [b"first", b"abcd" + MAGIC + b"efg", pack(1.0, b"img")]
    rec, idx = written(tmp_path, payloads)
    whole = rec.read_bytes()
    borders = {offset for offset, _ in scan(rec)}
    for cut in range(len(whole)):
        rec.write_bytes(whole[:cut])
        with pytest.raises(RecordError, match=rf"train\.rec ends at byte {cut}\b.*at byte \d+"):
            RecordReader(rec, idx)
        if cut not in borders:
            with pytest.raises(RecordError, match=rf"train\.rec ends at byte {cut}\b.*at byte \d+"):
                list(scan(rec))


def test_a_wrong_magic_number_is_named_with_its_offset(tmp_path):
    rec, idx = written(tmp_path, [b"one!", b"two!", b"three"])
    damaged = bytearray(rec.read_bytes())
    damaged[12:16] = b"\x01\x02\x03\x04"
    rec.write_bytes(damaged)
    with pytest.raises(RecordError, match=r"train\.rec at byte 12: .*0x4030201"):
        RecordReader(rec, idx).read(1)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ((2, 3), "byte 0: this is part 2"),
        ((1, 0), "byte 12: a new record begins"),
        ((7,), "part kind 7"),
    ],
)
def test_parts_out_of_order_are_refused(tmp_path, kinds, message):
    rec = tmp_path / "train.rec"
    rec.write_bytes(b"".join(MAGIC + struct.pack("<I", k << 29 | 4) + b"data" for k in kinds))
    with pytest.raises(RecordError, match=message):
        RecordFile(rec).read(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\t0\n1\t12\n", "goes on behind its last indexed record, from byte 24 to 40"),
        ("0\t0\n1\t4000\n", "has a record at byte 4000"),
        ("0\t0\n0\t12\n2\t24\n", "key 0 twice"),
        ("0\t0\n1\t13\n2\t24\n", "key 1 at byte 13"),
        ("0\t0\n1\t16\n2\t24\n", r"train\.rec at byte 16"),  # found when it is read
    ],
)
def test_an_index_of_another_file_is_refused(tmp_path, text, message):
    rec, idx = written(tmp_path, [b"one!", b"two!", b"three"])
    idx.write_text(text)
    with pytest.raises(RecordError, match=message):
        RecordReader(rec, idx).read(1)


def test_a_missing_key_is_named(tmp_path):
    reader = RecordReader(*written(tmp_path, [b"a", b"b"], keys=[4, 9]))
    with pytest.raises(RecordError, match=r"train\.idx has no key 5 .*4 to 9"):
        reader.read(5)


@pytest.mark.parametrize("name", ["train.rec", "train.idx"])
def test_a_missing_file_is_named(tmp_path, name):
    rec, idx = written(tmp_path, [b"a"])
    (tmp_path / name).unlink()
    with pytest.raises(RecordError, match=rf"{name} is missing"):
        RecordReader(rec, idx)


def test_the_index_may_be_unsorted_and_end_its_lines_with_cr_lf(tmp_path):
    idx = tmp_path / "train.idx"
    idx.write_bytes(b"1\t0\r\n2\t16\r\n0\t32\r\n")
    keys, offsets = read_index(idx)
    assert keys.tolist() == [1, 2, 0] and offsets.tolist() == [0, 16, 32]
    rec, idx = written(tmp_path, [b"one", b"two", b"zero"], keys=[1, 2, 0])
    reader = RecordReader(rec, idx)
    assert reader.keys.tolist() == [0, 1, 2] and reader.read(0) == b"zero"


@pytest.mark.parametrize("line", ["x\t3", "1 3", "1\t2\t3", "", "1\t", "-1\t4", "1\t2.5"])
def test_a_bad_index_line_is_named_by_number(tmp_path, line):
    idx = tmp_path / "train.idx"
    idx.write_text(f"0\t0\n1\t8\n{line}\n2\t16\n")
    with pytest.raises(RecordError, match=r"train\.idx line 3:"):
        read_index(idx)
    idx.write_text("0\t0\n1\n8\t2\t16\n")  # two bad lines whose numbers add up
    with pytest.raises(RecordError, match="line 2"):
        read_index(idx)
    idx.write_text("\n\n")
    with pytest.raises(RecordError, match=r"train\.idx is empty"):
        read_index(idx)


def test_a_label_is_read_without_its_image(tmp_path):
    many = pack(np.arange(30, dtype=np.float32), b"i")
    payloads = [many, pack(5.0, bytes(9000)), pack(2.0, b""), pack(6.0, MAGIC + b"image")]
    reader = RecordReader(*written(tmp_path, payloads))
    assert np.asarray(reader.label_of(0)).tolist() == list(range(30))
    assert [reader.label_of(key) for key in (1, 2, 3)] == [5.0, 2.0, 6.0]
    assert reader.labelled(3).content == MAGIC + b"image"


def test_a_selection_reads_the_same_records(tmp_path):
    reader = RecordReader(*written(tmp_path, [b"a", b"b", b"c"]))
    chosen = reader.select(np.array([2, 0]))
    assert len(chosen) == 2 and chosen.read(2) == b"c" and len(reader) == 3
    with pytest.raises(RecordError, match="no key 1"):
        chosen.read(1)


def _read_in_child(reader, answers):
    answers.put(reader.read(1))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_reads_after_its_parent(tmp_path, method):
    reader = RecordReader(*written(tmp_path, [b"a", b"in the child"]))
    reader.read(0)
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(reader, answers))
    child.start()
    assert answers.get() == b"in the child"
    child.join()
    assert reader.read(0) == b"a"
