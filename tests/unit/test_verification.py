import io
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from face_distill.distill.pairs import Pairs, read_pairs
from face_distill.distill.verification import (
    accuracy_of,
    decode,
    flip_embeddings,
    fold_numbers,
    squared_distances,
    ten_fold_accuracy,
    verify,
)
from shared.errors import UserError


def encoded(seed: int, size: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [encoded(seed) for seed in range(6)]
SAME = [True, False, True]


def write(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


# ---------------------------------------------------------------- pair files


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("as_arrays", [False, True])
def test_pairs_are_read_from_every_pickle_protocol_as_bytes_or_arrays(
    tmp_path: Path, protocol: int, as_arrays: bool
) -> None:
    images = [np.frombuffer(i, np.uint8).copy() for i in IMAGES] if as_arrays else IMAGES
    pairs = read_pairs(write(tmp_path / "lfw.bin", (images, SAME), protocol))
    assert pairs.images == IMAGES
    assert pairs.same.tolist() == SAME


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_flags_may_be_an_array_numpy_bools_or_numbers(tmp_path: Path, protocol: int) -> None:
    for flags in (np.array(SAME), [np.bool_(flag) for flag in SAME], [1, 0, 1]):
        pairs = read_pairs(write(tmp_path / "lfw.bin", [IMAGES, flags], protocol))
        assert pairs.same.tolist() == SAME
        assert pairs.same.dtype == np.bool_


def test_pairs_of_python_2_are_read(tmp_path: Path) -> None:
    # Python 2's str is opcode SHORT_BINSTRING or BINSTRING, which Python 3 never writes.
    body = b"".join(b"T" + len(i).to_bytes(4, "little") + i for i in IMAGES)
    flags = b"".join(b"\x88" if flag else b"\x89" for flag in SAME)
    (tmp_path / "lfw.bin").write_bytes(b"\x80\x02(" + body + b"l(" + flags + b"l\x86.")
    pairs = read_pairs(tmp_path / "lfw.bin")
    assert pairs.images == IMAGES
    assert pairs.same.tolist() == SAME


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, protocol: int
) -> None:
    proof = tmp_path / "ran"
    for call in (Call(Path.touch, proof), Call(eval, "1"), Call(getattr, "", "join")):
        content = (IMAGES, [call, *SAME])
        with pytest.raises(UserError, match=r"evil\.bin is refused: it asks for .*run code"):
            read_pairs(write(tmp_path / "evil.bin", content, protocol))
    assert not proof.exists()


@pytest.mark.parametrize(
    "array", [np.array([1.5]), np.array([{}], dtype=object), np.zeros(2, "V4"), np.array(["a"])]
)
def test_arrays_of_anything_but_bytes_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(UserError, match="refused: it asks for an array of"):
        read_pairs(write(tmp_path / "x.bin", ([array] * 6, SAME)))


def test_a_memo_number_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    whole = pickle.dumps(([b"abc", b"def"], [True]), protocol=2)
    number = (300_000_000).to_bytes(4, "little")  # 16 bytes of memory for each
    (tmp_path / "x.bin").write_bytes(whole[:-1] + b"r" + number + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="cut off or no verification set"):
        read_pairs(tmp_path / "x.bin")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


@pytest.mark.parametrize(
    "content",
    [IMAGES, (IMAGES, SAME[:2]), ([], []), (IMAGES, ["yes"] * 3), ([1] * 6, SAME), (7, 8)],
)
def test_content_of_another_form_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(UserError, match=r"x\.bin"):
        read_pairs(write(tmp_path / "x.bin", content))


def test_a_missing_pair_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lfw\.bin is missing"):
        read_pairs(tmp_path / "lfw.bin")


# ---------------------------------------------------------------- embeddings


def test_decoded_images_are_the_pixels_that_were_written() -> None:
    expected = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in IMAGES])
    assert np.array_equal(decode(IMAGES).permute(0, 2, 3, 1).numpy(), expected)


def test_broken_and_mixed_images_are_refused() -> None:
    with pytest.raises(UserError, match="image 1 of the pairs cannot be decoded"):
        decode([IMAGES[0], b"not an image", IMAGES[1]])
    with pytest.raises(UserError, match="must have one size"):
        decode([IMAGES[0], encoded(0, size=8)])


def test_a_broken_image_is_named_by_its_number_in_the_whole_set() -> None:
    with pytest.raises(UserError, match="image 5 of the pairs cannot be decoded"):
        flip_embeddings(corner, [*IMAGES[:5], b"not an image"], batch_size=2)


