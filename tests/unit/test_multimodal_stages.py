"""What each stage trains, and how fast."""

from types import SimpleNamespace

import pytest
import torch

from multimodal.training import schedule
from multimodal.training.schedule import Span, Stage
from shared.distributed import World
from tests import multimodal_nano as nano

PARTS = (
    "image",
    "text",
    "audio",
    "fusion",
    "classifier",
    "logit_scale",
    "keyword_head",
    "mel_head",
)


def trained_parts(stage: int) -> set[str]:
    learner = nano.learner()
    schedule.enter(Stage(Span(stage, 0, 1), (), 1), learner, World())
    found = {
        name.removeprefix("model.").partition(".")[0]
        for name, parameter in learner.named_parameters()
        if parameter.requires_grad
    }
    return found & set(PARTS)


def test_the_first_stage_leaves_texts_and_temperatures():
    assert trained_parts(0) == set(PARTS) - {"text", "logit_scale"}


def test_alignment_leaves_fusion_and_heads():
    assert trained_parts(1) == {"image", "text", "audio", "logit_scale"}


def test_fine_tuning_trains_everything():
    learner = nano.learner()
    schedule.enter(Stage(Span(2, 0, 1), (), 1), learner, World())
    assert all(parameter.requires_grad for parameter in learner.parameters())


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


def test_a_frozen_part_takes_no_step():
    learner = nano.learner()
    optimizer = schedule.optimizer_for(learner, 1e-4, 0.1)
    schedule.enter(Stage(Span(1, 0, 1), (), 1), learner, World())
    batch = nano.double(nano.inputs(3))
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    learner.model(images=batch["images"])["logits"].square().sum().backward()
    optimizer.step()
    changed = {n for n, p in learner.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(name.startswith("model.image.") for name in changed)
