"""Selections, labels, decoding and the cache, on small record files and folders."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from face_distill.demo_data.records import pack, write_records
from face_distill.distill import images as face_sources
from face_distill.distill.recordio import RecordReader
from face_distill.FaceDataset import FaceDataset, split
from shared.errors import UserError

COUNTS = (3, 5, 1, 4)  # images of each identity


def picture(number, mode="RGB", size=(112, 112), form="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, form)
    return stream.getvalue()


def faces_emore(root, counts=COUNTS, header=True, labels=None, contents=None, header_labels=None):
    root.mkdir(exist_ok=True)
    people = np.repeat(np.arange(len(counts)), counts) if labels is None else labels
    contents = contents or [picture(k) for k in range(len(people))]
    numbered = enumerate(zip(people, contents, strict=True), 1)
    items = [(k, pack(float(p), c, k)) for k, (p, c) in numbered]
    if header:
        ends = 1 + np.cumsum([0, *counts])
        count = header_labels or (ends[-1], ends[-1] + len(counts))
        items += [
            (int(ends[-1]) + i, pack(np.array(ends[i : i + 2], np.float32), b""))
            for i in range(len(counts))
        ]
        items.append((0, pack(np.array(count, np.float32), b"")))  # last, as packing scripts do
    write_records(root / "train.rec", root / "train.idx", items)
    return root


def folder(root, counts=COUNTS):
    for person, count in enumerate(counts):
        (root / f"id{person}").mkdir(parents=True)
        for k in range(count):
            (root / f"id{person}" / f"{k}.png").write_bytes(picture(10 * person + k))
    return root


@pytest.mark.parametrize(
    ("selection", "keys", "labels"),
    [
        ({}, range(1, 14), [0] * 3 + [1] * 5 + [2] + [3] * 4),  # out of the identity records
        ({"limit": 2}, [1, 2], [0, 0]),  # out of the images' own labels
        ({"limit": 9}, range(1, 10), [0] * 3 + [1] * 5 + [2]),
        ({"selection": "per_id", "per_id": 3}, [1, 2, 3, 4, 5, 6, 10, 11, 12], [0, 1, 2]),
        ({"selection": "per_id", "per_id": 3, "limit": 6}, range(1, 7), [0, 1]),
    ],
)
def test_a_selection_takes_its_images_in_order_and_counts_their_people(
    tmp_path, selection, keys, labels
):
    faces = FaceDataset(faces_emore(tmp_path), **selection)
    each = len(faces) // len(labels)
    assert faces.keys.tolist() == list(keys)
    assert faces.labels.tolist() == np.repeat(labels, each).tolist()
    assert faces.num_classes == labels[-1] + 1
    assert faces.labels.dtype == faces.keys.dtype == np.int64


def test_records_without_a_header_are_all_images(tmp_path):
    people = [9, 4, 9, 4, 9, 7]
    root = faces_emore(tmp_path, header=False, labels=people)
    faces = FaceDataset(root)
    assert faces.keys.tolist() == [1, 2, 3, 4, 5, 6] and faces.labels.tolist() == [0, 1, 0, 1, 0, 2]
    pairs = FaceDataset(root, "per_id", per_id=2)
    assert pairs.keys.tolist() == [1, 3, 2, 4] and pairs.labels.tolist() == [0, 0, 1, 1]


def test_a_header_too_large_for_float32_gives_way_to_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(face_sources, "FLOAT32_EXACT", 8)  # keys from 8 on count as inexact
    root = faces_emore(tmp_path, header_labels=(12, 20))  # rounded: 14 and 18 in truth
    faces = FaceDataset(root)
    assert faces.keys.tolist() == list(range(1, 14))
    assert faces.labels.tolist() == np.repeat(np.arange(4), COUNTS).tolist()
    chosen = FaceDataset(root, "per_id", per_id=3)
    assert chosen.keys.tolist() == [1, 2, 3, 4, 5, 6, 10, 11, 12]


def test_a_header_that_contradicts_the_index_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"key 0 .*promises 20 images and 4 .*train\.idx has 17"):
        FaceDataset(faces_emore(tmp_path, header_labels=(21, 25)))


def test_images_are_those_of_the_records_in_every_way_of_reading(tmp_path):
    root = faces_emore(tmp_path)
    record = RecordReader(root / "train.rec", root / "train.idx").labelled(5)
    truth = torch.from_numpy(np.array(Image.open(io.BytesIO(record.content)))).permute(2, 0, 1)
    for cache in (True, False):
        faces = FaceDataset(root, cache=cache)
        assert faces.is_cached == cache
        image, label, index = faces[4]
        assert torch.equal(image, truth) and (label, index) == (1, 4)
        image.zero_()
        batch = faces.__getitems__([12, 4])
        assert torch.equal(batch[1][0], truth) and [item[1:] for item in batch] == [(3, 12), (1, 4)]
        assert faces[-1][2] == 12
        with pytest.raises(IndexError):
            faces[13]


@pytest.mark.parametrize(
    ("method", "cache"), [("fork", False), pytest.param("spawn", True, marks=pytest.mark.slow)]
)
def test_loader_workers_give_the_same_batches(tmp_path, method, cache):
    faces = FaceDataset(faces_emore(tmp_path, counts=(2, 2)), cache=cache)
    here = next(iter(DataLoader(faces, batch_size=4)))
    loader = DataLoader(faces, batch_size=4, num_workers=1, multiprocessing_context=method)
    there = next(iter(loader))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert here[0].shape == (4, 3, 112, 112) and here[2].tolist() == [0, 1, 2, 3]


def test_odd_pictures_become_rgb_of_112_pixels(tmp_path):
    contents = [picture(0, "L", form="JPEG"), picture(1, "RGB", (200, 60), "JPEG")]
    faces = FaceDataset(faces_emore(tmp_path, header=False, labels=[0, 0], contents=contents))
    grey, wide = faces.images([0, 1])
    assert grey.shape == wide.shape == (3, 112, 112) and grey.dtype == torch.uint8
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    small = Image.open(io.BytesIO(contents[1])).resize((112, 112), Image.Resampling.BICUBIC)
    truth = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    assert (wide.int() - truth.int()).abs().max() <= 1


CUT = picture(0, form="JPEG")[:900]


@pytest.mark.parametrize(("content", "cache"), [(CUT, True), (CUT, False), (b"", True)])
def test_a_damaged_image_is_named_and_left_out_and_keeps_its_row(tmp_path, caplog, content, cache):
    contents = [picture(0), picture(1), content, *map(picture, range(3, 30))]
    root = faces_emore(tmp_path, header=False, labels=[0] * 30, contents=contents)
    faces = FaceDataset(root, cache=cache)
    train, held_out = split(faces, 0.2, seed=0)
    assert (len(train), len(held_out)) == (23, 6)
    rows = sorted(row for _, _, row in [*train, *held_out])
    assert rows == [0, 1, *range(3, 30)]
    third = np.array(Image.open(io.BytesIO(contents[3]))).transpose(2, 0, 1)
    assert np.array_equal(faces[3][0], third) and not faces[2][0].any()
    assert list(faces.damaged) == [2]
    assert caplog.text.count("train.rec key 3 at byte") == 1


def test_a_record_whose_bytes_are_damaged_is_left_out_too(tmp_path):
    root = faces_emore(tmp_path, header=False, labels=[0] * 20 + [1] * 10)
    content = bytearray((root / "train.rec").read_bytes())
    offset = RecordReader(root / "train.rec", root / "train.idx").offset_of(5)
    content[offset : offset + 4] = bytes(4)  # no magic number
    (root / "train.rec").write_bytes(content)
    faces = FaceDataset(root)
    assert list(faces.damaged) == [4] and "magic number" in faces.damaged[4]
    assert faces.labels.tolist() == [0] * 20 + [1] * 10


def test_more_than_a_twentieth_of_damaged_images_stop_the_run(tmp_path):
    contents = [picture(1), *[picture(2)] * 17, b"broken", b"broken"]
    root = faces_emore(tmp_path, header=False, labels=[0] * 20, contents=contents)
    with pytest.raises(UserError, match=r"2 of 20 pictures .* 5% .* the first is .*key 19 at byte"):
        FaceDataset(root)
    faces = FaceDataset(root, cache=False)  # one image of a script's own
    with pytest.raises(UserError, match=r"key 20 .*the image is corrupt"):
        faces[19]


@pytest.mark.parametrize("label", [float("nan"), 1.5, -1.0])
def test_a_label_that_is_no_identity_is_refused(tmp_path, label):
    with pytest.raises(UserError, match=r"key 2 .*label is"):
        FaceDataset(faces_emore(tmp_path, header=False, labels=[0, label]))


def test_a_folder_of_folders_is_read_in_the_order_of_names(tmp_path):
    faces = FaceDataset(folder(tmp_path), cache=False)
    assert faces.labels.tolist() == np.repeat(np.arange(4), COUNTS).tolist()
    truth = Image.open(tmp_path / "id1" / "2.png")
    assert torch.equal(faces[5][0], torch.from_numpy(np.array(truth)).permute(2, 0, 1))
    chosen = FaceDataset(tmp_path, "per_id", per_id=4, cache=False)
    assert chosen.keys.tolist() == [3, 4, 5, 6, 9, 10, 11, 12] and chosen.num_classes == 2
    (tmp_path / "id1" / "2.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"id1/2\.png \(key 5\): the image is corrupt"):
        faces[5]
    for name in ("id2/summer/0.png", "id2/._0.png"):  # deeper ones count, hidden ones do not
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(91))
    assert np.bincount(FaceDataset(tmp_path, cache=False).labels).tolist() == [3, 5, 2, 4]


def test_the_selection_hash_tells_selections_apart(tmp_path):
    root = faces_emore(tmp_path / "rec")
    hashes = [
        FaceDataset(root, cache=False).selection_sha256(),
        FaceDataset(root, limit=9, cache=False).selection_sha256(),
        FaceDataset(root, "per_id", per_id=3, cache=False).selection_sha256(),
        FaceDataset(folder(tmp_path / "folder"), cache=False).selection_sha256(),
    ]
    assert len(set(hashes)) == 4
    assert hashes[0] == FaceDataset(root).selection_sha256() and len(hashes[0]) == 64


def test_a_cache_that_does_not_fit_is_left_off_with_a_message(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("face_distill.FaceDataset._free_memory", lambda: 2 * 13 * 37632 - 1)
    faces = FaceDataset(faces_emore(tmp_path))
    assert not faces.is_cached and faces[0][0].shape == (3, 112, 112)
    assert "decode-once cache needs" in caplog.text
    monkeypatch.setattr("face_distill.FaceDataset._free_memory", lambda: 2 * 13 * 37632)
    assert FaceDataset(tmp_path).is_cached


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selection": "first"}, "'first'.*did you mean first_n"),
        ({"limit": 0}, "limit 0"),
        ({"selection": "per_id", "per_id": 0}, "per_id 0"),
        ({"selection": "per_id", "per_id": 3, "limit": 7}, "limit 7 .*use 6 or 9"),
        ({"selection": "per_id", "per_id": 3, "limit": 12}, "has 3 identities .* 4 were asked"),
    ],
)
def test_bad_selections_say_what_is_allowed(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        FaceDataset(faces_emore(tmp_path), **arguments)


def test_a_held_out_share_too_small_for_pairs_on_each_process_is_refused(tmp_path):
    faces = FaceDataset(faces_emore(tmp_path, counts=(10, 10)))
    with pytest.raises(
        UserError, match=r"holds out 2 of 20 images, 4 are .* use 0.2 or more, or 0"
    ):
        split(faces, 0.1, seed=0, smallest=4)
    assert [len(part) for part in split(faces, 0.2, seed=0, smallest=4)] == [16, 4]


def test_a_missing_or_empty_root_says_what_belongs_there(tmp_path):
    with pytest.raises(UserError, match="nowhere is missing: expected faces_emore"):
        FaceDataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds neither"):
        FaceDataset(tmp_path)
