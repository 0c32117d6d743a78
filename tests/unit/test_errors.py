import re

import pytest
import torch

from shared.errors import did_you_mean, hint_for, is_out_of_memory, one_line


def test_a_message_becomes_one_line_that_a_terminal_only_shows():
    assert one_line(ValueError("first\n   second\tthird ")) == "first second third"
    assert one_line(StopIteration()) == "StopIteration"
    assert one_line(ValueError("red \x1b[31m\n\ttext\x00")) == "red \\x1b[31m text\\x00"
    assert one_line(ValueError("数据 é half \udc80")) == "数据 é half \\udc80"
    text = one_line(ValueError("begin " + "x" * 100_000 + " end"))
    assert text.startswith("begin x") and text.endswith("x end") and len(text) < 3100


def test_the_nearest_name_is_offered_and_a_far_one_is_not():
    names = ["--batch-size", "--epochs", "--lr"]
    assert did_you_mean("--batch-szie", names) == "; did you mean --batch-size?"
    assert did_you_mean("--zzz", names) == ""


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model-00002-of-00005.safetensors", "model-00003-of-00005.safetensors"),
        ("student_adapter_face_epoch_10.pth", "student_adapter_face_epoch_5.pth"),
    ],
)
def test_another_of_a_numbered_series_is_not_offered(name, other):
    assert did_you_mean(name, [other, "model.safetensors.index.json"]) == ""
    misspelt = name.replace("-of-", "_of-").replace("epoch", "epcoh")
    assert did_you_mean(misspelt, [other]) == f"; did you mean {other}?"


WORKER_KILLED = "DataLoader worker (pid 12) is killed by signal: Killed."
SHARED_MEMORY = "unable to write to file </torch_1>: shared memory /dev/shm"
DEVICE_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."
RAM_FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate"
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 12010)."


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        (WORKER_KILLED, "--workers"),
        ("DataLoader worker (pid 12) is killed by signal: Bus error. shared memory", "--workers"),
        (SHARED_MEMORY, "--shm-size"),
        # torch's words when a loader worker cannot put its batch into /dev/shm
        ("unable to write to file </torch_1_2_3>: No space left on device (28)", "/dev/shm"),
        (DEVICE_FULL, "--batch-size"),
        (RAM_FULL, "RAM is full"),
        ("[Errno 28] No space left on device", "the disk is full"),
        (OLD_DRIVER, "--device cpu"),
    ],
)
def test_failures_that_torch_words_badly_get_advice(message, advice):
    assert advice in (hint_for(message, ["--batch-size", "--workers", "--device"]) or "")


@pytest.mark.parametrize("message", [WORKER_KILLED, DEVICE_FULL, OLD_DRIVER])
def test_advice_names_no_flag_that_the_script_lacks(message):
    alone = hint_for(message)
    assert alone and not set(re.findall(r"--[a-z-]+", alone)) - {"--shm-size"}
    for flag in ("--batch-size", "--workers", "--amp", "--device"):
        named = set(re.findall(r"--[a-z-]+", hint_for(message, [flag]) or ""))
        assert named <= {flag, "--shm-size"}


def test_of_a_script_with_a_configuration_advice_names_its_settings():
    hint = hint_for(DEVICE_FULL, ["--cfg-options", "--amp"]) or ""
    assert "lower train_dataloader.batch_size by --cfg-options; try --amp bf16" in hint
    both = hint_for(DEVICE_FULL, ["--cfg-options", "--batch-size"]) or ""
    assert "lower --batch-size" in both and "train_dataloader" not in both


def allocation_error() -> BaseException:
    """What torch's CPU allocator raises, from itself: no address space holds 4 PB."""
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(10**15)
    return caught.value


def after(before: Exception, *, is_cause: bool) -> Exception:
    """An error raised from `before`, or one of its own while `before` was dealt with."""
    try:
        try:
            raise before
        except Exception as error:
            raise ValueError("the step failed") from (error if is_cause else None)
    except ValueError as error:
        return error


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")
ERRORS = {
    "the GPU": (CUDA, True),
    "cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cu`"), True),
    "torch in RAM": (allocation_error(), True),
    "a fork": (OSError(12, "Cannot allocate memory"), True),
    "Python": (MemoryError(), True),
    "inside another error": (after(CUDA, is_cause=True), True),
    "one that was dealt with": (after(CUDA, is_cause=False), False),
    "a shape": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
}


@pytest.mark.parametrize(("error", "expected"), ERRORS.values(), ids=ERRORS)
def test_a_lack_of_memory_is_known_by_its_wordings(error, expected):
    assert is_out_of_memory(error) == expected
