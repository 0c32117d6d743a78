import io
import pickle
import resource
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from face_distill.distill.pairs import Pairs, read_pairs
from face_distill.distill.verification import (
    FAR_TARGETS,
    accuracy_of,
    decode,
    flip_embeddings,
    squared_distances,
    tar_at_far,
    ten_fold_tar_at_far,
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


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pairs_are_read_from_every_pickle_protocol_as_bytes_or_arrays(tmp_path, protocol):
    arrays = [np.frombuffer(image, np.uint8).copy() for image in IMAGES]
    for images in (IMAGES, arrays):
        for flags in (SAME, np.array(SAME), [np.bool_(flag) for flag in SAME], [1, 0, 1]):
            pairs = read_pairs(write(tmp_path / "lfw.bin", (images, flags), protocol))
            assert pairs.images == IMAGES
            assert pairs.same.tolist() == SAME


def test_pairs_of_python_2_are_read(tmp_path):
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
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, protocol):
    proof = tmp_path / "ran"
    for call in (Call(Path.touch, proof), Call(eval, "1"), Call(getattr, "", "join")):
        content = (IMAGES, [call, *SAME])
        with pytest.raises(UserError, match=r"evil\.bin is refused: it asks for .*run code"):
            read_pairs(write(tmp_path / "evil.bin", content, protocol))
    assert not proof.exists()


@pytest.mark.parametrize("array", [np.array([1.5]), np.array([{}], dtype=object)])
def test_arrays_of_anything_but_bytes_are_refused(tmp_path, array):
    with pytest.raises(UserError, match="refused: it asks for an array of"):
        read_pairs(write(tmp_path / "x.bin", ([array] * 6, SAME)))


def test_a_memo_number_that_asks_for_gigabytes_is_refused(tmp_path):
    whole = pickle.dumps(([b"abc", b"def"], [True]), protocol=2)
    number = (300_000_000).to_bytes(4, "little")  # 16 bytes of memory for each
    (tmp_path / "x.bin").write_bytes(whole[:-1] + b"r" + number + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="cut off or no verification set"):
        read_pairs(tmp_path / "x.bin")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


@pytest.mark.parametrize(
    "content",
    [(IMAGES, SAME[:2]), ([], []), (IMAGES, ["yes"] * 3), ([1] * 6, SAME), (7, 8)],
)
def test_content_of_another_form_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"x\.bin"):
        read_pairs(write(tmp_path / "x.bin", content))


# ---------------------------------------------------------------- embeddings


def test_broken_and_enormous_images_are_refused_by_their_number_in_the_whole_set():
    with pytest.raises(UserError, match="image 5 of the pairs cannot be decoded"):
        flip_embeddings(corner, [*IMAGES[:5], b"not an image"], batch_size=2)
    with pytest.raises(UserError, match="must have one size"):
        decode([IMAGES[0], encoded(0, size=8)])
    assert decode([encoded(0, size=1024)]).shape == (1, 3, 1024, 1024)
    with pytest.raises(UserError, match=r"image 3 .* \(1025, 1025\) pixels; at most 1024 a side"):
        decode([encoded(0, size=1025)], first=3)


def corner(images: Tensor) -> Tensor:
    """An embedding that is not blind to mirroring: the left upper 1 x 2 pixels of each image."""
    return images[:, :, 0, :2].flatten(1).double()


def test_an_embedding_is_the_unit_sum_of_image_and_mirror_image():
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in IMAGES])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
    expected = (images[:, :, 0, :2] + images[:, :, 0, [-1, -2]]).flatten(1)
    expected = expected / expected.norm(dim=1, keepdim=True)
    for batch_size in (1, 4, 100):
        torch.testing.assert_close(flip_embeddings(corner, IMAGES, batch_size), expected.float())


