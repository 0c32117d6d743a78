"""ArcFace's class centres: margins, loss and gradients, sampled rows, the state of all classes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from arcface.inshop_retrieval.partial_fc import CentreRows, PartialFC
from shared import checkpoint
from shared.amp import Amp
from shared.distributed import World
from shared.errors import UserError
from shared.margins import adaptive_margins, add_margin, margin_logits_

MakeOptimizer = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "AdamW": lambda p: AdamW(p, lr=0.05, weight_decay=0.1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(classes: int, width: int, **options: Any) -> PartialFC:
    return PartialFC(classes, width, World(), **options)


def reference_gradients(
    centres: PartialFC, reference: Any, rows: int, width: int
) -> list[tuple[Tensor, Tensor]]:
    """(ours, theirs) for loss, gradient to embeddings, gradient to centres; same centres."""
    dtype = centres.weight.dtype
    reference.W.data = centres.weight.detach().T.clone()
    labels = torch.arange(rows) % centres.num_classes
    embeddings = normal(rows, width)
    # some rows beyond π - m of their centre, where the cosine would rise again
    embeddings[:4] = 0.1 * embeddings[:4] - 3 * functional.normalize(
        centres.weight.detach().double().view(centres.num_classes, -1, width)[labels[:4], 0]
    )
    ours, theirs = (embeddings.to(dtype).requires_grad_() for _ in range(2))
    loss, expected = centres(ours, labels), reference(theirs, labels)
    own = torch.autograd.grad(loss, [ours, centres.weight])
    other = torch.autograd.grad(expected, [theirs, reference.W])
    return [(loss, expected), (own[0], other[0]), (own[1], other[1].T)]


# ---------------------------------------------------------------- margins


@pytest.mark.parametrize("sub_centres", [1, 3])
@pytest.mark.parametrize("margin", [0.0, 0.3, 0.5, 1.0])
def test_loss_and_gradients_are_those_of_pytorch_metric_learning(margin, sub_centres):
    from pytorch_metric_learning import losses

    options = {"num_classes": 9, "embedding_size": 24, "margin": math.degrees(margin), "scale": 64}
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        centres = make(9, 24, margins=margin, sub_centres=sub_centres, init_std=1.0).to(dtype)
        reference = (
            losses.SubCenterArcFaceLoss(**options, sub_centers=sub_centres)
            if sub_centres > 1
            else losses.ArcFaceLoss(**options)
        ).to(dtype)
        pairs = reference_gradients(centres, reference, 20, 24)
        torch.testing.assert_close(*pairs[0], rtol=tolerance, atol=tolerance)
        for ours, theirs in pairs[1:]:
            largest = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1, largest))


def test_the_easy_margin_moves_only_embeddings_within_a_right_angle():
    angles = torch.tensor([0.4, 1.2, 1.6, 3.0], dtype=torch.float64)
    moved = add_margin(angles.cos(), 0.5, easy=True)
    expected = [math.cos(0.9), math.cos(1.7), math.cos(1.6), math.cos(3.0)]
    assert moved.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_gradient_through_an_easy_margin_is_that_of_finite_differences():
    cosines = (0.9 * normal(5, 4).tanh()).requires_grad_()
    columns, margins = torch.tensor([2, -1, 0, 3, 1]), torch.full((5,), 0.5).double()
    assert torch.autograd.gradcheck(
        lambda c: margin_logits_(c.clone(), columns, margins, 2.0, easy=True), cosines
    )


def test_adaptive_margins_are_wide_for_rare_classes():
    margins = adaptive_margins(torch.tensor([1, 2, 6, 6, 14, 162]))
    expected = [0.5, 0.4005, 0.2742, 0.2742, 0.1980, 0.05]
    assert margins.tolist() == pytest.approx(expected, abs=5e-5)
    assert adaptive_margins(torch.tensor([3, 3])).tolist() == [0.5, 0.5]
    with pytest.raises(UserError, match="class 1 has no samples"):
        adaptive_margins(torch.tensor([4, 0, 2]))


def test_each_class_has_its_own_margin():
    margins = torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64)
    centres = make(3, 8, margins=margins).double()
    embeddings, labels = normal(6, 8), torch.tensor([0, 1, 2, 2, 1, 0])
    angles = functional.cosine_similarity(embeddings[:, None], centres.weight[None], dim=2).acos()
    angles = angles + functional.one_hot(labels, 3) * margins[labels][:, None]
    expected = functional.cross_entropy(64 * angles.cos(), labels)
    torch.testing.assert_close(centres(embeddings, labels), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sub_centres", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_finite_where_an_embedding_meets_its_centre_or_its_opposite_or_is_zero(
    dtype, sub_centres
):
    centres = make(4, 4, sub_centres=sub_centres).to(dtype)
    axes = torch.eye(4, dtype=dtype)  # along the axes the cosines are exactly 1 and -1
    centres.weight.data = axes.repeat_interleave(sub_centres, 0)
    for length in (3.0, -3.0, 0.0):
        embeddings = (length * axes).requires_grad_()
        loss = centres(embeddings, torch.arange(4))
        assert loss.isfinite()
        gradients = torch.autograd.grad(loss, [embeddings, centres.weight])
        assert gradients[1].isfinite().all()
        assert length == 0 or gradients[0].isfinite().all()


def test_the_loss_is_right_where_the_targets_share_is_too_small_for_a_float():
    centres = make(2, 2, margins=0.0)
    centres.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    embeddings = torch.tensor([[-1.0, 0.0]], requires_grad=True)
    loss = centres(embeddings, torch.tensor([0]))  # e^-128 is 0 in float32
    assert loss.item() == pytest.approx(128, rel=1e-6)


def test_the_loss_is_float32_under_autocast():
    centres = make(8, 64)
    embeddings, labels = normal(8, 64, dtype=torch.float32), torch.arange(8)
    expected = centres(embeddings.double(), labels).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = centres(embeddings, labels)
        half = centres(embeddings.bfloat16(), labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss.dtype == half.dtype == torch.float32


# ---------------------------------------------------------------- shards


def test_the_first_centres_do_not_depend_on_the_number_of_ranks():
    whole = make(2500, 3, sub_centres=2, seed=5).weight
    assert whole.std().item() == pytest.approx(0.01, rel=0.05)
    for size in (2, 3):
        parts = [
            PartialFC(2500, 3, World(rank=rank, size=size), sub_centres=2, seed=5).weight
            for rank in range(size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(make(2500, 3, sub_centres=2, seed=6).weight, whole)


# ---------------------------------------------------------------- sampling


class Training:
    """Steps on random batches: what is drawn and what comes out."""

    def __init__(self, make_optimizer, classes=40, **options):
        self.centres = make(classes, 6, init_std=1.0, scale=4.0, **options)
        self.optimizer = make_optimizer(self.centres.parameters())
        self.rows = CentreRows(self.centres, self.optimizer)

    def step(self, number):
        labels = torch.randint(
            0, self.centres.num_classes, (5,), generator=torch.Generator().manual_seed(number)
        )
        self.rows.sample(labels, number)
        loss = self.centres(normal(5, 6, seed=number, dtype=torch.float32), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def everything(self):
        """Centres and moments by name, one row a class."""
        self.rows.collect()
        state = self.rows.state_dict()
        return {n: t.clone() for n, t in {"centres": state["centres"], **state["moments"]}.items()}


@every_optimizer
@pytest.mark.parametrize("sub_centres", [1, 2])
def test_rows_that_are_not_drawn_stay_as_they_are_to_the_bit(make, sub_centres):
    training = Training(make, sample_rate=0.3, sub_centres=sub_centres)
    before = training.everything()
    seen = set()
    for number in range(8):
        training.step(number)
        after = training.everything()
        drawn = torch.zeros(40, dtype=torch.bool)
        drawn[training.centres.drawn] = True
        seen |= set(training.centres.drawn.tolist())
        assert drawn.sum() == 12
        for name, old in before.items():
            changed = (after[name] != old).view(40, -1).any(1)
            assert torch.equal(changed, drawn), name
        before = after
    assert len(seen) > 30


def test_the_classes_of_the_batch_are_always_drawn_and_the_others_change():
    training = Training(OPTIMIZERS["SGD"], sample_rate=0.2)
    draws = []
    for number in range(6):
        labels = torch.tensor([number, number + 20, number])
        training.rows.sample(labels, number)
        draws.append(training.centres.drawn.tolist())
        assert len(draws[-1]) == 8
        assert {number, number + 20} <= set(draws[-1])
    assert len({tuple(draw) for draw in draws}) == 6
    training.rows.sample(torch.arange(0, 30), 6)  # more than the rate asks for
    assert training.centres.drawn.tolist() == list(range(30))


@every_optimizer
def test_drawing_all_classes_trains_as_no_sampling_does(make):
    all_of_them = Training(make, classes=9, sample_rate=0.99)  # 0.99 · 9 rounds to 9
    plain = Training(make, classes=9)
    for number in range(5):
        assert all_of_them.step(number) == plain.step(number)
    one, other = all_of_them.everything(), plain.everything()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@every_optimizer
@pytest.mark.parametrize("sample_rate", [0.3, 1.0])
def test_a_resumed_run_takes_the_same_steps(make, sample_rate):
    straight = Training(make, sample_rate=sample_rate)
    losses = [straight.step(number) for number in range(8)]
    first = Training(make, sample_rate=sample_rate)
    begun = [first.step(number) for number in range(4)]
    first.rows.collect()
    second = Training(make, sample_rate=sample_rate)
    second.optimizer.param_groups[0]["lr"] = 77.0
    second.rows.load_state_dict(first.rows.state_dict())
    assert begun + [second.step(number) for number in range(4, 8)] == losses
    ends = straight.everything(), second.everything()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# ---------------------------------------------------------------- state


def test_the_state_is_asked_for_its_size_before_the_first_step_and_refused_after_one():
    centres = PartialFC(10, 3, World(size=2))
    optimizer = SGD(centres.parameters(), lr=0.1, momentum=0.9)
    rows = CentreRows(centres, optimizer)
    assert tuple(rows.state_dict()["centres"].shape) == (10, 3)
    assert checkpoint.expected_size({"rows": rows}, 2) >= 3 * 10 * 3 * 4  # with Adam's two moments
    centres.weight.grad = torch.ones_like(centres.weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="collect"):
        rows.state_dict()


def test_a_state_of_other_classes_is_refused():
    small, large = Training(OPTIMIZERS["SGD"], classes=9), Training(OPTIMIZERS["SGD"], classes=10)
    with pytest.raises(ValueError, match=r"\(9, 6\).*\(10, 6\)"):
        large.rows.load_state_dict(small.rows.state_dict())


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("sample_rate", [1.0, 0.6])
def test_a_step_is_clipped_by_the_norm_of_encoder_and_centres_together(sample_rate):
    torch.manual_seed(0)
    encoder = torch.nn.Linear(6, 6).double()
    head = make(10, 6, sample_rate=sample_rate, init_std=1.0).double()
    optimizers = [SGD(module.parameters(), lr=1.0) for module in (encoder, head)]
    rows, labels = CentreRows(head, optimizers[1]), torch.arange(5)
    rows.sample(labels, 0)
    parameters = [*encoder.parameters(), head.weight]
    head(encoder(normal(5, 6)), labels).backward()
    gradients = torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None])
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    amp, world = Amp("off", torch.device("cpu")), World()
    norm = amp.step(
        optimizers[0], encoder.parameters(), clip_norm=1.0, sharded=(optimizers[1], world)
    )
    moved = before - torch.cat([p.detach().flatten() for p in parameters])
    assert norm == pytest.approx(float(gradients.norm())) and norm > 2
    torch.testing.assert_close(moved, gradients / (norm + 1e-6), rtol=1e-9, atol=1e-12)
