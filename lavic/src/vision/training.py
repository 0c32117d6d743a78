"""What both training loops keep beside model and optimizer: sums, best epoch, the data's mark."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared import distributed, prove
from shared.config import RunOptions
from shared.distributed import World
from shared.errors import UserError
from shared.images import Skipped

if TYPE_CHECKING:
    from lavic.src.vision.captions import Step


def sum_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Add up the processes' gradients, in one exchange; a process without any adds zeros.

    DDP in its place would hang waiting for a process whose samples were all left out, and divide
    by the number of processes in place of the number of labels.
    """
    if world.size == 1:
        return
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    everyone = distributed.total(torch.cat([gradient.flatten() for gradient in own]), world)
    parts = everyone.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


@torch.no_grad()
def mean_nll(
    steps: Iterable[Step], nll_of: Callable[[Any], Tensor], world: World, skipped: Skipped
) -> tuple[float, int]:
    """(mean loss of a label, labels) over the steps of all ranks; the same on each.

    steps: of this rank. nll_of: a batch's loss, summed over its labels. Raises UserError when not
    one sample could be used.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)  # of losses, of labels
    for step in steps:
        for name, reason in step.left_out:
            skipped.add(name, reason)
        for batch in step.batches:
            totals[0] += nll_of(batch)
            totals[1] += batch.num_labels
    loss, labels = distributed.total(totals, world).tolist()
    if not labels:
        raise UserError("no validation sample could be used: see the reasons above")
    return loss / labels, round(labels)


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats; infinite where that says nothing any more."""
    return math.exp(loss) if loss < 20 else math.inf


class Sums:
    """Of an epoch's samples that this process has seen: losses, labels, samples, those left out."""

    def __init__(self, world: World) -> None:
        self._world, self._device = world, world.device
        self.reset()

    def reset(self) -> None:
        """Begin an epoch."""
        self._nll = torch.zeros((), dtype=torch.float64, device=self._device)
        self._labels = self.seen = self.left_out = 0.0

    def add(self, nll: Tensor, *, labels: int, used: int, left_out: int) -> None:
        """Count a step whose labels' losses sum up to `nll`, a scalar on the device."""
        self._nll += nll
        self._labels += labels
        self.left_out += left_out
        self.seen += used + left_out

    def collect(self) -> None:
        """Let every process hold an equal share: rank 0's state is saved for all."""
        self._set(distributed.mean(self._all(), self._world))

    def conclude(self) -> tuple[float, int, int]:
        """(mean loss of a label, samples seen, samples left out) over all processes; resets."""
        nll, labels, seen, left_out = distributed.total(self._all(), self._world).tolist()
        self.reset()
        return nll / labels if labels else math.nan, round(seen), round(left_out)

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return {"sums": self._all().cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._set(state["sums"].to(self._device))

    def _all(self) -> Tensor:
        counts = [self._labels, self.seen, self.left_out]
        rest = torch.tensor(counts, dtype=torch.float64, device=self._device)
        return torch.cat([self._nll[None], rest])

    def _set(self, sums: Tensor) -> None:
        self._nll = sums[0].clone()
        self._labels, self.seen, self.left_out = sums[1:].tolist()


class Best:
    """The lowest validation loss so far, its epoch from 1 (0: none), and the figure before."""

    def __init__(self) -> None:
        self.loss, self.epoch = math.inf, 0
        self.before: float | None = None

    def update(self, loss: float, epoch: int) -> bool:
        """Whether `loss` is lower than all before it; NaN never is."""
        improved = loss < self.loss
        if improved:
            self.loss, self.epoch = loss, epoch
        return improved

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises ValueError for another version's."""
        if state.keys() != vars(self).keys():
            raise ValueError("another version wrote it; start anew with --resume never")
        vars(self).update(state)


class SameData:
    """A part of checkpoints that refuses to continue on other data than it was trained on.

    what: samples, requests. texts: one for each, in order.
    """

    def __init__(self, what: str, texts: Iterable[str]) -> None:
        found = list(texts)
        digest = hashlib.sha256("\n".join(found).encode("utf-8", "surrogatepass")).hexdigest()
        self._what, self._mark = what, {what: len(found), "sha256": digest}

    def state_dict(self) -> dict[str, Any]:
        """Their number and what they are."""
        return dict(self._mark)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare. Raises ValueError when they differ."""
        if state != self._mark:
            raise ValueError(
                f"{state[self._what]} training {self._what} then, {self._mark[self._what]} now, or "
                "with other words: the order would be another one; start anew with --resume never, "
                "or put the files back as they were"
            )


def ways(
    options: RunOptions, batch_size: int, grad_accum: int, dtype: str, checkpointing: str
) -> list[prove.Case]:
    """For --prove: the ways to take the same step that must agree, in both stages."""
    batch, times = ("--batch_size", max(2, batch_size)), ("--grad_accum", grad_accum)
    plain = ["--lora_dropout", 0, "--amp", "off", *batch, *times]
    opposite = ["--gradient_checkpointing", "off" if checkpointing == "on" else "on"]
    single, half = ([*plain, "--dtype", name] for name in ("float32", "bfloat16"))
    bounds = prove.bounds_of(dtype, options)
    return [
        *prove.accumulated(options, plain, batch, times, bounds),
        prove.Case("checkpointed = plain", plain, [*plain, *opposite], bounds),
        prove.Case("bfloat16 near float32", single, half, prove.NEAR),
    ]
