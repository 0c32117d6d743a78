"""Rows that several ranks have computed, by index: joined in order, each taken once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shared import distributed
from shared.distributed import World
from shared.errors import UserError


def gather_rows(local_rows: Tensor, local_indices: Tensor, total: int, world: World) -> Tensor:
    """The `total` rows that the ranks have computed, by index, on every rank: (total, …).

    local_rows: (n, …) of this rank; n may differ. local_indices: (n,) their places. A row that came
    twice (a sampler's padding) is taken once, from the lowest rank. The result lies where
    local_rows lies; beside it, memory holds one rank's rows.
    Raises UserError on every rank when a row is missing; ValueError for rows that do not fit.
    """
    local_rows, indices = local_rows.detach(), local_indices.cpu()
    layout = (tuple(local_rows.shape), local_rows.dtype)
    everyone = distributed.gather_objects((layout, indices), world)
    shape, dtype = _common_layout([(*own, len(places)) for own, places in everyone])
    shares = [places for _, places in everyone]
    kept = first_occurrences(shares, total, "row")
    result = torch.empty(total, *shape, dtype=dtype, device=local_rows.device)
    for rank, (places, first) in enumerate(zip(shares, kept, strict=True)):
        if rank == world.rank:
            part = local_rows[first.to(local_rows.device)].to(world.device)
        else:
            part = torch.empty(int(first.sum()), *shape, dtype=dtype, device=world.device)
        if world.size > 1 and len(part):
            dist.broadcast(part, src=rank)
        result[places[first].to(result.device)] = part.to(result.device)
    return result


def _common_layout(
    layouts: Sequence[tuple[tuple[int, ...], torch.dtype, int]],
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape of one row and dtype, which all ranks that have rows must share."""
    for shape, _, num_indices in layouts:
        if not shape or shape[0] != num_indices:
            raise ValueError(f"rows of shape {shape} come with {num_indices} indices")
    found = {(shape[1:], dtype) for shape, dtype, num in layouts if num}
    if len(found) > 1:
        raise ValueError(f"the ranks' rows differ in shape or dtype: {sorted(map(str, found))}")
    return found.pop() if found else (layouts[0][0][1:], layouts[0][1])


def first_occurrences(shares: Sequence[Tensor], total: int, name: str) -> list[Tensor]:
    """For each share's numbers which of them occur there for the first time of all, bool.

    Raises UserError unless every number below `total` occurs, ValueError for one outside.
    """
    numbers = torch.cat([share.long() for share in shares])
    outside = numbers[(numbers < 0) | (numbers >= total)].tolist()
    if outside:
        raise ValueError(f"{name} number {first_few(outside)} is outside 0 to {total - 1}")
    places = torch.arange(len(numbers))
    first = torch.full((total,), len(numbers)).scatter_reduce(0, numbers, places, "amin")
    missing = (first == len(numbers)).nonzero().flatten().tolist()
    if missing:
        raise UserError(
            f"{len(missing)} of {total} are on no rank ({name} {first_few(missing)}): every sample "
            "must be computed; look for samples that the loader left out"
        )
    return list((first[numbers] == places).split([len(share) for share in shares]))


def first_few(numbers: Sequence[int]) -> str:
    """The first five of the numbers, and how many more there are."""
    shown = ", ".join(str(number) for number in numbers[:5])
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"
