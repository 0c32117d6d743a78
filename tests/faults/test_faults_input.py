"""Rows 15, 35 to 37, 39 of the fault matrix: directories, flags, files, devices (see README.md)."""

import subprocess
import sys

import pytest
import torch

from shared import device, launch
from shared.errors import UserError
from tests.faults import probe_recipe
from tests.harness import PROBE, ROOT, losses, run_here, start, status_of, wait_for_step


def probe(*args):
    return run_here(probe_recipe.main, args)


def is_one_line(outcome):
    return outcome.text.startswith("error: ") and outcome.text.count("\n") == 1


@pytest.mark.parametrize("place", ["below a file", "/proc/no/such", "/sys/no-such"])
def test_fault_15_run_directory_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "below a file").write_text("")
    outcome = probe("--run-dir", tmp_path / place / "run")
    assert outcome.code == 2
    assert f"the run directory {tmp_path / place}" in outcome.last_line
    assert "choose another --run-dir" in outcome.last_line
    assert "Traceback" not in outcome.text
    assert "step=" not in outcome.text


@pytest.mark.limit(180)
def test_fault_15_two_processes_say_it_once(tmp_path):
    (tmp_path / "file").write_text("")
    with start([PROBE, "--nproc", 2, "--run-dir", tmp_path / "file" / "run"]) as running:
        outcome = running.finish()
        assert running.leaves_nothing()
    assert outcome.code == 2
    assert outcome.text.count("cannot be written") == 1
    assert outcome.last_line.startswith("error: the run directory")
    assert "Traceback" not in outcome.text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--batch-szie", 4], "unknown argument --batch-szie; did you mean --batch-size?"),
        (["--batch_szie=4"], "did you mean --batch-size?"),
        (["--batch-size", "many"], "batch_size must be a whole number from 0"),
        (["--batch-size"], "Missing value for argument '--batch-size'"),
        (["--amp", "fp8"], "amp is 'fp8', allowed: off, bf16, fp16, auto"),
        (["--log-every", 0], "log_every must be a whole number from 1"),
        (["--resume", "/no/such.pt"], "--resume /no/such.pt: no such checkpoint"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml cannot be read"),
        (["--nproc", "two"], "nproc must be a whole number from 1"),
        (["surplus"], "unknown argument surplus"),
    ],
)
def test_fault_35_flag_that_is_not_understood_is_one_line(args, said):
    outcome = probe(*args)
    assert outcome.code == 2
    assert is_one_line(outcome)
    assert said in outcome.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_szie: 4", "unknown setting batch_szie; did you mean batch_size?"),
        ("batch_size: many", "batch_size must be a whole number from 0"),
        ("epochs: 1.5", "epochs must be a whole number from 0"),
        ("amp: fp8", "amp is 'fp8', allowed: off, bf16, fp16, auto"),
        ("- 4", "must hold `name: value` lines, found list"),
        ("epochs: [1", "cannot be read"),
        ("epochs: !!python/object/apply:os.system [id]", "cannot be read"),
    ],
)
def test_fault_35_settings_file_that_is_not_understood_is_one_line(tmp_path, text, said):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    outcome = probe("--config", path)
    assert outcome.code == 2
    assert is_one_line(outcome)
    assert str(path) in outcome.text
    assert said in outcome.text


def test_fault_35_settings_file_with_other_spellings_is_read(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"\xef\xbb\xbfbatch-size: 16\r\nepochs: 1\r\namp: off\r\nrun_dir: null\r\n")
    assert probe("--config", path, "--run-dir", tmp_path / "run").code == 0
    assert max(losses(tmp_path / "run")) == 8


def test_fault_35_mistake_is_found_before_torch_is_imported():
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1));"
        "from tests.faults import probe_recipe; from shared.launch import launch;"
        "code = launch(probe_recipe.main); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", script, str(ROOT), "--nproc", "2", "--batch-szie", "4"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: unknown argument --batch-szie; did you mean --batch-size?\n"


