"""Learning rate schedules against numbers worked out by hand."""

import math

import pytest

from arcface.inshop_retrieval.config import RECIPE, read_config
from arcface.inshop_retrieval.schedule import learning_rate_factor
from shared.errors import UserError

LINEAR = {
    "type": "LinearLR",
    "start_factor": 0.01,
    "by_epoch": True,
    "begin": 0,
    "end": 5,
    "convert_to_iter_based": True,
}
COSINE = {"type": "CosineAnnealingLR", "T_max": 45, "by_epoch": True, "begin": 5, "end": 50}


def factor(*entries, steps=6, lr=0.02):
    return learning_rate_factor(list(entries), steps, lr)


def test_the_recipes_warm_up_rises_every_step_and_its_cosine_falls_every_epoch():
    at = factor(LINEAR, COSINE, steps=6)
    # 30 steps of warm-up: the first has 0.01, the last, step 29, has 1
    assert at(0) == 0.01
    assert at(11) == pytest.approx(0.01 + 0.99 * 11 / 29)
    assert f"{0.02 * at(11):.4e}" == "7.7103e-03"  # as mm's log has it at a rate of 0.02
    assert at(29) == at(30) == at(35) == pytest.approx(1.0)
    # epoch 6 and 27 (from 0): one and 22 of 45 epochs into the cosine
    assert at(36) == at(41) == pytest.approx((1 + math.cos(math.pi / 45)) / 2)
    assert at(6 * 27 + 3) == pytest.approx((1 + math.cos(math.pi * 22 / 45)) / 2)
    # the last epoch is the 44th of the cosine, not its zero
    assert at(6 * 49 + 5) == at(6 * 60) == pytest.approx((1 + math.cos(math.pi * 44 / 45)) / 2)


@pytest.mark.parametrize(
    ("name", "epochs"),
    [("resnet50-arcface_8xb32_inshop", 50), ("vit-b16-arcface_8xb32_inshop", 32)],
)
def test_the_shipped_configurations_have_their_schedules(name, epochs):
    config = read_config(RECIPE / "config" / "arcface" / f"{name}.py")
    at = learning_rate_factor(config["param_scheduler"], 100, 1.0)
    assert at(0) == 0.01 and max(map(at, range(100 * epochs))) == pytest.approx(1.0)
    assert 0 < at(100 * epochs - 1) < 0.004


def test_a_cosine_by_steps_and_to_a_floor():
    entry = {**COSINE, "begin": 0, "end": 10, "T_max": 10, "convert_to_iter_based": True}
    at = factor({**entry, "eta_min": 0.002}, steps=4)
    assert at(20) == pytest.approx(0.1 + 0.9 * 0.5)
    assert at(40) == at(39) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 39 / 40)) / 2)
    del entry["T_max"]  # is then end - begin
    assert factor(entry, steps=4)(20) == pytest.approx(0.5)


CONSTANT = {"type": "ConstantLR", "factor": 0.25, "by_epoch": False, "begin": 0, "end": 4}
STEPS = {"type": "MultiStepLR", "milestones": [2, 3], "gamma": 0.1}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], [1, 1, 1]),
        ([{**LINEAR, "begin": 2}], [1, 1, 1, 1, 0.01]),
        ([CONSTANT], [0.25, 0.25, 0.25, 1, 1]),
        ([STEPS], [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
    ],
    ids=["none", "waits for its begin", "constant", "multi-step"],
)
def test_two_steps_an_epoch_by_hand(entries, expected):
    at = factor(*entries, steps=2)
    assert [at(step) for step in range(len(expected))] == pytest.approx(expected)


WRONG = {
    "a kind that is not there": ({"type": "OneCycleLR"}, "param_scheduler.0.type is 'OneCycleLR'"),
    "text for a number": ({**LINEAR, "end": "five"}, "param_scheduler.0.end must be a number"),
    "a misspelt key": ({**COSINE, "Tmax": 3}, "Tmax is not known"),
    "a cosine without length": ({"type": "CosineAnnealingLR"}, "T_max is missing"),
    "no dict": (3, "param_scheduler.0 is 3"),
}


@pytest.mark.parametrize(("entry", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_entry_is_refused_by_name(entry, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        factor(entry)
