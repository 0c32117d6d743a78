"""Names to devices, with the reason when a device is not to be had.

CUDA_VISIBLE_DEVICES is honoured and never set. torch is imported inside the functions, so that the
launcher can count GPUs before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import UserError, shortened

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_LARGEST = 2**31 - 1


def present_gpus() -> int:
    """NVIDIA devices on this machine, whatever torch or CUDA_VISIBLE_DEVICES say of them.

    By their device files or, where there are none (WSL2), as the driver's own library counts them.
    """
    files = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    return len(files) or _counted_by_driver()


@functools.cache
def _counted_by_driver() -> int:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0  # no driver
    count = ctypes.c_uint(0)
    is_told = library.nvmlInit_v2() == 0 and library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
    return count.value if is_told else 0


def visible_gpus(environ: Mapping[str, str], present: int) -> int:
    """How many of `present` GPUs CUDA_VISIBLE_DEVICES leaves visible (all when it is not set).

    As CUDA reads it: up to the first entry that names no device, and nothing when one stands twice.
    """
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return present
    valid: list[str] = []
    for entry in (part.strip() for part in mask.split(",")):
        by_number = entry.isdigit() and int(entry) < present
        if not (by_number or entry.startswith(("GPU-", "MIG-"))):
            break
        valid.append(entry)
    return len(valid) if present and len(set(valid)) == len(valid) else 0


def gpu_use() -> list[dict[str, float]]:
    """Index, use in percent, used and total bytes of every GPU; [] without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = "--query-gpu=index,utilization.gpu,memory.used,memory.total"
    command = [program, asked, "--format=csv,noheader,nounits"]
    found = []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        for line in result.stdout.splitlines():
            with contextlib.suppress(ValueError):  # some cards tell no use
                index, percent, used, total = (float(word) for word in line.split(","))
                sizes = {"used_bytes": used * 2**20, "total_bytes": total * 2**20}
                found.append({"index": index, "percent": percent, **sizes})
    return found


def free_memory() -> list[int]:
    """Free bytes of each visible GPU, as a process of its own finds them: asking takes some.

    Raises UserError where torch cannot ask.
    """
    sizes = "(torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count()))"
    command = [sys.executable, "-c", f"import torch; print(*{sizes})"]
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = [int(word) for word in done.stdout.split()]
    if not found:
        raise UserError("torch cannot ask the GPUs what is free; type a size, as --fit 12GB")
    return found


def check_mask(environ: Mapping[str, str], present: int) -> None:
    """Raise UserError when CUDA_VISIBLE_DEVICES names no GPU of a machine that has some."""
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    if present and mask and mask != "-1" and visible_gpus(environ, present) == 0:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={mask} names no GPU of this machine; allowed: numbers from 0 to "
            f"{present - 1} or GPU-… ids; unset it to use every GPU, or type --device cpu"
        )


def check_name(name: str) -> None:
    """Raise UserError for what is no device's name."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", name):
        raise UserError(
            f"--device {shortened(name)} is not known; allowed: auto, cpu, cuda, cuda:N"
        )


def resolve(name: str, local_rank: int, environ: Mapping[str, str]) -> torch.device:
    """The device for this process: `auto`, `cpu`, `cuda` (one a process) or `cuda:N`.

    auto takes the GPU of this process's number and falls back to the CPU, with one line, only where
    the machine has no visible GPU. Raises UserError for a GPU that was asked for, or is there, and
    cannot be used.
    """
    import torch

    check_name(name)
    kind, _, number = name.partition(":")
    present = present_gpus()
    if kind == "cpu" or (kind == "auto" and visible_gpus(environ, present) == 0):
        if kind == "auto":
            check_mask(environ, present)
            log.info("no visible GPU: running on the CPU")
        return torch.device("cpu")
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if usable == 0:
        raise UserError(_why_unusable(name, present))
    index = int(number) if number else local_rank
    if index >= usable:
        raise UserError(f"--device cuda:{index} is not there; allowed: cuda:0 to cuda:{usable - 1}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _why_unusable(name: str, present: int) -> str:
    import torch

    if present == 0:
        return f"--device {name}: this machine has no NVIDIA GPU; type --device cpu or leave it out"
    built = torch.version.cuda or "none (a CPU build)"
    return (
        f"this machine has {present} NVIDIA GPU(s) that torch {torch.__version__} (built for CUDA "
        f"{built}) cannot use; driver: {driver_version()}. Update the driver, install a torch "
        "build for it, or type --device cpu"
    )


def driver_version() -> str:
    """The NVIDIA kernel driver's version, or 'not loaded'."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return "not loaded"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def memory_in_use() -> int | None:
    """Bytes that this process has taken of its GPU at the most, or holds of RAM without one."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None  # not Linux
    return pages * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step.

    By default each large activation is a mapping of its own, made, cleared page by page and given
    back in every step: 5 to 15 % of a step's time, measured. The peak stays the same.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST)
