"""`--fit [12GB]`: the fastest way to take the same step in the memory that there is.

    ways = [{"gradient_checkpointing": again, "micro_batch": rows}, …]    # the fastest first
    tried = ((other, plan(other)) for other in fit.variants(cfg, ways))
    cfg = fit.first(cfg, tried, "--image-size 112")

A way changes what is computed at a time and what is computed again, neither the batch nor the
gradients. What the user typed stays as it is typed. The launcher chooses, and its processes take
that choice. Standard library only.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from shared import device
from shared.errors import UserError, shown
from shared.progress import amount
from shared.settings import settings

log = logging.getLogger(__name__)

SPARE = 0.1  # of the memory, left to what an estimate misses and an allocator cannot use
# Of recipes that cannot take a batch in pieces.
AT_ONCE = "; a batch is computed at once, since batch norm ties its pictures together"
_CHOSEN = "TOOLKIT_FIT"  # in the environment of the processes: what the launcher has chosen
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?([MGT])(i?)B", re.IGNORECASE)


class Sized(Protocol):
    """A memory plan."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        ...


def size_of(text: str) -> int:
    """The bytes of 12GB, 8GiB, 900MB. Raises UserError for what is no size."""
    match = _SIZE.fullmatch(text)
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** {"M": 2, "G": 3, "T": 4}[match[2].upper()])
    if not size:
        raise UserError(
            f"--fit {shown(text)} is no size; allowed: a number of MB, GB, TB, MiB, GiB or TiB, as "
            "--fit 12GB, --fit 8GiB, --fit 900MB; --fit alone: what is free on the smallest GPU"
        )
    return size


def halves(most: int) -> list[int]:
    """`most`, its half, and so on to 1."""
    return [most, *halves(most // 2)] if most > 1 else [1]


def variants(cfg: Any, ways: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """`cfg` by each of the ways, each once. ways: name of a setting → its value.

    With --amp auto typed, where no GPU decides on it, each way is tried in float32 and in bf16.
    """
    seen = []
    for way in ways:
        free = {name: value for name, value in way.items() if name not in cfg.run.typed}
        for amp in _precisions(cfg.run):
            other = replace(cfg, **free, run=replace(cfg.run, amp=amp))
            if other not in seen:
                seen.append(other)
                yield other


def first(cfg: Any, tried: Iterable[tuple[Any, Sized]], smaller: str, remark: str = "") -> Any:
    """The first of `tried`, settings with the memory that they take, for which --fit has room.

    Without --fit the settings as they are.
    smaller: flags that make the step itself smaller, for the message where nothing fits.
    remark: what is said beside the choice. Raises UserError.
    """
    if cfg.run.fit is None:
        return cfg
    chosen = os.environ.get(_CHOSEN) if "RANK" in os.environ else None
    if chosen:
        changes, said = json.loads(chosen)
        log.info(said)
        return _changed(cfg, changes)
    limit, sizes = _limit(cfg.run), dict[str, int]()
    for other, plan in tried:
        changes = _changes(cfg, other)
        flags = _flags(changes) or "the settings as they are"
        if plan.total <= (1 - SPARE) * limit:
            said = f"--fit: {amount(plan.total)} of {amount(limit)} with {flags}{remark}"
            said += "; to repeat it, type these flags in place of --fit" * bool(changes)
            log.info(said)
            os.environ[_CHOSEN] = json.dumps([changes, said])
            return other
        sizes[flags] = plan.total
    least = min(sizes, key=lambda flags: sizes[flags])
    raise UserError(
        f"--fit {amount(limit)}: nothing fits, a tenth being kept free; the smallest is "
        f"{amount(sizes[least])}, with {least}; give more, or try {smaller}{remark}"
    )


def _limit(run: Any) -> int:
    """The bytes that a step may take. Raises UserError where nobody can tell."""
    if run.fit != "auto":
        return size_of(run.fit)
    why = ""
    if is_without_gpu(run):
        why = "no GPU is to be used here"
    elif "RANK" in os.environ or run.processes.nnodes > 1:
        why = "processes of another launcher or host measure it at different moments"
    if why:
        raise UserError(
            "--fit alone takes what is free on the smallest visible GPU, and "
            f"{why}: type a size, for example --fit 12GB"
        )
    return min(device.free_memory())


def is_without_gpu(run: Any) -> bool:
    """Whether a training with these RunOptions runs on the CPU."""
    return run.device == "cpu" or not device.visible_gpus(os.environ, device.present_gpus())


def _precisions(run: Any) -> tuple[str, ...]:
    """Values of --amp to try; on a GPU `auto` is half precision anyway, which is the fastest."""
    is_open = run.amp == "auto" and "amp" in run.typed and not run.is_explicit_resume
    return ("off", "bf16") if is_open and is_without_gpu(run) else (run.amp,)


def _changes(cfg: Any, other: Any) -> dict[str, Any]:
    """Setting → value, of what is another in `other`."""
    before = settings(cfg)
    return {name: value for name, value in settings(other).items() if value != before[name]}


def _changed(cfg: Any, changes: Mapping[str, Any]) -> Any:
    below = {name: value for name, value in changes.items() if not hasattr(cfg, name)}
    own = {name: value for name, value in changes.items() if name not in below}
    return replace(cfg, **own, run=replace(cfg.run, **below))


def _flags(changes: Mapping[str, Any]) -> str:
    """The changes as they are typed."""
    words = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        is_switch = isinstance(value, bool)
        words.append(f"--{'' if value else 'no-'}{flag}" if is_switch else f"--{flag} {value}")
    return " ".join(words)
