"""Epochs of the stages, order of the sources, learning rates."""

import math
from collections import Counter

import pytest

from multimodal.training.schedule import (
    Span,
    apportion,
    learning_rate,
    order_of,
    spans,
    steps_of_sources,
)

SHARES, ALL = (30, 40, 30), (True, True, True)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(100, [30, 40, 30]), (50, [15, 20, 15]), (10, [3, 4, 3]), (3, [1, 1, 1]), (7, [2, 3, 2])],
)
def test_epochs_are_divided_30_40_30(epochs, expected):
    found = spans(epochs, SHARES, ALL)
    assert [span.end - span.first for span in found] == expected
    assert [span.stage for span in found] == [0, 1, 2]


def test_numbering_goes_on_through_the_stages():
    assert spans(10, SHARES, ALL) == [Span(0, 0, 3), Span(1, 3, 7), Span(2, 7, 10)]


def test_one_epoch_is_alignment():
    assert spans(1, SHARES, ALL) == [Span(1, 0, 1)]


def test_a_stage_without_work_leaves_its_epochs_to_the_others():
    assert spans(7, SHARES, (False, True, True)) == [Span(1, 0, 4), Span(2, 4, 7)]


def test_apportion_refuses_to_give_to_nobody():
    with pytest.raises(ValueError, match="above 0"):
        apportion(3, [0, 0])


def test_balance_1_takes_each_source_once_and_0_all_alike():
    assert steps_of_sources([90, 9, 3], 1.0) == [90, 9, 3]
    assert steps_of_sources([90, 9, 3], 0.0) == [34, 34, 34]


def test_balance_between_brings_small_sources_more_often():
    counts = steps_of_sources([10000, 100], 0.5)
    assert sum(counts) == 10100
    assert counts[1] == pytest.approx(10100 / 11, rel=0.01)  # roots: 100 to 10
    assert steps_of_sources([1, 1], 0.5) == [1, 1]


def test_the_order_is_a_shuffle_that_depends_on_its_numbers_alone():
    one = order_of([30, 10, 5], 0, 1, 2)
    assert Counter(one) == {0: 30, 1: 10, 2: 5}
    assert one == order_of([30, 10, 5], 0, 1, 2)
    assert one != order_of([30, 10, 5], 0, 1, 3)
    assert one[:30] != [0] * 30


def test_the_learning_rate_rises_and_falls_by_the_cosine():
    rates = [learning_rate(2.0, step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))
    assert learning_rate(1.0, 0, 1, 0.1) == 1.0
