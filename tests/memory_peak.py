"""The memory that a training of these tests held, as torch's profiler saw it on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile, record_function

from shared.amp import Amp
from tests.harness import run_here

_MARK = "the first step is over"


class _EnoughError(Exception):
    """The step that was to be measured is over."""


class Peak(NamedTuple):
    """The most bytes that a step held, and what the run wrote."""

    num_bytes: int
    text: str


def peak_of_a_step(main: Callable[[list[str]], int], flags: Sequence[object]) -> Peak:
    """What the training of `flags` held at the peak of its second step, on the CPU.

    What was alive at the end of its first optimizer step, and what torch's profiler says of every
    block of memory from there to the end of the second. Dropout keeps a byte of each value, as on a
    GPU.
    """
    before, alive = _alive(), list[int]()
    original = Amp.step

    def step(self: Amp, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float:
        norm = original(self, optimizer, *args, **kwargs)
        if any(
            isinstance(p, FakeTensor) for group in optimizer.param_groups for p in group["params"]
        ):
            return norm  # of an estimate, which --fit makes first
        if alive:
            raise _EnoughError
        alive.append(_alive() - before)
        with record_function(_MARK):
            return norm

    with (
        mock.patch.object(Amp, "step", step),
        mock.patch("torch.nn.functional.dropout", _dropout),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        outcome = run_here(main, flags)
    assert "_EnoughError" in outcome.text, outcome.text
    return Peak(alive[0] + _peak_above_mark(profiler), outcome.text)


def _dropout(values: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return torch.native_dropout(values, p, True)[0] if training and p else values


def _alive() -> int:
    """Bytes of the tensors there are, without those that processes share."""
    gc.collect()
    kinds = ((found, type(found)) for found in gc.get_objects())
    tensors = [t for t, kind in kinds if issubclass(kind, torch.Tensor) and kind is not FakeTensor]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(one.nbytes() for one in storages.values() if not one.is_shared())


def _peak_above_mark(profiler: profile) -> int:
    """The most bytes that were held after the mark, above those that were held at it."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    mark = next(event.start_ns() for event in events if event.name() == _MARK)
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = most = 0
    for _, num_bytes in sorted(change for change in changes if change[0] > mark):
        held += num_bytes
        most = max(most, held)
    return most
