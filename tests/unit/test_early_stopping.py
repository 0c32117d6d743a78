import math

import pytest

from shared.amp import EarlyStopping, has_stalled


def test_it_stops_after_as_many_updates_without_a_new_low_as_it_has_patience() -> None:
    stopping = EarlyStopping(patience=2)
    decisions = []
    for value in (1.0, 0.9, 0.9, 0.95):
        stopping.update(value)
        decisions.append(stopping.should_stop)
    assert decisions == [False, False, False, True]
    assert stopping.best == 0.9


def test_an_improvement_starts_the_count_anew() -> None:
    stopping = EarlyStopping(patience=2)
    assert [stopping.update(value) for value in (1.0, 1.1, 0.5, 0.6)] == [True, False, True, False]
    assert not stopping.should_stop


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_no_improvement(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = EarlyStopping(patience=1)
    stopping.update(1.0)
    assert not stopping.update(value)
    assert stopping.should_stop
    assert stopping.best == 1.0
    assert str(value) in caplog.text


def test_a_first_value_of_nan_does_not_hide_later_improvements() -> None:
    stopping = EarlyStopping(patience=3)
    assert [stopping.update(value) for value in (math.nan, 2.0)] == [False, True]


def test_reset_forgets_best_and_count() -> None:
    stopping = EarlyStopping(patience=1)
    stopping.update(0.1)
    stopping.update(0.2)
    stopping.reset()
    assert not stopping.should_stop
    assert stopping.update(5.0)


def test_the_state_continues_in_another_instance() -> None:
    before = EarlyStopping(patience=3)
    for value in (1.0, 1.2):
        before.update(value)
    after = EarlyStopping(patience=3)
    after.load_state_dict(before.state_dict())
    for value in (1.0, 1.0):
        assert not after.update(value)
    assert after.should_stop


@pytest.mark.parametrize(
    ("best_epoch", "epoch", "patience", "stalled"),
    [(3, 3, 1, False), (3, 4, 1, True), (3, 4, 2, False), (0, 2, 2, True), (1, 99, None, False)],
)
def test_epochs_behind_the_best_one_are_counted(best_epoch, epoch, patience, stalled) -> None:
    assert has_stalled(best_epoch, epoch, patience) == stalled
