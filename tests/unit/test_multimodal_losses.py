"""Losses of multimodal/ against a hand calculation and open_clip's own."""

import math

import pytest
import torch
from torch.nn import functional

from multimodal.datasets import Task
from multimodal.pairs.batches import hidden_parts, modality_dropout
from multimodal.training import losses
from multimodal.training.losses import LossOptions, loss_of
from shared.distributed import World
from tests import multimodal_nano as nano

ALONE = World()


def pairs(rows: int = 5, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(rows, width, generator=generator).double() for _ in range(2))
    return functional.normalize(one, dim=1), functional.normalize(other, dim=1)


def test_info_nce_by_hand():
    """Two orthogonal pairs at scale 1: each row has e against e + 1."""
    one = torch.eye(2, dtype=torch.float64)
    expected = -math.log(math.e / (math.e + 1))
    for local in (False, True):
        value = losses.info_nce(one, one, torch.tensor(1.0), ALONE, local=local)
        assert value.item() == pytest.approx(expected, abs=1e-12)
    same = functional.normalize(torch.ones(8, 4), dim=1)  # nobody is told apart: chance
    chance = losses.info_nce(same, same, torch.tensor(14.0), ALONE)
    assert chance.item() == pytest.approx(math.log(8), rel=1e-6)


@pytest.mark.slow
def test_both_losses_are_open_clips():
    from open_clip.loss import ClipLoss, SigLipLoss

    one, other = pairs()
    scale, bias = torch.tensor(12.5).double(), torch.tensor(-7.0).double()
    expected = ClipLoss()(one, other, scale)
    assert losses.info_nce(one, other, scale, ALONE).item() == pytest.approx(expected.item())
    expected = SigLipLoss()(one, other, scale, bias)
    assert losses.sigmoid(one, other, scale, bias, ALONE).item() == pytest.approx(expected.item())


def test_the_sigmoid_loss_by_hand():
    one = torch.eye(2, dtype=torch.float64)
    value = losses.sigmoid(one, one, torch.tensor(2.0), torch.tensor(-1.0), ALONE)
    partner, stranger = math.log1p(math.exp(-(2 - 1))), math.log1p(math.exp(-1))
    assert value.item() == pytest.approx(partner + stranger, rel=1e-7)


def test_the_multi_label_loss_by_hand():
    logits, labels = torch.tensor([[0.0, 2.0]]), torch.tensor([[True, False]])
    expected = math.log(2) + math.log1p(math.exp(2.0))
    two = torch.cat([logits, logits]), torch.cat([labels, labels])
    assert losses.multi_label(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    assert losses.multi_label(*two).item() == pytest.approx(expected, rel=1e-6)
    assert losses.multi_label(logits.bfloat16(), labels).dtype == torch.float32


def test_labels_beside_pairs_are_weighted_and_labels_alone_are_not():
    one, other = pairs()
    outputs = {"image_features": one, "text_features": other, "scale": torch.tensor(10.0)}
    outputs["logits"] = labels = torch.zeros(5, 3)
    options = LossOptions(label_weight=0.5)
    task = Task("coco", ("image", "text"), True, "classes")
    total, parts = loss_of(task, outputs, labels, options, ALONE)
    contrast = losses.info_nce(one, other, torch.tensor(10.0), ALONE).item()
    assert parts["contrast"].item() == pytest.approx(contrast)
    assert parts["classes"].item() == pytest.approx(3 * math.log(2))
    assert total.item() == pytest.approx(contrast + 0.5 * 3 * math.log(2), rel=1e-6)
    total, _ = loss_of(Task("coco", ("image",), False, "classes"), outputs, labels, options, ALONE)
    assert total.item() == pytest.approx(3 * math.log(2))


def masks(world: World, rows: int, share: float, seed: int = 0) -> torch.Tensor:
    task = Task("clotho", ("audio", "text"), True, "keywords")
    return modality_dropout(task, rows, world, torch.Generator().manual_seed(seed), share)


def test_modality_dropout_leaves_one_of_the_two_and_never_none():
    mask = masks(ALONE, 4000, 0.3)
    assert not mask[:, 0].any()
    assert mask.any(dim=1).all()
    both = mask[:, 1:].all(dim=1).double().mean().item()
    assert both == pytest.approx(0.7, abs=0.03)
    assert mask[:, 1].double().mean().item() == pytest.approx(0.85, abs=0.03)
    assert masks(ALONE, 100, 0.0)[:, 1:].all()


def test_one_modality_is_never_dropped():
    task = Task("coco", ("image",), False, "classes")
    mask = modality_dropout(task, 50, ALONE, torch.Generator().manual_seed(0), 0.9)
    assert mask.tolist() == [[True, False, False]] * 50


def hidden(world: World, rows: int) -> torch.Tensor:
    return hidden_parts(rows, 500, world, torch.Generator().manual_seed(0))


def test_four_of_five_parts_are_hidden():
    assert hidden(ALONE, 8).double().mean().item() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("draw", [lambda world, rows: masks(world, rows, 0.5), hidden])
def test_two_processes_draw_the_halves_of_what_one_draws(draw):
    halves = [draw(World(rank=rank, size=2), 4) for rank in range(2)]
    assert torch.equal(torch.cat(halves), draw(ALONE, 8))


def test_the_error_of_hidden_parts_by_hand():
    """A head that always says 0.5: the error of hidden frames that are sound, and of no other."""
    learner = nano.learner()
    torch.nn.init.zeros_(learner.mel_head.weight)
    torch.nn.init.constant_(learner.mel_head.bias, 0.5)
    batch = nano.double(nano.inputs(2, frames=10))  # three tokens, the last of two frames
    batch["audio_mask"] = torch.tensor([[True] * 10, [True] * 5 + [False] * 5])
    hidden = torch.tensor([[True, False, True], [False, True, True]])
    sounds = {name: batch[name] for name in ("audio", "audio_mask")}
    task = Task("audiocaps", ("audio",), False, "spectrogram")
    errors = learner(sounds | {"hidden": hidden}, task)["errors"]
    for row, frames in ((0, [0, 1, 2, 3, 8, 9]), (1, [4])):
        expected = (batch["audio"][row, frames] - 0.5).square().mean()
        assert errors[row].item() == pytest.approx(expected.item(), rel=1e-9)


def test_hidden_parts_are_not_heard():
    learner, guesses = nano.learner().eval(), []
    learner.mel_head.register_forward_hook(lambda *a: guesses.append(a[2].detach()))
    audio, hidden = (
        nano.double(nano.inputs(1, frames=12))["audio"],
        torch.tensor([[0, 1, 0]]).bool(),
    )
    task = Task("audiocaps", ("audio",), False, "spectrogram")
    for value in (0.0, 9.0):
        audio[:, 4:8] = value
        mask = torch.ones(1, 12, dtype=torch.bool)
        learner({"audio": audio, "audio_mask": mask, "hidden": hidden}, task)
    assert torch.equal(guesses[0], guesses[1])
