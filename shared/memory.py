"""The memory that a training takes, found without its weights, its data and a GPU: `--estimate`.

    with counted() as live:                      # tensors have shapes here, and no values
        model = build_model()                    # the recipe's own
        optimizer = torch.optim.AdamW(model.parameters())
        images = torch.empty(32, 3, 224, 224)
        live.begin(model, optimizer)
        loss_of(model, images).backward()        # the recipe's own step
        optimizer.step()
    found = live.plan("recipe, batch 32", "32 images", wrapped=model, processes=4)
    print(report(found, {"--batch-size 16": other_plan}))

Every storage that comes into being is counted until it goes. So the peak is that of the step as it
is written, with its precision, its checkpointing and its optimizer. 1 GB is 10^9 bytes, 1 MB 10^6.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.errors import is_out_of_memory

log = logging.getLogger(__name__)

GB = 10**9
# What a process on a GPU holds before its first tensor: context, kernels, libraries' workspaces.
CUDA_CONTEXT = 600_000_000
CPU = torch.device("cpu")  # where an estimate computes; the sizes are those of any device
_WORTH = 5_000_000  # bytes that advice has to save
_KINDS = ("weights", "gradients", "optimizer", "activations")


@contextlib.contextmanager
def counted() -> Iterator[LiveBytes]:
    """Count the tensors of the block; see the module."""
    with (
        mock.patch("torch.nn.functional.dropout", _dropout),
        mock.patch("torch.nn.Module._apply", _apply),
        LiveBytes() as live,
    ):
        yield live


class LiveBytes(TorchDispatchMode):
    """The bytes of the tensors that are alive, by kind, at their peak.

    Tensors made under it are fake: they take no memory, and each reads as zero. Tensors that are
    made of given numbers (`torch.tensor`) and what is computed of these alone keep their values,
    so that masks of token ids pick the rows that they pick in the training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak: Counter[str] = Counter()
        self.num_parameters = self.num_trained = 0
        self.optimizers = ""
        self._now: Counter[str] = Counter()
        self._records: Any = weakref.WeakKeyDictionary()  # storage → [kind, bytes]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def begin(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """The step begins: `model` is there, and `optimizers` have taken steps before.

        The optimizers will work as on a GPU, on all their parameters at once.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.num_trained = sum(parameter.numel() for parameter in trained)
        self.optimizers = " and ".join({type(one).__name__: None for one in optimizers})
        self.count_as("weights", [*model.parameters(), *model.buffers()])
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["foreach"] = not group.get("fused")
            optimizer.step()
            optimizer.zero_grad()
            self.count_as("optimizer", tree_leaves(list(optimizer.state.values())))
        for parameter in trained:
            parameter.grad = None
            parameter.register_post_accumulate_grad_hook(self._has_gradient)
        self.peak = self._now.copy()

    def plan(
        self, title: str, activations: str, *, wrapped: nn.Module | None, processes: int
    ) -> Plan:
        """The peak as a table, with what each of `processes` on GPUs holds beside it.

        activations: what they are of. wrapped: what DistributedDataParallel wraps, if anything.
        """
        trained = f"{_millions(self.num_trained)} of them trained"
        if self.num_trained == self.num_parameters:
            trained = "all trained"
        notes = {
            "weights": f"{_millions(self.num_parameters)} parameters, {trained}",
            "gradients": "those that are there at the peak of a step",
            "optimizer": f"the state of {self.optimizers}",
            "activations": activations,
        }
        found = Plan(title)
        for kind in _KINDS:
            found.add(kind, self.peak[kind], notes[kind])
        if processes > 1 and wrapped is not None:
            found.add("DDP", gradient_bytes(wrapped), "its buckets, as large as the gradients")
        found.add("CUDA", CUDA_CONTEXT, "context, kernels, workspaces")
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What `func` gives: real where all that it is given is real, else fake and counted."""
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return given[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=given[0].dtype).item()
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _numbers(args[1]))
        if "generator" in kwargs:
            kwargs = {**kwargs, "generator": None}  # no values are drawn
        made = self._fake.__torch_dispatch__(func, types, args, kwargs)
        for tensor in _tensors(made if isinstance(made, tuple | list) else (made,)):
            if isinstance(tensor, FakeTensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, unless it is counted."""
        if storage in self._records:
            return
        record = self._records[storage] = ["activations", storage.nbytes()]
        weakref.finalize(storage, self._release, record).atexit = False
        self._now[record[0]] += record[1]
        if self._now.total() > self.peak.total():
            self.peak = self._now.copy()

    def _release(self, record: list[Any]) -> None:
        self._now[record[0]] -= record[1]

    def count_as(self, kind: str, tensors: Iterable[Any]) -> None:
        """Count these tensors as `kind` from here on."""
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                record = self._records[tensor.untyped_storage()]
                self._release(record)
                record[0] = kind
                self._now[kind] += record[1]

    def _has_gradient(self, parameter: Tensor) -> None:
        self.count_as("gradients", [parameter.grad])