def test_verify_pairs_neighbouring_images():
    images = [encoded(number // 2) for number in range(40)]
    images[1::4] = [encoded(100 + number) for number in range(10)]
    same = np.array([number % 2 == 1 for number in range(20)])
    assert verify(corner, Pairs(images, same)).mean == 1.0


# ---------------------------------------------------------------- accuracy


def folds_by_hand(count: int, folds: int) -> Iterator[np.ndarray]:
    """Which of so many pairs each fold tries."""
    size, extra = divmod(count, folds)
    start = 0
    for fold in range(folds):
        stop = start + size + (fold < extra)
        yield (np.arange(count) >= start) & (np.arange(count) < stop)
        start = stop


def brute_force(a: np.ndarray, b: np.ndarray, same: np.ndarray, folds: int) -> list[float]:
    """The protocol word by word: every threshold on every fold, no histogram."""
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    distances = ((a - b) ** 2).sum(1)
    accuracies = []
    for test in folds_by_hand(len(same), folds):
        best, best_accuracy = 0.0, -1.0
        for threshold in np.arange(0, 4, 0.01):
            accuracy = ((distances < threshold) == same)[~test].mean()
            if accuracy > best_accuracy:
                best, best_accuracy = threshold, accuracy
        accuracies.append(((distances < best) == same)[test].mean())
    return accuracies


def random_pairs(count: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.random.default_rng(seed)
    same = values.random(count) < 0.5
    a = values.normal(size=(count, 8))
    b = np.where(same[:, None], a, values.normal(size=a.shape)) + noise * values.normal(
        size=a.shape
    )
    return a, b, same


@pytest.mark.parametrize(
    ("count", "folds", "noise"), [(200, 10, 0.3), (117, 10, 2.0), (31, 3, 2.0), (10, 10, 0.3)]
)
def test_accuracy_equals_the_brute_force(count, folds, noise):
    a, b, same = random_pairs(count, noise, seed=count)
    found = accuracy_of(squared_distances(a, b), same, folds)
    expected = brute_force(a, b, same, folds)
    assert found.folds == expected
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-15)
    assert found.std == pytest.approx(np.std(expected), abs=1e-15)


def test_a_distance_equal_to_a_threshold_is_not_below_it():
    # Every distance is exactly 2.0, a threshold: same pairs count as right from 2.01 on.
    a, b = np.tile([1.0, 0.0], (20, 1)), np.tile([0.0, 1.0], (20, 1))
    found = accuracy_of(squared_distances(a, b), np.ones(20, bool))
    assert found.mean == 1.0
    assert found.thresholds == [pytest.approx(2.01)] * 10


def test_the_threshold_for_other_faces_is_the_lowest_that_is_best_on_all_pairs():
    same = np.arange(20) % 2 == 0
    distances = np.where(same, 0.5, 1.5)  # one person below 0.51 … 1.50, which all judge rightly
    found = accuracy_of(distances, same)
    assert (found.mean, found.threshold) == (1.0, pytest.approx(0.51))
    a, b, same = random_pairs(200, 1.0, seed=4)
    rights = [((squared_distances(a, b) < t) == same).mean() for t in np.arange(0, 4, 0.01)]
    assert accuracy_of(squared_distances(a, b), same).threshold == pytest.approx(
        np.argmax(rights) / 100
    )


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        squared_distances(np.ones((2, 3)), np.array([[1.0, 0.0, np.nan], [1.0, 0.0, 0.0]]))


# ---------------------------------------------------------------- true accepts at few false ones


def random_distances(count: int, seed: int, decimals: int | None = None):
    """Distances and flags; fewer decimals, more ties."""
    values = np.random.default_rng(seed)
    same = values.random(count) < 0.4
    distances = values.gamma(4, 0.25, count) + np.where(same, 0, 0.6)
    return (distances if decimals is None else distances.round(decimals)), same


CASES = [(2000, 0, None), (300, 2, 2), (40, 3, 0)]


def far_brute_force(distances, same, target):
    """(TAR, FAR, threshold) with the largest of all distances as threshold that FAR allows."""
    best = None
    for threshold in sorted(set(distances[~same])):
        accepted = int((distances[~same] < threshold).sum())
        if Fraction(accepted, int((~same).sum())) <= target:
            best = threshold
    return (distances[same] < best).mean(), (distances[~same] < best).mean(), best


@pytest.mark.parametrize(("count", "seed", "decimals"), CASES)
def test_tar_at_far_equals_the_far_brute_force(count, seed, decimals):
    distances, same = random_distances(count, seed, decimals)
    targets = (0.29, 0.1, 0.01)
    for target, point in zip(targets, tar_at_far(distances, same, targets), strict=True):
        exact = Fraction(str(target))
        if exact * int((~same).sum()) < 1:
            assert point.tar is None
            continue
        expected = far_brute_force(distances, same, exact)
        assert (point.tar, point.far, point.threshold) == pytest.approx(expected, abs=1e-15)
        assert point.far is not None and point.far <= target


def test_a_far_below_one_pair_is_no_number_and_says_why():
    # As LFW: 3000 pairs of each kind; FAR 1e-3 is 3 pairs, 1e-4 is none.
    distances = np.concatenate((np.linspace(0, 2, 3000), np.linspace(1, 3, 3000)))
    same = np.arange(6000) < 3000
    points = tar_at_far(distances, same)
    assert [point.target for point in points] == list(FAR_TARGETS) == [0.1, 0.01, 0.001, 0.0001]
    assert [round((point.far or 0) * 3000) for point in points] == [300, 30, 3, 0]
    assert points[-1].reason == "FAR 0.0001 is less than one of the 3000 pairs of two people"
    assert [point.tar is None for point in points] == [False, False, False, True]


def test_exactly_the_allowed_pairs_are_accepted_where_floating_point_falls_short():
    assert 0.29 * 100 < 29  # the trap
    distances = np.concatenate((np.arange(100.0), [50.0]))
    same = np.arange(101) == 100
    (point,) = tar_at_far(distances, same, [0.29])
    assert (point.far, point.threshold) == (0.29, 29.0)


def test_ties_at_the_threshold_are_rejected_together():
    distances, same = np.array([0.5, 1.0, 1.0, 1.0, 1.0]), np.array([True, *[False] * 4])
    (point,) = tar_at_far(distances, same, [0.5])
    assert (point.tar, point.far, point.threshold) == (1.0, 0.0, 1.0)


def folded_brute_force(distances, same, target, folds):
    tars, fars = [], []
    for test in folds_by_hand(len(same), folds):
        threshold = far_brute_force(distances[~test], same[~test], target)[2]
        tars.append((distances[test & same] < threshold).mean())
        fars.append((distances[test & ~same] < threshold).mean())
    return np.mean(tars), np.std(tars), np.mean(fars)


@pytest.mark.parametrize(("count", "decimals"), [(1000, None), (505, 1)])
def test_ten_folds_equal_the_far_brute_force(count, decimals):
    distances, same = random_distances(count, count, decimals)
    for target in (0.1, 0.01):
        (point,) = ten_fold_tar_at_far(distances, same, [target])
        expected = folded_brute_force(distances, same, Fraction(str(target)), 10)
        assert (point.tar, point.tar_std, point.far) == pytest.approx(expected, abs=1e-14)


def test_folds_resolve_what_the_other_folds_hold():
    # 1000 pairs of two people resolve 1e-3, the 900 outside a fold do not.
    same = np.tile([True, False], 1000)
    distances = np.random.default_rng(0).random(2000)
    assert tar_at_far(distances, same, [1e-3])[0].tar is not None
    (point,) = ten_fold_tar_at_far(distances, same, [1e-3])
    assert (point.tar, point.tar_std, point.far) == (None, None, None)
    assert "less than one of the 900 pairs of two people outside a fold" in point.reason


@pytest.mark.filterwarnings("error")
def test_a_fold_without_a_kind_of_pair_is_left_out_of_that_kinds_mean():
    same = np.arange(20) % 2 == 0
    same[:4] = True  # the first two folds hold no pair of two people
    distances = np.where(same, 0.1, 1.0)
    (point,) = ten_fold_tar_at_far(distances, same, [0.2])
    assert (point.tar, point.tar_std, point.far) == (1.0, 0.0, 0.0)
