"""ArcFace's class centres: an ordinary head, or sharded over ranks and sampled (Partial FC).

Rank r of w owns a contiguous slice of the classes. Embeddings of all ranks are gathered, each rank
compares them with its own centres, and the softmax's maximum and sums are exchanged, never the
logits: at rate 1 loss and gradients are those of one process. Centres of ranks differ, so they stay
outside DDP, and `Amp.step(…, sharded=…)` clips by the norm over all ranks. With `World()` and rate
1 it is an ordinary head, for DDP to wrap.
Source: An et al. 2022, Partial FC (arXiv:2203.15565); here rows not drawn stay as they are.
N images of all ranks, B of one, D width, C classes, K sub-centres.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared import seed as seeds
from shared.distributed import World, gather_with_grad
from shared.margins import margin_logits_, softmax_loss, unit_rows

_CLASSES_A_DRAW = 1024  # initial centres come from one generator each so many classes


def shard(num_classes: int, rank: int, size: int) -> range:
    """The classes that `rank` of `size` owns: contiguous, as many as the others' or one more."""
    share, rest = divmod(num_classes, size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


class PartialFC(nn.Module):
    """Embeddings and labels → the mean margin-softmax loss of all ranks' images.

    `weight` (rows, D) holds this rank's centres, those of a class next to each other; below rate 1
    those of the classes drawn last. Only their directions enter the loss; their length sets how
    fast the optimizer turns them. With K sub-centres a class's cosine is the largest of its K.
    """

    def __init__(
        self, num_classes: int, width: int, world: World, *, margins: Tensor | float = 0.5,
        scale: float = 64.0, easy_margin: bool = False, sub_centres: int = 1,
        sample_rate: float = 1.0, init_std: float = 0.01, seed: int = 0,
    ) -> None:  # fmt: skip
        """Draw the centres, N(0, init_std²): the same ones for every number of ranks.

        margins: radians, one for all or (C,) for each class; not in the checkpoint.
        sample_rate: share of the classes in a step, above 0. There are no more ranks than classes.
        """
        super().__init__()
        margins = torch.as_tensor(margins, dtype=torch.float64).expand(num_classes)
        self.num_classes, self.sub_centres, self.seed = num_classes, sub_centres, seed
        self.classes = shard(num_classes, world.rank, world.size)
        self.world, self._scale, self._easy = world, scale, easy_margin
        self.margins: Tensor
        own = slice(self.classes.start, self.classes.stop)
        self.register_buffer("margins", margins[own].clone(), persistent=False)
        rows = _initial(self.classes, sub_centres * width, seed).mul_(init_std)
        is_sampled, self.num_drawn = sample_rate < 1, max(1, round(sample_rate * len(rows)))
        drawn = torch.arange(self.num_drawn)  # ascending numbers within the shard
        self.store: Tensor | None  # below rate 1: the centres of all own classes, (classes, K·D)
        self.drawn: Tensor | None  # and whose are in `weight`
        self.register_buffer("store", rows if is_sampled else None, persistent=False)
        self.register_buffer("drawn", drawn if is_sampled else None, persistent=False)
        self.weight = nn.Parameter((rows[drawn] if is_sampled else rows).view(-1, width))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the images of all ranks, computed in float32 (float64 stays).

        embeddings: (B, D) of any length, B the same on every rank. labels: (B,) in 0 … C - 1, of
        which below rate 1 `CentreRows.sample` has drawn the centres.
        With DDP's mean of the backbone's gradients, they are those of one process on all images.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            exact = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            images = gather_with_grad(unit_rows(exact), self.world)
            if self.world.size > 1 and images.requires_grad:
                # Each rank adds what its centres say; DDP will divide the sum by their number.
                images.register_hook(lambda gradient: gradient * self.world.size)
            cosines = images @ unit_rows(self.weight.to(images.dtype)).T
            if self.sub_centres > 1:
                cosines = cosines.unflatten(1, (-1, self.sub_centres)).max(2).values
            columns = own = self.numbers(labels)
            if self.drawn is not None:
                columns = torch.searchsorted(self.drawn, own).where(own >= 0, -1)
            margins = self.margins[own.clamp_min(0)].to(images.dtype)
            logits = margin_logits_(cosines, columns, margins, self._scale, easy=self._easy)
            return softmax_loss(logits, columns, self.world)

    def numbers(self, labels: Tensor) -> Tensor:
        """The classes of all ranks' images within this shard, (N,), -1 for those of other ranks."""
        own = gather_with_grad(labels.long(), self.world) - self.classes.start
        return own.masked_fill((own < 0) | (own >= len(self.classes)), -1)


class CentreRows:
    """The centres' part of a checkpoint, and the one who draws rows below rate 1.

    The optimizer is torch's and holds `weight` alone: rows not drawn get no gradient, decay or
    momentum; Adam's count of steps is common to all. The state is that of all classes.
    """

    def __init__(self, head: PartialFC, optimizer: torch.optim.Optimizer) -> None:
        self._head, self._optimizer = head, optimizer
        self.moments: dict[str, Tensor] = {}  # below rate 1: of all own classes, (classes, K·D)
        self._whole: dict[str, Tensor] | None = None  # rank 0: what a checkpoint is to hold
        optimizer.register_step_post_hook(lambda *_: setattr(self, "_whole", None))

    def sample(self, labels: Tensor, step: int) -> None:
        """Draw the centres of this step; every rank, before the loss. Nothing at rate 1.

        The classes of `labels` (B,) always; the others follow from seed, step and rank alone.
        """
        head = self._head
        if head.store is None:
            return
        self._write_back(head.store)
        own = head.numbers(labels)
        present = own[own >= 0].unique()
        numbers = torch.Generator(own.device)
        numbers.manual_seed(seeds.derive(head.seed, step, head.world.rank))
        ranking = torch.rand(len(head.classes), generator=numbers, device=own.device)
        ranking[present] = 2.0  # above all others
        head.drawn = ranking.topk(max(head.num_drawn, len(present))).indices.sort().values
        head.weight.data = self._of_drawn(head.store)
        for name, moments in self.moments.items():
            self._optimizer.state[head.weight][name] = self._of_drawn(moments)

    def collect(self) -> None:
        """Bring all ranks' rows to rank 0's CPU, for the `state_dict` that follows; every rank."""
        head = self._head
        rows = {"centres": head.weight.detach(), **self._row_state()}
        if head.store is not None:
            self._write_back(head.store)
            rows = {"centres": head.store, **self.moments}
        self._whole = {name: self._to_main(tensor) for name, tensor in rows.items()}

    def state_dict(self) -> dict[str, Any]:
        """Centres and moments (C·K, D), and the rest of the optimizer's state; on rank 0.

        Before the first step its sizes alone. Raises RuntimeError after a step without `collect`.
        """
        whole, state = self._whole, self._optimizer.state_dict()
        if whole is None and state["state"]:
            raise RuntimeError("call collect() on every rank before the centres are saved")
        sizes = dict.fromkeys(("centres", "m", "v"), torch.empty(self._shape, device="meta"))
        whole = dict(whole or sizes)  # as Adam will keep
        others = {n: v for n, v in state["state"].get(0, {}).items() if n not in whole}
        optimizer = {**state, "state": {0: others} if others else {}}
        return {"centres": whole.pop("centres"), "moments": whole, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's rows out of `state`, written by any number of ranks.

        Raises ValueError when their number or width differs.
        """
        head, whole = self._head, {"centres": state["centres"], **state["moments"]}
        if tuple(whole["centres"].shape) != self._shape:
            raise ValueError(f"centres {tuple(whole['centres'].shape)}, {self._shape} expected")
        own = slice(*(end * head.sub_centres for end in (head.classes.start, head.classes.stop)))
        device = head.weight.device  # a view would keep the memory of all the classes
        mine = {name: rows[own].to(device, copy=True) for name, rows in whole.items()}
        if head.store is not None:
            mine = {name: rows.view_as(head.store) for name, rows in mine.items()}
            head.store.copy_(mine["centres"])
            self.moments = {name: rows for name, rows in mine.items() if name != "centres"}
            mine = {name: self._of_drawn(rows) for name, rows in mine.items()}
        head.weight.data.copy_(mine.pop("centres"))
        entries = {**state["optimizer"]["state"].get(0, {}), **mine}
        optimizer = {**state["optimizer"], "state": {0: entries} if entries else {}}
        self._optimizer.load_state_dict(optimizer)
        self._whole = whole

    @property
    def _shape(self) -> tuple[int, int]:
        return self._head.num_classes * self._head.sub_centres, self._head.weight.shape[1]

    def _of_drawn(self, rows: Tensor) -> Tensor:
        return rows[self._head.drawn].view(-1, self._shape[1])

    def _row_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors that have a row for every row of `weight`."""
        weight = self._head.weight
        state = self._optimizer.state.get(weight, {})
        return {n: v for n, v in state.items() if isinstance(v, Tensor) and v.shape == weight.shape}

    def _write_back(self, store: Tensor) -> None:
        """Copy the drawn rows and their moments to where those of all own classes are kept."""
        store[self._head.drawn] = self._head.weight.detach().view(-1, store.shape[1])
        for name, value in self._row_state().items():
            if name not in self.moments:
                self.moments[name] = torch.zeros_like(store)
            self.moments[name][self._head.drawn] = value.view(-1, store.shape[1])

    def _to_main(self, rows: Tensor) -> Tensor:
        """All ranks' `rows`, (C·K, D) on rank 0's CPU; empty elsewhere."""
        head, world, (count, width), place = self._head, self._head.world, self._shape, 0
        rows = rows.reshape(-1, width)
        whole = torch.empty((count if world.is_main else 0, width), dtype=rows.dtype)
        for rank in range(world.size):
            size = len(shard(head.num_classes, rank, world.size)) * head.sub_centres
            part = rows.contiguous() if rank == world.rank else rows.new_empty(size, width)
            if world.size > 1:
                dist.broadcast(part, rank)
            if world.is_main:
                whole[place : place + size] = part
            place += size
        return whole


def _initial(classes: range, width: int, seed: int) -> Tensor:
    """Normal numbers (classes, width), the same for a class however the classes are sharded."""
    blocks, first = [], classes.start // _CLASSES_A_DRAW
    for block in range(first, (classes.stop - 1) // _CLASSES_A_DRAW + 1):
        numbers = torch.Generator().manual_seed(seeds.derive(seed, block))
        blocks.append(torch.randn(_CLASSES_A_DRAW, width, generator=numbers))
    start = classes.start - first * _CLASSES_A_DRAW
    return torch.cat(blocks)[start : start + len(classes)].clone()
