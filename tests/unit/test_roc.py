from fractions import Fraction

import numpy as np
import pytest

from face_distill.distill.verification import FAR_TARGETS, auc, roc, tar_at_far, ten_fold_tar_at_far
from shared.errors import UserError


def random_distances(count: int, seed: int, decimals: int | None = None):
    """Distances and flags; fewer decimals, more ties."""
    values = np.random.default_rng(seed)
    same = values.random(count) < 0.4
    distances = values.gamma(4, 0.25, count) + np.where(same, 0, 0.6)
    return (distances if decimals is None else distances.round(decimals)), same


CASES = [(2000, 0, None), (2000, 1, 1), (300, 2, 2), (40, 3, 0), (2000, 4, 0)]


@pytest.mark.parametrize(("count", "seed", "decimals"), CASES)
def test_the_curve_counts_what_each_distance_accepts_and_its_area_is_below_it(
    count, seed, decimals
):
    distances, same = random_distances(count, seed, decimals)
    accepted = np.array([distances <= threshold for threshold in np.unique(distances)])
    found = roc(distances, same)
    np.testing.assert_allclose(found.far, [0, *accepted[:, ~same].mean(1)], atol=1e-15)
    np.testing.assert_allclose(found.tar, [0, *accepted[:, same].mean(1)], atol=1e-15)
    area = np.trapezoid(found.tar, found.far)
    assert auc(distances, same) == pytest.approx(area, abs=1e-12)


def test_the_area_is_the_share_of_comparisons_won_with_ties_half():
    distances, same = random_distances(60, 5, 1)
    won = [
        1.0 if one < two else 0.5 if one == two else 0.0
        for one in distances[same]
        for two in distances[~same]
    ]
    assert auc(distances, same) == pytest.approx(np.mean(won), abs=1e-14)
    assert auc(np.zeros(4), np.array([True, False, True, False])) == 0.5


def brute_force(distances, same, target):
    """(TAR, FAR, threshold) with the largest of all distances as threshold that FAR allows."""
    best = None
    for threshold in sorted(set(distances[~same])):
        accepted = int((distances[~same] < threshold).sum())
        if Fraction(accepted, int((~same).sum())) <= target:
            best = threshold
    return (distances[same] < best).mean(), (distances[~same] < best).mean(), best


@pytest.mark.parametrize(("count", "seed", "decimals"), CASES)
def test_tar_at_far_equals_the_brute_force(count, seed, decimals):
    distances, same = random_distances(count, seed, decimals)
    targets = (0.29, 0.1, 0.01)
    for target, point in zip(targets, tar_at_far(distances, same, targets), strict=True):
        exact = Fraction(str(target))
        if exact * int((~same).sum()) < 1:
            assert point.tar is None
            continue
        expected = brute_force(distances, same, exact)
        assert (point.tar, point.far, point.threshold) == pytest.approx(expected, abs=1e-15)
        assert point.far is not None and point.far <= target


def test_a_far_below_one_pair_is_no_number_and_says_why():
    # As LFW: 3000 pairs of each kind; FAR 1e-3 is 3 pairs, 1e-4 is none.
    distances = np.concatenate((np.linspace(0, 2, 3000), np.linspace(1, 3, 3000)))
    same = np.arange(6000) < 3000
    points = tar_at_far(distances, same)
    assert [point.target for point in points] == list(FAR_TARGETS) == [0.1, 0.01, 0.001, 0.0001]
    assert [round((point.far or 0) * 3000) for point in points] == [300, 30, 3, 0]
    last = points[-1]
    assert (last.tar, last.far, last.threshold) == (None, None, None)
    assert last.reason == "FAR 0.0001 is less than one of the 3000 pairs of two people"
    assert all(point.reason == "" and point.tar is not None for point in points[:-1])


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


# ---------------------------------------------------------------- ten folds


def folded_brute_force(distances, same, target, folds):
    size, extra = divmod(len(same), folds)
    start, tars, fars = 0, [], []
    for fold in range(folds):
        stop = start + size + (fold < extra)
        test = np.zeros(len(same), bool)
        test[start:stop] = True
        threshold = brute_force(distances[~test], same[~test], target)[2]
        tars.append((distances[test & same] < threshold).mean())
        fars.append((distances[test & ~same] < threshold).mean())
        start = stop
    return np.mean(tars), np.std(tars), np.mean(fars)


@pytest.mark.parametrize(("count", "decimals"), [(1000, None), (997, 2), (505, 1)])
def test_ten_folds_equal_the_brute_force(count, decimals):
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
    assert (
        point.reason == "FAR 0.001 is less than one of the 900 pairs of two people outside a fold"
    )


@pytest.mark.filterwarnings("error")
def test_a_fold_without_a_kind_of_pair_is_left_out_of_that_kinds_mean():
    same = np.arange(20) % 2 == 0
    same[:4] = True  # the first two folds hold no pair of two people
    distances = np.where(same, 0.1, 1.0)
    (point,) = ten_fold_tar_at_far(distances, same, [0.2])
    assert (point.tar, point.tar_std, point.far) == (1.0, 0.0, 0.0)


def test_one_kind_of_pair_alone_is_refused():
    for measure in (roc, auc, tar_at_far, ten_fold_tar_at_far):
        for flag, counts in ((True, "20 pairs of one person and 0 of two"), (False, "0 pairs of")):
            with pytest.raises(UserError, match=counts):
                measure(np.arange(20.0), np.full(20, flag))
    with pytest.raises(UserError, match="4 pairs cannot be split into 10 folds"):
        ten_fold_tar_at_far(np.arange(4.0), np.arange(4) < 2)
    with pytest.raises(ValueError, match=r"\(3,\) distances, but \(4,\) flags"):
        auc(np.arange(3.0), np.arange(4) < 2)
