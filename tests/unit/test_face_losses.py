import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from face_distill.distill.losses import (
    ArcFaceHead,
    Balance,
    add_margin,
    attention_transfer,
    rkd_angle,
    rkd_distance,
)
from shared.errors import UserError

Loss = Callable[[Tensor, Tensor], Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------- ArcFace


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_arcface_agrees_with_pytorch_metric_learning(margin):
    from pytorch_metric_learning.losses import ArcFaceLoss

    head = ArcFaceHead(24, 9, m=margin).double()
    reference = ArcFaceLoss(9, 24, margin=math.degrees(margin), scale=64).double()
    reference.W.data = head.weight.detach().T.clone()
    labels = torch.arange(20) % 9
    ours, theirs = (normal(20, 24).requires_grad_() for _ in range(2))
    loss, expected = head(ours, labels), reference(theirs, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    to_embeddings, to_weight = torch.autograd.grad(loss, [ours, head.weight])
    expected_embeddings, expected_weight = torch.autograd.grad(expected, [theirs, reference.W])
    torch.testing.assert_close(to_embeddings, expected_embeddings, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(to_weight, expected_weight.T, rtol=1e-10, atol=1e-12)


def test_arcface_moves_the_target_alone_by_the_margin():
    # Centres along the axes; embedding at 60 degrees from class 0, 30 degrees from class 1.
    head = ArcFaceHead(2, 2, s=10.0, m=0.5).double()
    head.weight.data = torch.eye(2, dtype=torch.float64) * 7
    embedding = torch.tensor([[3 * math.cos(math.pi / 3), 3 * math.sin(math.pi / 3)]]).double()
    target, other = 10 * math.cos(math.pi / 3 + 0.5), 10 * math.cos(math.pi / 6)
    expected = math.log(math.exp(target) + math.exp(other)) - target
    assert head(embedding, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_arcface_is_finite_where_an_embedding_meets_its_centre_or_its_opposite(sign, dtype):
    head = ArcFaceHead(4, 4).to(dtype)
    head.weight.data = torch.eye(4, dtype=dtype)  # along the axes the cosines are exactly 1 and -1
    embeddings = (sign * torch.eye(4, dtype=dtype) * 3).requires_grad_()
    loss = head(embeddings, torch.arange(4))
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, [embeddings, head.weight]):
        assert gradient.isfinite().all()


def test_the_margined_cosine_falls_over_the_whole_half_circle():
    angles = torch.linspace(0, math.pi, 1001, dtype=torch.float64)
    moved = add_margin(angles.cos(), 0.5)
    assert (moved.diff() < 0).all()
    before = angles < math.pi - 0.5
    torch.testing.assert_close(moved[before], (angles[before] + 0.5).cos(), rtol=0, atol=2e-8)


def test_arcface_computes_in_float32_under_autocast():
    head = ArcFaceHead(64, 8)
    embeddings, labels = normal(8, 64, dtype=torch.float32), torch.arange(8)
    expected = head(embeddings.double(), labels).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(embeddings, labels)
        half = head(embeddings.bfloat16(), labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert loss.dtype == half.dtype == torch.float32


# ---------------------------------------------------------------- attention transfer


def probabilities(batch: int, side: int) -> Tensor:
    return normal(batch, side * side, seed=3).softmax(1)


def pooled_by_hand(maps: Tensor, side: int) -> Tensor:
    """Cell i of n averages the rows floor(i·N/n) to ceil((i+1)·N/n), columns alike."""
    size = maps.shape[-1]
    edges = [(i * size // side, -((i + 1) * size // -side)) for i in range(side)]
    rows = [[maps[:, a:b, c:d].mean((1, 2)) for c, d in edges] for a, b in edges]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def test_kl_energy_averages_the_students_16_by_16_to_the_teachers_7_by_7():
    tokens, teacher = normal(3, 256, 5) / 3, probabilities(3, 7)
    energy = pooled_by_hand(tokens.square().sum(-1).view(3, 16, 16), 7).flatten(1)
    log_student = energy - energy.exp().sum(1, keepdim=True).log()
    expected = (teacher * (teacher.log() - log_student)).sum() / 3
    for maps in (teacher, teacher.view(3, 7, 7)):
        loss = attention_transfer(tokens, maps, "kl_energy", "probability")
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_kl_energy_is_zero_for_equal_maps_and_takes_zero_probabilities():
    tokens = normal(2, 16, 6)
    own = tokens.square().sum(-1).softmax(1)
    assert attention_transfer(tokens, own).item() == pytest.approx(0, abs=1e-12)
    certain = torch.eye(16, dtype=torch.float64)[:2]
    expected = -tokens.square().sum(-1).log_softmax(1).diagonal().mean()
    torch.testing.assert_close(attention_transfer(tokens, certain), expected)


def test_a_students_coarser_grid_gets_the_teachers_map_averaged():
    tokens, teacher = normal(2, 16, 6) / 3, probabilities(2, 7)
    pooled = pooled_by_hand(teacher.view(2, 7, 7), 4).flatten(1)
    pooled = pooled / pooled.sum(1, keepdim=True)
    log_student = tokens.square().sum(-1).log_softmax(1)
    expected = (pooled * (pooled.log() - log_student)).sum() / 2
    torch.testing.assert_close(attention_transfer(tokens, teacher), expected, rtol=1e-12, atol=0)


def test_zagoruyko_agrees_with_loops_and_ignores_the_size_of_either_map():
    tokens, features = normal(2, 16, 5), normal(2, 3, 4, 4, seed=1)
    total = 0.0
    for student, teacher in zip(tokens, features, strict=True):
        q = torch.stack([(token * token).sum() for token in student])
        t = torch.stack([(teacher[:, i // 4, i % 4] ** 2).sum() for i in range(16)])
        total += ((q / (q * q).sum().sqrt() - t / (t * t).sum().sqrt()) ** 2).sum().item() / 16
    as_tokens = features.flatten(2).transpose(1, 2)
    for ours, theirs in ((tokens, features), (50 * tokens, 50 * features), (tokens, as_tokens)):
        loss = attention_transfer(ours, theirs, "zagoruyko", "features")
        assert loss.item() == pytest.approx(total / 2, rel=1e-12)


def test_kl_minmax_agrees_with_its_formula():
    tokens, teacher = normal(2, 16, 5), probabilities(2, 4)
    energy = tokens.square().sum(-1)
    rows = []
    for row, target in zip(energy.sqrt(), teacher, strict=True):
        s, t = ((v - v.min()) / (v.max() - v.min()) / 4 for v in (row, target))
        p, q = t.exp() / t.exp().sum(), s.exp() / s.exp().sum()
        rows.append((p * (p / q).log()).sum())
    loss = attention_transfer(tokens, teacher, "kl_minmax")
    torch.testing.assert_close(loss, torch.stack(rows).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("mode", ["kl_energy", "kl_minmax"])
def test_attention_transfer_is_float32_under_autocast_and_differentiable(mode):
    tokens = normal(2, 16, 5).float().requires_grad_()
    teacher = probabilities(2, 4).float().requires_grad_()
    expected = attention_transfer(tokens.double(), teacher.double(), mode).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention_transfer(tokens, teacher, mode)
        half = attention_transfer(tokens.bfloat16(), teacher, mode)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert loss.dtype == half.dtype == torch.float32
    to_tokens, to_teacher = torch.autograd.grad(loss, [tokens, teacher], allow_unused=True)
    assert to_tokens.isfinite().all()
    assert to_tokens.abs().max() > 0
    assert to_teacher is None


def test_zagoruyko_refuses_probabilities():
    with pytest.raises(UserError, match="needs the teacher's feature maps"):
        attention_transfer(normal(2, 16, 5), probabilities(2, 7), "zagoruyko", "probability")


# ---------------------------------------------------------------- relations


def smooth_l1(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def test_rkd_distance_of_three_points_by_hand():
    # Student distances 3, 4, 5 (mean 4); teacher 1, 1, 2 on a line (mean 4/3).
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.float64)
    pairs = [(3 / 4, 3 / 4), (4 / 4, 3 / 4), (5 / 4, 6 / 4)]
    expected = 2 * sum(0.5 * (s - t) ** 2 for s, t in pairs) / 9
    assert rkd_distance(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    with_zeros = rkd_distance(student, teacher, norm="all").item()
    assert with_zeros == pytest.approx(expected * (3 / 2) ** 2, rel=1e-12)


def test_rkd_angle_of_three_points_by_hand():
    # Student: right angle at the origin, 45 degrees at the others. Teacher: all on a line.
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    corners = [0.0 - 1.0, math.sqrt(0.5) + 1.0, math.sqrt(0.5) - 1.0]
    expected = 2 * sum(smooth_l1(difference) for difference in corners) / 27
    assert rkd_angle(student, teacher).item() == pytest.approx(expected, rel=1e-12)


class Tensors(TorchDispatchMode):
    """Records the most elements that any result of an operation has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_rkd_angle_in_chunks_is_the_same_and_keeps_nothing_larger_than_its_inputs():
    teacher = normal(12, 7, seed=1)
    whole, parts = (normal(12, 5).requires_grad_() for _ in range(2))
    loss = rkd_angle(whole, teacher)
    kept: set[int] = set()
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add(t.numel()) or t, lambda t: t
    )
    with hooks:
        chunked = rkd_angle(parts, teacher, max_elements=300)
    assert max(kept) <= 12 * 7
    loss.backward()
    with Tensors() as tensors:
        rkd_angle(normal(12, 5).requires_grad_(), teacher, max_elements=300).backward()
    assert tensors.largest <= 300 < 12**3
    chunked.backward()
    torch.testing.assert_close(chunked, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-16)


def test_relations_do_not_change_with_the_size_of_either_space():
    student, teacher = normal(6, 4), normal(6, 8, seed=1)
    for loss in (rkd_distance, rkd_angle):
        torch.testing.assert_close(loss(student * 9, teacher / 7), loss(student, teacher))
        assert loss(student, student * 3).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_relations_are_finite_with_duplicates_and_exact_for_close_ones(loss):
    teacher = normal(8, 16, seed=1)
    for rows in (normal(4, 4).repeat(2, 1), torch.ones(8, 4)):  # some the same; a collapsed student
        student = rows.clone().requires_grad_()
        value = loss(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.isfinite().all()
    # 30 apart from the origin, 0.05 from each other: bfloat16 sees one point.
    close = 30 / math.sqrt(512) + 0.05 * functional.normalize(normal(8, 512))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(close.float(), teacher.float())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(close, teacher).item(), rel=1e-4)


def test_relations_of_one_image_are_refused():
    with pytest.raises(UserError, match="at least 2 images"):
        rkd_distance(normal(1, 4), normal(1, 4))


def test_a_pull_is_the_norm_of_the_weighted_terms_gradient():
    x, y = torch.tensor([3.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    balance = Balance({"ArcFace": 2.0, "AT": 100.0, "RKD": 0.0}, [x, y], total_steps=30)
    terms = {"ArcFace": x.square().sum(), "AT": (x * y).sum(), "RKD": y.sum()}
    assert balance.steps == [0, 9, 19, 29]
    assert balance.measure(terms, 1) == {}
    pulls = balance.measure(terms, 9)
    assert pulls == {"ArcFace": 12.0, "AT": 500.0, "RKD": 0.0}  # 2*2x; 100*|(y, x)|
    assert balance.dominant() == ("AT", pytest.approx(500 / 12))
    balance.measure(terms | {"AT": 0 * terms["AT"]}, 19)  # no longer at every measured step
    assert balance.dominant() is None
    assert x.grad is None and y.grad is None
