import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared import device
from shared.device import check_mask, resolve, visible_gpus
from shared.errors import UserError


@pytest.mark.parametrize(
    ("mask", "present", "expected"),
    [
        (None, 0, 0),
        (None, 2, 2),
        ("", 2, 0),
        ("-1", 2, 0),
        ("1,0", 2, 2),
        (" 0 , 1 ", 2, 2),
        ("0,7,1", 2, 1),  # CUDA reads up to the first entry that names no device
        ("7", 2, 0),
        ("0,0", 2, 0),  # CUDA takes a list with a repetition for an empty one
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 2, 1),
        ("MIG-1,MIG-2", 1, 2),
        ("gpu0", 2, 0),
        ("0", 0, 0),
    ],
)
def test_gpus_that_the_mask_leaves_visible(mask: str | None, present: int, expected: int) -> None:
    environ = {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}
    assert visible_gpus(environ, present) == expected


DRIVER = """
int nvmlInit_v2(void) { return STATE; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine's GPUs are counted first")
@pytest.mark.parametrize(("state", "expected"), [(0, 2), (9, 0)])  # 9: the driver is not loaded
def test_gpus_without_device_files_are_counted_by_the_drivers_library(tmp_path, state, expected):
    (tmp_path / "driver.c").write_text(DRIVER)
    build = ["cc", "-shared", "-fPIC", f"-DSTATE={state}", "-o", tmp_path / "libnvidia-ml.so.1"]
    subprocess.run([*build, tmp_path / "driver.c"], check=True)
    code = "import sys, shared.device as d; print(d.present_gpus(), 'torch' in sys.modules)"
    env = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    root = Path(device.__file__).parents[1]
    said = subprocess.check_output([sys.executable, "-c", code], env=env, cwd=root, text=True)
    assert said.split() == [str(expected), "False"]


@pytest.mark.parametrize(
    ("mask", "present", "refused"),
    [
        *(("7", 2, True), ("gpu0", 1, True), ("1,0", 1, True)),
        *((None, 2, False), ("", 2, False), ("-1", 2, False), ("7", 0, False), ("1", 2, False)),
    ],
)
def test_a_mask_that_names_no_gpu_is_refused_unless_it_hides_all_on_purpose(mask, present, refused):
    environ = {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}
    if not refused:
        check_mask(environ, present)
        return
    with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={mask} .*0 to {present - 1}"):
        check_mask(environ, present)


@pytest.mark.parametrize("name", ["gpu", "cpu:0", "cuda:-1"])
def test_an_unknown_device_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(UserError, match="allowed: auto, cpu, cuda, cuda:N"):
        resolve(name, 0, {})


def test_auto_falls_back_to_the_cpu_with_one_line_and_never_for_a_mistyped_mask(
    monkeypatch, caplog
):
    monkeypatch.setattr(device, "present_gpus", lambda: 0)
    with caplog.at_level(logging.INFO, logger="shared.device"):
        assert resolve("auto", 0, {}) == torch.device("cpu")
    assert caplog.messages == ["no visible GPU: running on the CPU"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no NVIDIA GPU; type --device cpu"):
        resolve("cuda", 0, {})
    monkeypatch.setattr(device, "present_gpus", lambda: 2)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=7"):
        resolve("auto", 0, {"CUDA_VISIBLE_DEVICES": "7"})


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_an_error_and_no_fallback(monkeypatch, name):
    monkeypatch.setattr(device, "present_gpus", lambda: 2)
    monkeypatch.setattr(device, "driver_version", lambda: "535.104.05")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"2 NVIDIA GPU.* driver: 535\.104\.05.*--device cpu"):
        resolve(name, 0, {})


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine on which torch sees two GPUs; the devices that were made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(device, "present_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(
    ("name", "local_rank", "index"), [("auto", 1, 1), ("cuda", 0, 0), ("cuda:1", 0, 1)]
)
def test_each_process_takes_the_gpu_of_its_number_or_the_one_that_is_named(
    two_gpus, name, local_rank, index
):
    assert resolve(name, local_rank, {}) == torch.device("cuda", index)
    assert two_gpus == [torch.device("cuda", index)]


def test_a_number_beyond_the_last_is_refused_and_cpu_is_the_cpu_whatever_the_mask_says(two_gpus):
    with pytest.raises(UserError, match="cuda:5 is not there; allowed: cuda:0 to cuda:1"):
        resolve("cuda:5", 0, {})
    assert resolve("cpu", 0, {"CUDA_VISIBLE_DEVICES": "7"}) == torch.device("cpu")
    assert two_gpus == []


def test_memory_in_use_without_a_gpu_is_the_ram_that_the_process_holds() -> None:
    before = device.memory_in_use() or 0
    kept = torch.ones(16 << 20)  # 64 MiB
    grown = (device.memory_in_use() or 0) - before
    assert abs(grown - kept.nbytes) < 8 << 20
