"""Blocks that are computed again: same gradients, and batch norms that count each batch once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

from shared.recompute import recompute


def step(change: Callable[[nn.Module], None], momentum: float | None = 0.1) -> dict[str, Tensor]:
    """Gradients and buffers after a step in float64."""
    torch.manual_seed(0)
    net = resnet18(num_classes=3).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    change(net)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    nn.functional.cross_entropy(net(images), torch.tensor([0, 1, 2, 0])).backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert len(gradients) == 62
    return gradients | dict(net.named_buffers())


def in_blocks(net: nn.Module) -> None:
    recompute(module for module in net.modules() if isinstance(module, BasicBlock))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_gradients_and_running_statistics_are_those_of_one_pass(momentum: float | None) -> None:
    plain, again = step(lambda net: None, momentum), step(in_blocks, momentum)
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-10, atol=0)
    assert again["layer1.0.bn1.num_batches_tracked"] == 1  # torch's own checkpointing: 2


def test_nothing_is_kept_where_no_gradients_are_asked_for_and_names_stay() -> None:
    net = resnet18().eval()
    names, image = list(net.state_dict()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = net(image)
        in_blocks(net)
        assert torch.equal(net(image), before)
    assert list(net.state_dict()) == names
