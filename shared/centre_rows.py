"""The rows of sharded class centres: which of them take part in a step, and all in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared.class_centres import ClassCentres, shard

_BYTES_A_MESSAGE = 1 << 26


class CentreRows:
    """The centres' part of a checkpoint, and the one who draws rows below rate 1.

    The optimizer is torch's own and holds `weight` alone: it sees only the drawn rows and their
    moments, so the others get no gradient, weight decay or momentum. A count of steps, as Adam's,
    is common to all rows. The state is that of all classes in order, whatever the number of ranks.
    """

    def __init__(self, centres: ClassCentres, optimizer: torch.optim.Optimizer) -> None:
        """Take over `optimizer`. Raises ValueError when it holds anything beside the centres."""
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if len(held) != 1 or held[0] is not centres.weight:
            raise ValueError(
                "the centres need an optimizer of their own: SGD(centres.parameters())"
            )
        self._centres, self._optimizer, self._world = centres, optimizer, centres.world
        self._moments: dict[str, Tensor] = {}  # below rate 1: of all own classes, (classes, K·D)
        self._collected: dict[str, Any] | None = None
        self._has_stepped = False
        optimizer.register_step_post_hook(lambda *_: self._forget())

    @property
    def moments(self) -> list[Tensor]:
        """Below rate 1: the optimizer's moments of all own classes, (classes, K·D) each."""
        return list(self._moments.values())

    def sample(self, labels: Tensor, step: int) -> None:
        """Draw the centres that take part in this step; every rank, before the loss.

        labels: (B,), with accumulation those of all the step's images. Nothing at rate 1.
        Raises RuntimeError between a backward pass and its optimizer step.
        """
        centres = self._centres
        if centres.store is None:
            return
        if centres.weight.grad is not None:
            raise RuntimeError("sample() between a backward pass and its optimizer step")
        self._write_back()
        centres.draw(centres.gathered(labels), step)
        self._fetch_moments()

    def collect(self) -> None:
        """Bring all ranks' rows to rank 0's CPU, for the `state_dict` that follows; every rank."""
        centres = self._centres
        self._write_back()
        rows = {"": centres.weight.detach() if centres.store is None else centres.store}
        rows |= self._moments if centres.store is not None else self._row_state()
        gathered = {name: self._to_main(tensor) for name, tensor in rows.items()}
        if not self._world.is_main:
            return
        self._collected = {"centres": gathered.pop(""), "optimizer": self._optimizer.state_dict()}
        state = self._collected["optimizer"]["state"]
        if state:
            state[0] = {**state[0], **gathered}

    def state_dict(self) -> dict[str, Any]:
        """Centres (C·K, D) and the optimizer's state for them, on rank 0; what `collect` left.

        Before the first step it may be asked without, for its size, and is then without content.
        Raises RuntimeError after a step that no `collect` followed.
        """
        if self._world.size == 1:
            self.collect()
        if self._collected is not None:
            return self._collected
        if self._has_stepped:
            raise RuntimeError("call collect() on every rank before the centres are saved")
        shape = (self._centres.num_classes * self._centres.sub_centres, self._width)
        names = list(self._row_state()) or ["first moment", "second moment"]  # as Adam will keep
        sizes = {name: torch.empty(shape, device="meta") for name in names}
        return {"centres": torch.empty(shape, device="meta"), "optimizer": {"state": {0: sizes}}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's rows out of `state`, written by any number of ranks.

        Raises ValueError when classes, sub-centres or width differ.
        """
        centres = self._centres
        shape = (centres.num_classes * centres.sub_centres, self._width)
        found = state["centres"]
        if found.is_meta or tuple(found.shape) != shape:
            raise ValueError(f"centres {tuple(found.shape)} on {found.device}, {shape} expected")
        with torch.no_grad():
            if centres.store is None:
                centres.weight.copy_(self._own(found))
            else:
                centres.store.copy_(self._own(found).view_as(centres.store))
                centres.weight.copy_(centres.store[centres.drawn].view_as(centres.weight))
        self._load_optimizer(state["optimizer"], shape)
        self._forget()
        self._has_stepped = False

    def _load_optimizer(self, state: dict[str, Any], shape: tuple[int, ...]) -> None:
        entries, store = dict(state["state"].get(0, {})), self._centres.store
        rows = {
            # a copy: a view would keep the memory of all the classes
            name: self._own(value).to(self._centres.weight.device, copy=True)
            for name, value in entries.items()
            if isinstance(value, Tensor) and tuple(value.shape) == shape
        }
        if store is not None:
            self._moments = {name: value.view_as(store) for name, value in rows.items()}
            rows = {name: self._of_drawn(moments) for name, moments in self._moments.items()}
        entries |= rows
        states = {0: entries} if state["state"] else {}
        self._optimizer.load_state_dict({**state, "state": states})

    @property
    def _width(self) -> int:
        return self._centres.weight.shape[1]

    def _own(self, rows: Tensor) -> Tensor:
        classes, per_class = self._centres.classes, self._centres.sub_centres
        return rows[classes.start * per_class : classes.stop * per_class]

    def _of_drawn(self, rows: Tensor) -> Tensor:
        return rows[self._centres.drawn].view_as(self._centres.weight)

    def _row_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors that have a row for every row of `weight`."""
        weight = self._centres.weight
        state = self._optimizer.state.get(weight, {})
        return {
            name: value
            for name, value in state.items()
            if isinstance(value, Tensor) and value.shape == weight.shape
        }

    def _write_back(self) -> None:
        centres = self._centres
        centres.write_back()
        if centres.store is None:
            return
        for name, value in self._row_state().items():
            if name not in self._moments:
                self._moments[name] = torch.zeros_like(centres.store)
            self._moments[name][centres.drawn] = value.view(len(value) // centres.sub_centres, -1)

    def _fetch_moments(self) -> None:
        for name, rows in self._moments.items():
            self._optimizer.state[self._centres.weight][name] = self._of_drawn(rows)

    def _forget(self) -> None:
        """What was collected is out of date: let its memory go."""
        self._collected, self._has_stepped = None, True

    def _to_main(self, rows: Tensor) -> Tensor | None:
        """All ranks' `rows`, (C·K, D) on rank 0's CPU, in bounded messages; None elsewhere."""
        rows = rows.reshape(-1, self._width)
        step = max(1, _BYTES_A_MESSAGE // (self._width * rows.element_size()))
        if not self._world.is_main:
            for part in rows.split(step):
                dist.send(part.contiguous(), dst=0)
            return None
        centres, size = self._centres, self._world.size
        whole = torch.empty(
            centres.num_classes * centres.sub_centres, self._width, dtype=rows.dtype
        )
        whole[: len(rows)] = rows
        for source in range(1, size):
            classes = shard(centres.num_classes, source, size)
            first, last = (end * centres.sub_centres for end in (classes.start, classes.stop))
            for part in whole[first:last].split(step):
                received = torch.empty_like(part, device=rows.device)
                dist.recv(received, src=source)
                part.copy_(received)
        return whole
