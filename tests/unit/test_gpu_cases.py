"""The checks for a GPU, tried on the CPU with small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import checks
from tests.gpu.cases import MAKERS

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tests" / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MAKERS)
def test_the_loop_by_hand_computes_the_recipes_loss_and_gradients(name: str, tmp_path: Path):
    torch.manual_seed(0)
    case = MAKERS[name](CPU, tmp_path, tiny=True)
    found = []
    for loss_of in (case.loss, case.by_hand):
        loss = loss_of()
        gradients = torch.autograd.grad(loss, case.trained, allow_unused=True)
        found.append((loss.detach(), torch.cat([g.flatten() for g in gradients if g is not None])))
    (loss, one), (same, other) = found
    torch.testing.assert_close(loss, same, rtol=1e-4, atol=1e-5)
    assert float((one - other).norm() / one.norm()) < 1e-3


@pytest.mark.parametrize("name", ["face_distill", "multimodal"])
def test_bf16_is_near_float32_and_no_step_is_skipped(name: str, tmp_path: Path):
    loss, gradients = checks.departures(name, "bf16", CPU, tmp_path)
    assert loss <= checks.LOSS
    assert gradients <= 1
    assert checks.skipped(name, "bf16", CPU, tmp_path, 3) == []


@pytest.mark.full
def test_the_benchmark_runs_with_small_models():
    words = ["--tiny", "--repeats", "1", "--steps", "1", "--recipes", "face_distill"]
    ended = subprocess.run(
        [sys.executable, str(GPU), *words], capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])["recipes"]["face_distill"]
    assert found["memory"]["estimated"] > 0
    assert set(found["speed"]) == {"by hand", "recipe"}
