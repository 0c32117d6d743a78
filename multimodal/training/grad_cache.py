"""Gradients of one large batch, in the memory of a small one.

A contrastive loss couples all samples, so the gradients of its chunks do not add up to those of the
whole. Here every chunk is encoded without a graph, the loss of all outputs together gives the
gradient of each output, and every chunk is encoded once more to carry these back. Exact, also with
dropout: the second pass draws the random numbers of the first.
Source: Gao et al. 2021 (arXiv:2101.06983), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared import distributed
from shared.amp import Amp

Chunk = tuple[Any, ...]  # what the encoder is called with
Outputs = dict[str, Tensor]  # rows of the chunk, or a scalar that no chunk changes (a temperature)
LossOf = Callable[[Outputs], Tensor]


def backward(
    encode: nn.Module, chunks: Sequence[Chunk], loss_of: LossOf, amp: Amp
) -> tuple[Tensor, Outputs]:
    """The loss of all chunks as one batch, and their outputs; gradients are added to `encode`'s.

    encode: called with a chunk's values, gives Outputs; under DDP the gradients are averaged once,
    with the last chunk. loss_of: a scalar from the Outputs of the whole batch; it sees detached
    leaves when there are several chunks. fp16: the scaler's factor comes in once, by that loss.
    """
    if len(chunks) == 1:
        with amp.autocast():
            outputs = encode(*chunks[0])
        loss = loss_of(outputs)
        amp.backward(loss)
        return loss.detach(), _detached(outputs)
    states, parts = [], []
    plain = distributed.unwrap(encode)
    for chunk in chunks:
        states.append(_generators())
        with torch.no_grad(), amp.autocast():  # one autocast a chunk: it caches casts without graph
            parts.append(plain(*chunk))
    leaves = {name: _joined(name, parts).requires_grad_() for name in parts[0]}
    loss = loss_of(leaves)
    amp.backward(loss)
    rows = 0
    for number, chunk in enumerate(chunks):
        is_last = number == len(chunks) - 1
        with _generators_at(states[number]), nullcontext() if is_last else _alone(encode):
            with amp.autocast():
                outputs = encode(*chunk)
            rows = _carry_back(outputs, leaves, rows, is_last=is_last)
    return loss.detach(), _detached(leaves)


def _joined(name: str, parts: list[Outputs]) -> Tensor:
    first = parts[0][name]
    return (first if first.ndim == 0 else torch.cat([part[name] for part in parts])).detach()


def _carry_back(outputs: Outputs, leaves: Outputs, start: int, *, is_last: bool) -> int:
    """Add the cached gradients of this chunk's rows to the parameters; the first row after them."""
    end = start
    tensors, gradients = [], []
    for name, output in outputs.items():
        gradient = leaves[name].grad
        if output.ndim == 0 and not is_last:
            continue  # the same scalar in every chunk: its gradient counts once
        if output.ndim:
            end = start + len(output)
        if gradient is None:
            gradient = torch.zeros_like(leaves[name])
        tensors.append(output)
        gradients.append(gradient[start:end] if output.ndim else gradient)
    torch.autograd.backward(tensors, gradients)
    return end


def _detached(outputs: Outputs) -> Outputs:
    return {name: output.detach() for name, output in outputs.items()}


def _alone(encode: nn.Module) -> AbstractContextManager[Any]:
    """Gradients stay on this process until the last chunk."""
    return encode.no_sync() if isinstance(encode, DistributedDataParallel) else nullcontext()


def _generators() -> tuple[Tensor, Tensor | None]:
    """The states that dropout draws from."""
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_cuda else None


@contextmanager
def _generators_at(state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Draw from `state` on; what follows the block continues from where the block ends."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
    yield
