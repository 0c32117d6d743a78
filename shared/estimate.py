"""How much memory a training run will take, reckoned before any weight is loaded.

    model = on_meta(lambda: build_model(cfg))
    plan = MemoryPlan("lavic, stage 1, batch 1")
    plan.add("weights", parameter_bytes(model), f"{count(model):,} parameters in float16")
    plan.add("AdamW", adamw_bytes(trainable), "two float32 moments of each trained parameter")
    print(plan.text(device_memory(), advice=["--batch-size 1", "--amp bf16"]))

A model on the meta device has shapes and types, and no memory. 1 GB is 10^9 bytes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from shared.errors import is_out_of_memory

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

GB = 10**9
# What a process on a GPU holds before its first tensor: context, kernels, libraries' workspaces.
CUDA_CONTEXT = 600_000_000
_WORTH = 5_000_000  # bytes that advice has to save


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


def saved_bytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that `forward` keeps for the backward pass, beside the parameters of `module`.

    Exact for what runs on the meta device as it would elsewhere; attention counts as the fused
    kernels keep it: queries, keys, values, output and one number a row.
    """
    own = {tensor.untyped_storage()._cdata for tensor in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    fused = "torch.nn.functional.scaled_dot_product_attention"
    with saved_tensors_hooks(keep, lambda tensor: tensor), mock.patch(fused, _fused_attention):
        result = forward()  # alive until all is counted
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    del result
    return total


def saved_bytes_in_half(
    build: Callable[[], M], forward: Callable[[M], Any], dtype: torch.dtype
) -> int:
    """The same under autocast to `dtype`: with the half copies of weights that autocast keeps.

    forward: of what `build` makes, on inputs that it makes on the CPU. Neither takes memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, rarely needed

    module = on_meta(build)
    # tensors without memory that autocast takes for the CPU's
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = module.to_empty(device="cpu")
        with torch.autocast("cpu", dtype=dtype):
            return saved_bytes(module, lambda: forward(module))


class _FusedAttention(torch.autograd.Function):
    """What a fused attention keeps; its values are of no interest."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]).float())
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise NotImplementedError("it stands for its memory alone")


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _FusedAttention.apply(query, key, value)  # type: ignore[no-any-return]


@contextlib.contextmanager
def explained_out_of_memory(reckon: Callable[[], str]) -> Iterator[None]:
    """Log the plan and advice that `reckon` gives when the block ends for want of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            try:
                log.error("out of memory; what --estimate says of this run:\n%s", reckon())
            except Exception as problem:  # the first error is the one that counts
                log.warning("no memory plan: %s", problem)
        raise


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

    def advised(self, alternatives: Mapping[str, MemoryPlan]) -> list[str]:
        """The three settings that save most, with what they save.

        alternatives: the plan under each setting, as the user would type it.
        """
        saved = {setting: self.total - other.total for setting, other in alternatives.items()}
        best = sorted(saved, key=lambda setting: -saved[setting])[:3]
        return [
            f"{name} (saves {_gigabytes(saved[name])})" for name in best if saved[name] >= _WORTH
        ]

    def text(self, devices: Sequence[tuple[str, int]] = (), advice: Sequence[str] = ()) -> str:
        """The table, then whether it fits on each of `devices` (as `device_memory` gives them).

        advice: settings that save most, the best first.
        """
        rows = [(what, _gigabytes(size), how) for what, size, how in self.rows]
        rows.append(("in all", _gigabytes(self.total), "of each device"))
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [self.title]
        lines += [f"  {what:<{first}}  {size:>{second}}  {how}" for what, size, how in rows]
        lines += [self._verdict(name, size) for name, size in devices]
        if not devices:
            lines.append("no GPU is visible here: the figures are for one that has the memory")
        if advice:
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