def test_an_image_that_claims_gigabytes_is_refused_before_it_is_unpacked() -> None:
    stream = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(stream, "PNG")
    assert len(stream.getvalue()) < 20_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"image 3 .* \(9000, 9000\) pixels; at most 1024 a side"):
        decode([stream.getvalue()], first=3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    side = Image.new("L", (1024, 1024))
    stream = io.BytesIO()
    side.save(stream, "PNG")
    assert decode([stream.getvalue()]).shape == (1, 3, 1024, 1024)


def corner(images: Tensor) -> Tensor:
    """An embedding that is not blind to mirroring: the left upper 1 x 2 pixels of each image."""
    return images[:, :, 0, :2].flatten(1).double()


def test_an_embedding_is_the_unit_sum_of_image_and_mirror_image() -> None:
    images = decode(IMAGES).double()
    expected = images[:, :, 0, :2] + images[:, :, 0, [-1, -2]]
    expected = expected.flatten(1)
    expected = expected / expected.norm(dim=1, keepdim=True)
    for batch_size in (1, 4, 100):
        found = flip_embeddings(corner, IMAGES, batch_size)
        torch.testing.assert_close(found, expected.float())


def test_verify_pairs_neighbouring_images() -> None:
    images = [encoded(number // 2) for number in range(40)]
    images[1::4] = [encoded(100 + number) for number in range(10)]
    same = np.array([number % 2 == 1 for number in range(20)])
    assert verify(corner, Pairs(images, same)).mean == 1.0


# ---------------------------------------------------------------- accuracy


def brute_force(a: np.ndarray, b: np.ndarray, same: np.ndarray, folds: int) -> list[float]:
    """The protocol word by word: every threshold on every fold, no histogram."""
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    distances = ((a - b) ** 2).sum(1)
    size, extra = divmod(len(same), folds)
    start, accuracies = 0, []
    for fold in range(folds):
        stop = start + size + (fold < extra)
        test = np.zeros(len(same), bool)
        test[start:stop] = True
        best, best_accuracy = 0.0, -1.0
        for threshold in np.arange(0, 4, 0.01):
            accuracy = ((distances < threshold) == same)[~test].mean()
            if accuracy > best_accuracy:
                best, best_accuracy = threshold, accuracy
        accuracies.append(((distances < best) == same)[test].mean())
        start = stop
    return accuracies


def random_pairs(count: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.random.default_rng(seed)
    same = values.random(count) < 0.5
    a = values.normal(size=(count, 8))
    b = np.where(same[:, None], a, values.normal(size=a.shape)) + noise * values.normal(
        size=a.shape
    )
    return a, b, same


@pytest.mark.parametrize(("count", "folds"), [(200, 10), (117, 10), (31, 3), (10, 10)])
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_accuracy_equals_the_brute_force(count: int, folds: int, noise: float) -> None:
    a, b, same = random_pairs(count, noise, seed=count)
    found = ten_fold_accuracy(a, b, same, folds)
    expected = brute_force(a, b, same, folds)
    assert found.folds == expected
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-15)
    assert found.std == pytest.approx(np.std(expected), abs=1e-15)


def test_a_distance_equal_to_a_threshold_is_not_below_it() -> None:
    # Every distance is exactly 2.0, a threshold: same pairs count as right from 2.01 on.
    a, b = np.tile([1.0, 0.0], (20, 1)), np.tile([0.0, 1.0], (20, 1))
    found = ten_fold_accuracy(a, b, np.ones(20, bool))
    assert found.mean == 1.0
    assert found.thresholds == [pytest.approx(2.01)] * 10


def test_the_threshold_for_other_faces_is_the_lowest_that_is_best_on_all_pairs() -> None:
    same = np.arange(20) % 2 == 0
    distances = np.where(same, 0.5, 1.5)  # one person below 0.51 … 1.50, which all judge rightly
    found = accuracy_of(distances, same)
    assert (found.mean, found.threshold) == (1.0, pytest.approx(0.51))
    a, b, same = random_pairs(200, 1.0, seed=4)
    rights = [((squared_distances(a, b) < t) == same).mean() for t in np.arange(0, 4, 0.01)]
    assert ten_fold_accuracy(a, b, same).threshold == pytest.approx(np.argmax(rights) / 100)


def test_fold_numbers_split_as_evenly_as_possible() -> None:
    assert fold_numbers(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    with pytest.raises(UserError, match="2 pairs cannot be split into 3 folds"):
        fold_numbers(2, 3)


def test_folds_are_contiguous_and_a_fold_does_not_choose_its_own_threshold() -> None:
    # Nine folds of equal pairs; the last fold alone holds different pairs at distance 0.
    a = np.tile([1.0, 0.0], (20, 1))
    same = np.array([True] * 18 + [False] * 2)
    assert ten_fold_accuracy(a, a, same).folds == [1.0] * 9 + [0.0]


def test_accuracy_does_not_depend_on_the_length_of_the_embeddings() -> None:
    a, b, same = random_pairs(100, 0.5, seed=2)
    assert ten_fold_accuracy(7 * a, b / 9, same) == ten_fold_accuracy(a, b, same)


def test_accuracy_refuses_what_has_no_meaning() -> None:
    a, b, same = random_pairs(20, 0.5, seed=3)
    with pytest.raises(UserError, match="9 pairs cannot be split into 10 folds"):
        ten_fold_accuracy(a[:9], b[:9], same[:9])
    with pytest.raises(ValueError, match="20 pairs of embeddings, but 19 flags"):
        ten_fold_accuracy(a, b, same[:19])
    with pytest.raises(ValueError, match=r"two \(N, D\) arrays"):
        ten_fold_accuracy(a, b[:, :4], same)
    a[3, 3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        ten_fold_accuracy(a, b, same)
