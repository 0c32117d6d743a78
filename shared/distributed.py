"""A `World` for every process, and the few collectives that loops need. One process opens no group.

nccl on CUDA, gloo on the CPU. Every rank must call every function, in the same order.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # pyright: ignore[reportUnusedImport] later, it would keep the group
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from shared import device as devices

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: its number, that on its host, how many there are, its device."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: float = 1800.0  # seconds that a rank waits for the others, or for a loader worker
    store: Store | None = None  # where the ranks leave word for each other; None for one process

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and log lines for all."""
        return self.rank == 0


def setup(
    device: str = "auto", timeout: float = 1800.0, environ: Mapping[str, str] = os.environ
) -> World:
    """This process's World; opens the process group when there are several processes.

    timeout: seconds that a rank waits for the others before it gives up.
    Raises UserError for a device that cannot be used.
    """
    rank, size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    local_rank = int(environ.get("LOCAL_RANK", rank))
    chosen = devices.resolve(device, local_rank, environ)
    if size == 1:
        return World(rank, local_rank, size, chosen, timeout)
    on_cuda, wait = chosen.type == "cuda", datetime.timedelta(seconds=timeout)
    store = _meeting_place(environ, rank, size, wait)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=wait,
        device_id=chosen if on_cuda else None,
    )
    return World(rank, local_rank, size, chosen, timeout, store)


def _meeting_place(
    environ: Mapping[str, str], rank: int, size: int, wait: datetime.timedelta
) -> Store:
    """The store by which the processes of this start find each other.

    The agent of a `torchrun --standalone --max-restarts N` keeps one store for all its starts. In
    it the processes of the second start would find the addresses of the dead ones, and wait for
    them (pytorch#135712), so each start keeps its addresses under a name of its own. With several
    hosts each agent counts its own restarts, and no such name is common to all: there, torchrun
    needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which the launcher sets.
    """
    store, _, _ = next(rendezvous("env://", rank, size, timeout=wait))
    store.set_timeout(wait)
    shares_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and environ.get("GROUP_WORLD_SIZE") == "1":
        return PrefixStore(f"start {environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def cleanup(world: World) -> None:
    """Close the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, world: World, **options: Any) -> nn.Module:
    """`model` under DistributedDataParallel, or as it is when there is one process."""
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, **options)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while True:
        inner = (
            getattr(model, "module", None) if isinstance(model, DistributedDataParallel) else None
        )
        inner = inner or getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def total(values: Tensor, world: World) -> Tensor:
    """The element-wise sum of `values` over the ranks; float or integer, any shape."""
    if world.size > 1:
        values = values.detach().clone().to(world.device)
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values.detach()


def mean(values: Tensor, world: World) -> Tensor:
    """The element-wise mean of floating-point `values` over the ranks."""
    return total(values, world) / world.size


def mean_of(values: Mapping[str, float | Tensor], world: World) -> dict[str, float]:
    """The means of named scalars over the ranks, in one exchange; here the device is waited for."""
    numbers = [
        torch.as_tensor(value).detach().to(world.device, torch.float64) for value in values.values()
    ]
    return dict(zip(values, mean(torch.stack(numbers), world).tolist(), strict=True))


def norm(part: Tensor | None, world: World) -> Tensor:
    """The length of a vector whose parts lie on the ranks (None: no part); a scalar."""
    squares = torch.zeros((), device=world.device) if part is None else part.square().sum()
    return total(squares, world).sqrt()


def largest(number: int, world: World) -> int:
    """The largest of the ranks' numbers."""
    if world.size == 1:
        return number
    shared = torch.tensor(number, dtype=torch.int64, device=world.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())


def any_rank(flag: bool, world: World) -> bool:
    """Whether `flag` is true on at least one rank."""
    return bool(largest(int(flag), world))


def tell_all(flag: bool, world: World) -> bool:
    """Whether `flag` is, or was, true on a rank; nobody waits, so each may hear at another moment.

    No collective: for loops that the ranks go through in their own time. Once true, always true.
    """
    if world.store is None:
        return flag
    if flag:
        world.store.set("told", "")
    return flag or world.store.check(["told"])


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    largest(0, world)


def broadcast_object(value: T, world: World) -> T:
    """Rank 0's `value` on every rank (plain Python objects)."""
    if world.size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def gather_objects(value: T, world: World) -> list[T]:
    """The ranks' values, by rank, on every rank (plain Python objects)."""
    if world.size == 1:
        return [value]
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value)
    return found


class _GatherWithGrad(torch.autograd.Function):
    """all_gather whose backward adds up what every rank's loss says of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.rows = local.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # not ours to change
        dist.all_reduce(gradient, op=dist.ReduceOp.SUM)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def gather_with_grad(local: Tensor, world: World) -> Tensor:
    """The rows of every rank, by rank: (B, …) each → (world · B, …), differentiable.

    B must be the same on every rank (make_loader's drop_last sees to it; gloo aborts otherwise).
    When every rank takes the same loss of the result and DDP averages the gradients, they are those
    of one process on the whole batch: the sum over ranks here, the mean over ranks there.
    """
    return _GatherWithGrad.apply(local) if world.size > 1 else local  # type: ignore[return-value]
