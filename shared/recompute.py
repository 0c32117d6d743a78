"""Gradient checkpointing of blocks, whose batch norms count each batch once all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Have each block keep its input alone in training, and compute the rest again: same gradients.

    Names and values of the state dict stay as they are.
    """
    for block in blocks:
        block.forward = partial(_computed_twice, block, block.forward)


def _computed_twice(
    block: nn.Module, forward: Callable[..., Any], *inputs: Any, **more: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **more)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), _counted_before(block)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **more)


@contextmanager
def _counted_before(block: nn.Module) -> Iterator[None]:
    """Running statistics stay as the first pass has left them.

    With none at all, torch would keep fewer tensors than in the first pass, and refuse.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in before:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