@pytest.mark.parametrize("mask", ["", "7", "-1", "GPU-8932f937", "0,1", "nonsense"])
def test_fault_36_mask_on_a_machine_without_a_gpu_runs_on_the_cpu(tmp_path, monkeypatch, mask):
    monkeypatch.setattr(device, "present_gpus", lambda: 0)
    monkeypatch.setattr(launch, "present_gpus", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    outcome = probe("--epochs", 1, "--run-dir", tmp_path / "run")
    assert outcome.code == 0
    assert "no visible GPU: running on the CPU" in outcome.text


@pytest.mark.parametrize(
    ("mask", "visible"),
    [
        (None, 2),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("1,0", 2),
        ("1, 0", 2),
        ("0,7,1", 1),  # CUDA reads the list up to the first entry that is not there
        ("7", 0),
        ("GPU-8932f937", 1),
        ("MIG-1/2/3", 1),
        ("nonsense", 0),
    ],
)
def test_fault_36_mask_is_read_as_cuda_reads_it(mask, visible):
    environ = {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}
    assert device.visible_gpus(environ, present=2) == visible
    assert device.visible_gpus(environ, present=0) == 0


@pytest.mark.parametrize("mask", ["7", "nonsense"])
def test_fault_36_mask_that_names_no_gpu_of_the_machine_is_refused(monkeypatch, mask):
    monkeypatch.setattr(launch, "present_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    outcome = probe()
    assert outcome.code == 2
    assert is_one_line(outcome)
    assert f"CUDA_VISIBLE_DEVICES={mask} names no GPU of this machine" in outcome.text
    assert "numbers from 0 to 1" in outcome.text
    assert "--device cpu" in outcome.text


@pytest.mark.parametrize("mask", ["", "-1"])
def test_fault_36_mask_that_hides_every_gpu_means_the_cpu(monkeypatch, mask):
    monkeypatch.setattr(device, "present_gpus", lambda: 2)
    assert device.resolve("auto", 0, {"CUDA_VISIBLE_DEVICES": mask}) == torch.device("cpu")


def test_fault_36_gpu_that_was_asked_for_and_is_not_there(monkeypatch):
    monkeypatch.setattr(device, "present_gpus", lambda: 0)
    with pytest.raises(UserError, match="this machine has no NVIDIA GPU; type --device cpu"):
        device.resolve("cuda", 0, {})
    with pytest.raises(UserError, match="--device gpu is not known; allowed: auto, cpu, cuda"):
        device.resolve("gpu", 0, {})


def test_fault_36_gpu_number_above_those_that_are_there(monkeypatch):
    monkeypatch.setattr(device, "present_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="cuda:5 is not there; allowed: cuda:0 to cuda:1"):
        device.resolve("cuda:5", 0, {})


def test_fault_36_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(monkeypatch):
    monkeypatch.setattr(device, "present_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"2 NVIDIA GPU\(s\) that torch .* cannot use; driver: "):
        device.resolve("auto", 0, {})


@pytest.mark.parametrize(
    ("args", "environ", "said"),
    [
        (["--nproc", 3], {}, "--nproc 3: 2 GPU(s) are visible; allowed: 1 to 2"),
        (["--nproc-per-node", 3], {}, "--nproc 3: 2 GPU(s) are visible"),
        ([], {"NPROC_PER_NODE": "3"}, "3: 2 GPU(s) are visible"),
        (["--nproc", 2], {"CUDA_VISIBLE_DEVICES": "1"}, "1 GPU(s) are visible; allowed: 1 to 1"),
        (["--nproc", 0], {}, "nproc must be a whole number from 1"),
        (["--nproc", 1000, "--device", "cpu"], {}, "--nproc 1000: no GPU is visible"),
        ([], {"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE"),
        (["--nnodes", 2, "--node-rank", 2], {}, "--node-rank 2 of --nnodes 2"),
    ],
)
def test_fault_37_more_processes_than_devices_are_refused_before_they_start(
    monkeypatch, args, environ, said
):
    monkeypatch.setattr(launch, "present_gpus", lambda: 2)
    for name in ("_alone", "_together"):
        monkeypatch.setattr(launch, name, lambda *_: pytest.fail("it was started"))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    outcome = probe(*args)
    assert outcome.code == 2
    assert is_one_line(outcome)
    assert said in outcome.text


def test_fault_37_several_hosts_need_a_meeting_point(tmp_path):
    outcome = probe("--nnodes", 2, "--nproc", 1, "--run-dir", tmp_path / "run")
    assert outcome.code == 2
    assert is_one_line(outcome)
    assert "--nnodes 2 needs a meeting point: --master-addr" in outcome.text


def test_fault_37_number_of_processes_follows_the_gpus(monkeypatch):
    monkeypatch.setattr(launch, "present_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    counted = []
    monkeypatch.setattr(launch, "_together", lambda *given: counted.append(given[-1]) or 0)
    monkeypatch.setattr(launch, "_alone", lambda *_: counted.append(1) or 0)
    for args in ([], ["--nproc", 3], ["--device", "cuda:2"], ["--device", "cpu"]):
        assert probe(*args).code == 0
    assert counted == [4, 3, 1, 1]


@pytest.mark.limit(150)
def test_fault_39_run_directory_of_a_live_run_is_refused(tmp_path):
    run_dir = tmp_path / "run"
    with start([PROBE, "--step-ms", 50, "--run-dir", run_dir]) as running:
        wait_for_step(run_dir, 3, running)
        second = probe("--run-dir", run_dir)
        assert second.code == 2
        assert f"is in use by a live run (pid {running.pid})" in second.last_line
        assert "--run-dir" in second.last_line
        assert running.process.poll() is None
        assert running.finish().code == 0
    assert sorted(losses(run_dir)) == list(range(1, 49))
    assert status_of(run_dir)["state"] == "done"
    assert not list(tmp_path.glob("run.*"))
