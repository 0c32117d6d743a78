"""One seed for torch, numpy and Python, and their states as plain types that a checkpoint holds."""

from __future__ import annotations

import hashlib
import random
from typing import Any, cast

import numpy as np
import torch


def seed_all(seed: int, rank: int = 0) -> None:
    """Seed torch (every device), numpy and Python; each rank draws its own numbers."""
    seed_process(derive(seed, rank))


def seed_process(value: int) -> None:
    """Seed all generators of this process with a number of up to 63 bits."""
    seed_cpu(value)
    torch.cuda.manual_seed_all(value)  # at once, or when CUDA is first used


def seed_cpu(value: int) -> None:
    """Seed the three generators of the CPU, and leave those of the GPUs alone."""
    torch.default_generator.manual_seed(value)
    np.random.seed(value % 2**32)  # the global state is what users' transforms draw from
    random.seed(value)


def derive(*numbers: int) -> int:
    """A 63-bit seed from several numbers; neighbours give unrelated streams."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def get_state() -> dict[str, Any]:
    """The generators' states as tensors, lists and numbers (readable with weights_only=True)."""
    name, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if _uses_cuda() else None,
        "numpy": [str(name), keys.tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def set_state(state: dict[str, Any]) -> None:
    """Put back what `get_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and _uses_cuda():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
