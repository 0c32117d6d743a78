"""How much memory a training run will take, reckoned before any weight is loaded.

    model = on_meta(lambda: build_model(cfg))
    plan = MemoryPlan("lavic, stage 1, batch 1")
    plan.add("weights", parameter_bytes(model), f"{count(model):,} parameters in float16")
    plan.add("AdamW", adamw_bytes(trainable), "two float32 moments of each trained parameter")
    print(plan.text(device_memory(), advice=["--batch-size 1", "--amp bf16"]))

A model on the meta device has shapes and types, and no memory. 1 GB is 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

GB = 10**9
# What a process on a GPU holds before its first tensor: context, kernels, libraries' workspaces.
CUDA_CONTEXT = 600_000_000


def on_meta(build: Callable[[], M]) -> M:
    """What `build` makes, with every parameter and buffer on the meta device: shapes alone."""
    with torch.device("meta"):
        return build()


def count(parameters: nn.Module | Iterable[Tensor]) -> int:
    """The number of values in the parameters, those that are shared counted once."""
    return sum(tensor.numel() for tensor in _distinct(parameters))


def parameter_bytes(
    parameters: nn.Module | Iterable[Tensor], dtype: torch.dtype | None = None
) -> int:
    """Bytes of the parameters, and of a module's buffers, each counted once.

    dtype: the type that those of floating point will have; their own when None.
    """
    total = 0
    for tensor in _distinct(parameters, buffers=True):
        kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        total += tensor.numel() * kept.itemsize
    return total


def gradient_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of the gradients: one value, in the parameter's own type, for each that is trained."""
    return sum(p.numel() * p.dtype.itemsize for p in _distinct(parameters) if p.requires_grad)


def adamw_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of AdamW's state: two moments, in its own type, for each parameter that is trained."""
    return 2 * gradient_bytes(parameters)


def device_memory() -> list[tuple[str, int]]:
    """Name and bytes of each visible GPU; empty without any."""
    properties = [
        torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
    ]
    return [(found.name, found.total_memory) for found in properties]


class MemoryPlan:
    """A table of what takes memory on one device, and how each figure was reckoned."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[tuple[str, int, str]] = []

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(num_bytes for _, num_bytes, _ in self.rows)

    def add(self, what: str, num_bytes: int, how: str) -> None:
        """Add a row: what takes the memory, its bytes, and how they were reckoned."""
        self.rows.append((what, num_bytes, how))

    def text(self, devices: Sequence[tuple[str, int]] = (), advice: Sequence[str] = ()) -> str:
        """The table, then whether it fits on each of `devices` (as `device_memory` gives them).

        advice: settings that save most, the best first; said when something does not fit.
        """
        rows = [(what, _gigabytes(size), how) for what, size, how in self.rows]
        rows.append(("in all", _gigabytes(self.total), "of each device"))
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [self.title]
        lines += [f"  {what:<{first}}  {size:>{second}}  {how}" for what, size, how in rows]
        lines += [self._verdict(name, size) for name, size in devices]
        if not devices:
            lines.append("no GPU is visible here: the figures are for one that has the memory")
        if advice and any(size < self.total for _, size in devices):
            lines.append("what helps most: " + "; ".join(advice))
        return "\n".join(lines)

    def _verdict(self, name: str, size: int) -> str:
        left = size - self.total
        said = "fits, with" if left >= 0 else "does not fit: it is short of"
        rest = " to spare" if left >= 0 else ""
        return f"{name}, {_gigabytes(size)}: {said} {_gigabytes(abs(left))}{rest}"


def _distinct(parameters: nn.Module | Iterable[Tensor], *, buffers: bool = False) -> list[Tensor]:
    if isinstance(parameters, nn.Module):
        tensors = list(parameters.parameters()) + (list(parameters.buffers()) if buffers else [])
    else:
        tensors = list(parameters)
    return list({id(tensor): tensor for tensor in tensors}.values())


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / GB:.2f} GB"
