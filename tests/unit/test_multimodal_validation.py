"""What held-out samples say, against sums by hand."""

import math

import pytest
import torch

from multimodal.datasets import OnePerGroup, Source
from multimodal.pairs.samples import Counts
from multimodal.training import validation
from multimodal.training.losses import LossOptions
from shared.amp import Amp
from shared.distributed import World
from tests import multimodal_nano as nano

AMP, ALONE = Amp("off", torch.device("cpu")), World()


class Pairs:
    """Rows of the nano batch as a data set."""

    counts = Counts("coco", "val", 0, 0)

    def __init__(self, total: int) -> None:
        self.batch, self.total = nano.inputs(total), total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        names = ("images", "input_ids", "attention_mask", "labels")
        return {name: self.batch[name][index] for name in names}

    def group_of(self, index: int) -> int:
        return index


def source(total: int) -> Source:
    pairs = OnePerGroup(Pairs(total))
    return Source("coco", ("image", "text"), pairs, pairs, "classes")


def features(total: int) -> tuple[torch.Tensor, torch.Tensor]:
    model, batch = nano.learner().float().eval().model, nano.inputs(total)
    with torch.no_grad():
        one = model.encode_image(batch["images"])
        return one, model.encode_text(batch["input_ids"], batch["attention_mask"])


def test_recall_counts_rows_whose_partner_is_the_nearest():
    one, other = features(9)
    hits = 0
    for rows, columns in ((one, other), (other, one)):
        for place, row in enumerate(rows):
            scores = [float(row @ column) for column in columns]
            hits += scores.index(max(scores)) == place
    learner = nano.learner().float()
    found = validation.recall_at_1(learner, [source(9)], 4, ALONE, AMP)["coco"]
    assert found == {"R@1": pytest.approx(hits / 18), "chance": 1 / 9, "pairs": 9.0}
    assert learner.training


def test_the_loss_is_that_of_whole_batches_in_order():
    """Nine pairs in batches of four: two batches, and the ninth pair is left out."""
    one, other = features(9)
    scale = 1 / 0.07
    losses = []
    for start in (0, 4):
        scores = scale * one[start : start + 4] @ other[start : start + 4].T
        both = []
        for matrix in (scores, scores.T):
            both += [
                math.log(sum(math.exp(float(v)) for v in row)) - float(row[place])
                for place, row in enumerate(matrix)
            ]
        losses.append(sum(both) / 8)
    learner = nano.learner().float()
    given = source(9)
    task = given.task(1)
    assert task is not None
    found = validation.losses(learner, [(given, task)], 4, LossOptions(), ALONE, AMP)
    assert found == {"coco": pytest.approx(sum(losses) / 2, rel=1e-5)}
    assert learner.training


def test_a_source_without_held_out_samples_has_no_loss():
    given = Source("coco", ("image", "text"), source(4).training, None)
    task = given.task(1)
    assert task is not None
    assert validation.losses(nano.learner(), [(given, task)], 4, LossOptions(), ALONE, AMP) == {}
