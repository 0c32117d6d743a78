"""Epochs of the stages, what each trains, order of the sources, learning rates."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest

from multimodal.training import schedule
from multimodal.training.schedule import Span, Stage, learning_rate, order_of, steps_of_sources
from shared.distributed import World
from tests import multimodal_nano as nano

SHARES, ALL = (30, 40, 30), (True, True, True)


@pytest.mark.parametrize(
    ("epochs", "ends"),
    [(100, [30, 70, 100]), (10, [3, 7, 10]), (3, [1, 2, 3]), (7, [2, 5, 7]), (1, [0, 1, 1])],
)
def test_epochs_are_divided_30_40_30(epochs, ends):
    """And numbered on through the stages; a single one is alignment."""
    expected = [Span(*one) for one in zip(range(3), [0, *ends], ends, strict=False)]
    assert schedule.spans(epochs, SHARES, ALL) == [
        span for span in expected if span.end > span.first
    ]


def test_a_stage_without_work_leaves_its_epochs_to_the_others():
    assert schedule.spans(7, SHARES, (False, True, True)) == [Span(1, 0, 4), Span(2, 4, 7)]


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


PARTS = {
    "image", "text", "audio", "fusion", "classifier", "logit_scale", "keyword_head", "mel_head",
}  # fmt: skip


def trained_parts(stage: int) -> set[str]:
    learner = nano.learner()
    schedule.enter(Stage(Span(stage, 0, 1), (), 1), learner, World())
    found = {
        name.removeprefix("model.").partition(".")[0]
        for name, parameter in learner.named_parameters()
        if parameter.requires_grad
    }
    return found & PARTS


def test_each_stage_trains_its_parts():
    """Texts and temperatures wait in the first, fusion and heads in the second."""
    assert trained_parts(0) == PARTS - {"text", "logit_scale"}
    assert trained_parts(1) == {"image", "text", "audio", "logit_scale"}
    assert trained_parts(2) == PARTS


def test_gains_biases_and_temperatures_have_no_weight_decay():
    learner = nano.learner()
    optimizer = schedule.optimizer_for(learner, 1e-4, 0.1)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in learner.named_parameters() if id(p) in decayed}
    assert "model.image.conv1.weight" in names and "keyword_head.weight" in names
    assert not any(n.endswith(".bias") or "ln_" in n or "logit_" in n for n in names)
    every = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(every) == len(list(learner.parameters()))


def rates(stage: int, epoch: int, batch: int) -> dict[bool, float]:
    """Learning rate of the rest (False) and of the towers (True)."""
    optimizer = schedule.optimizer_for(nano.learner(), 1.0, 0.1)
    stage_of = Stage(Span(stage, 4, 8), (), 25)
    schedule.set_rate(optimizer, stage_of, epoch, batch, peak=1.0, warmup=0.1, towers=0.25)
    return {group["is_tower"]: group["lr"] for group in optimizer.param_groups}


def test_the_rate_starts_anew_in_each_stage_and_towers_are_slower_in_the_last():
    assert rates(1, 4, 0) == {True: pytest.approx(0.1), False: pytest.approx(0.1)}
    assert rates(2, 4, 9) == {True: pytest.approx(0.25), False: pytest.approx(1.0)}
    assert rates(2, 7, 24)[False] < 0.001


def source(name: str, total: int, tasks: tuple[int, ...]) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, training=range(total), task=lambda stage: stage in tasks or None,
        steps=lambda rows: total // rows,
    )  # fmt: skip


def test_small_sources_are_left_out_with_the_reason():
    sources = SimpleNamespace(
        found=[source("coco", 100, (0, 1, 2)), source("voxceleb", 7, (1, 2))], notes=[]
    )
    found = schedule.plan(sources, 100, (30, 40, 30), 2, 4, World())
    assert [stage.span for stage in found] == [Span(0, 0, 30), Span(1, 30, 70), Span(2, 70, 100)]
    assert all([one.name for one in stage.sources] == ["coco"] for stage in found)
    assert [stage.steps for stage in found] == [12, 12, 12]
    assert (
        "7 samples are too few for one step: 1 process(es) x batch 2"
        in sources.notes[0]["left_out"]
    )