def _tensors(values: Iterable[Any]) -> Iterator[Any]:
    """The tensors among `values`, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _numbers(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks of known values as the numbers of what they pick."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or isinstance(index, FakeTensor) or index.dtype is not torch.bool:
            found.append(index)
        else:
            found += index.nonzero().unbind(1)
    return found


def _dropout(
    values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Dropout as on a GPU, where it keeps a byte a value; on a CPU it keeps a number."""
    return torch.native_dropout(values, p, True)[0] if training and p else values


def _apply(
    module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """`Module.to` in place; torch's own refuses fake parameters."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = convert(tensor.detach())
    return module


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of all gradients of a model."""
    return sum(p.numel() * p.dtype.itemsize for p in model.parameters() if p.requires_grad)


def mode_of(amp: str) -> str:
    """The mode for `Amp` in an estimate of --amp: half precision has one size."""
    return "off" if amp == "off" else "bf16"


class Plan:
    """A table of what takes memory on one device, and what each figure is of."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[tuple[str, int, str]] = []

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(num_bytes for _, num_bytes, _ in self.rows)

    def add(self, what: str, num_bytes: int, how: str) -> None:
        """Add a row: what takes the memory, its bytes, and what they are of."""
        self.rows.append((what, num_bytes, how))

    def advice(self, others: Mapping[str, Plan], exact: str = "") -> list[str]:
        """The three settings that save most, with what they save, the best first.

        others: the plan under each setting, as the user would type it. exact: the one of them that
        changes no number of the training; it comes before the others.
        """
        saved = {setting: self.total - other.total for setting, other in others.items()}
        best = sorted(saved, key=lambda setting: (setting != exact, -saved[setting]))[:3]
        return [f"{s} (saves {_size(saved[s])})" for s in best if saved[s] >= _WORTH]

    def text(self, devices: Sequence[tuple[str, int]] = (), advice: Sequence[str] = ()) -> str:
        """The table, then whether it fits on each of `devices` (name and bytes).

        advice: settings that save most, the best first.
        """
        rows = [(what, _size(size), how) for what, size, how in self.rows]
        rows.append(("in all", _size(self.total), "of each device"))
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
        return f"{name}, {_size(size)}: {said} {_size(abs(left))}{rest}"


def report(plan: Plan, others: Mapping[str, Plan], exact: str = "") -> str:
    """The table of `plan`, whether it fits on the GPUs here, and what helps most of `others`.

    exact: as of `Plan.advice`.
    """
    return plan.text(devices(), plan.advice(others, exact))


def devices() -> list[tuple[str, int]]:
    """Name and bytes of each visible GPU; empty without any."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [(device.name, device.total_memory) for device in found]


@contextlib.contextmanager
def explained_out_of_memory(estimate: Callable[[], str]) -> Iterator[None]:
    """Log what `estimate` says when the block ends for want of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            try:
                log.error("out of memory; what --estimate says of this run:\n%s", estimate())
            except Exception as problem:  # the first error is the one that counts
                log.warning("no memory plan: %s", problem)
        raise


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GB:.2f} GB" if num_bytes >= GB // 10 else f"{num_bytes / 1e6:.1f} MB"


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number < 1e8 else f"{number / 1e6:,.0f} M"
