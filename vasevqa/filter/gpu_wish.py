"""DEFAULT_GPU: a wish for a machine that has so many GPUs, an order when it is typed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from shared.device import present_gpus, visible_gpus
from shared.errors import UserError

log = logging.getLogger(__name__)


def device_for(
    gpu: int, device: str, typed: Collection[str], processes: int, environ: Mapping[str, str]
) -> str:
    """The name of the device: that of `gpu` where it is there and nothing else was typed.

    Without it the first visible GPU, or the CPU, with one line; several processes take a GPU each.
    Raises UserError for a typed --gpu that is not there.
    """
    if "device" in typed or processes > 1:
        return device
    visible = visible_gpus(environ, present_gpus())
    if 0 <= gpu < visible:
        return f"cuda:{gpu}"
    if "gpu" in typed:
        have = f"0 to {visible - 1}" if visible else "none: no GPU is visible, type --device cpu"
        raise UserError(f"--gpu {gpu} is not there; allowed: {have}")
    if visible:
        log.info("DEFAULT_GPU %d is not among the %d visible: using cuda:0", gpu, visible)
        return "cuda:0"
    return device
