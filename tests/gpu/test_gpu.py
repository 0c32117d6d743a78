"""What only a GPU shows: nccl, half precision, and memory beside --estimate.

    .venv/bin/python -m pytest -m gpu      # about three minutes on one card; no network

A recipe whose package is missing is skipped with its name. The speed of the steps is in
tests/benchmarks/gpu.py.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.gpu import checks
from tests.gpu.cases import MAKERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _leave_no_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(params=MAKERS)
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


def with_packages(work: Any, *args: Any) -> Any:
    """`work(*args)`; the test is skipped where a package is missing."""
    try:
        return work(*args)
    except ImportError as error:
        pytest.skip(f"a package is missing: {error}")


def test_one_process_of_nccl_trains_as_none(tmp_path: Path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4)).to(DEVICE)

    rows = torch.randn(16, 32, device=DEVICE)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0,
                            world_size=1, device_id=DEVICE)  # fmt: skip
    try:
        total = torch.ones(3, device=DEVICE)
        dist.all_reduce(total)
        plain, wrapped = net(), DistributedDataParallel(net(), device_ids=[0])
        for model in (plain, wrapped):
            model(rows).square().mean().backward()
        dist.barrier(device_ids=[0])
    finally:
        dist.destroy_process_group()
    assert total.tolist() == [1.0] * 3
    for one, other in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("mode", checks.DTYPES)
def test_a_step_in_half_precision_is_near_that_in_float32(recipe: str, mode: str, tmp_path: Path):
    loss, gradients = with_packages(checks.departures, recipe, mode, DEVICE, tmp_path)
    assert loss <= checks.LOSS
    assert gradients <= 1


@pytest.mark.parametrize("mode", checks.DTYPES)
def test_no_step_of_200_is_skipped(recipe: str, mode: str, tmp_path: Path):
    found = with_packages(checks.skipped, recipe, mode, DEVICE, tmp_path, 200 + checks.FINDING)
    allowed = checks.FINDING if mode == "fp16" else 0  # fp16 looks for its scale first
    assert [step for step in found if step >= allowed] == []


@pytest.mark.limit(180)
def test_a_real_step_takes_the_memory_that_estimate_says(recipe: str, tmp_path: Path):
    gpu = importlib.import_module("tests.benchmarks.gpu")
    case = with_packages(lambda: MAKERS[recipe](DEVICE, tmp_path, tiny=False))
    allocated = gpu.allocated(case, DEVICE)
    estimated = with_packages(gpu.estimated, case)
    assert estimated == pytest.approx(allocated, rel=gpu.WITHIN)
