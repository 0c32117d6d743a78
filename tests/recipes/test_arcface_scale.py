"""arcface in several processes: on one host, on two of the loopback, with a pretended SLURM."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arcface.memory import head_bytes
from arcface.run_scripts import run_arcface
from tests.arcface_nano import SCRIPT, build_inshop, write_config
from tests.harness import ROOT, environment, free_port, losses, run_here, start, status_of

pytestmark = [pytest.mark.slow, pytest.mark.serial, pytest.mark.limit(300)]
PAGE = (ROOT / "arcface" / "README.md").read_text(encoding="utf-8")
HALF = "train_dataloader.batch_size=3"


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[object]:
    """Batch norm is kept as it is: its statistics are those of a process's own pictures."""
    place = tmp_path_factory.mktemp("nano")
    data, config = build_inshop(place / "data"), write_config(place / "nano.py")
    return ["--config", config, "--data-root", data, "--seed", 1, "--log-every", 1, "--cfg-options",
            "model.image_encoder.0.norm_eval=True", "train_cfg.max_epochs=1"]  # fmt: skip


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory) -> Path:
    """A run of two processes, 3 pictures a step each."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    words = [*flags, HALF, "--nproc", 2, "--work-dir", run_dir]
    with start([SCRIPT, *words]) as running:
        assert running.finish().code == 0, running.text
    return run_dir


def test_two_processes_train_as_one_does_on_the_same_batches(flags, two, tmp_path):
    outcome = run_here(run_arcface.main, [*flags, "--work-dir", tmp_path / "one"])
    assert outcome.code == 0, outcome.text
    one = losses(tmp_path / "one")
    assert len(one) == 4 and losses(two) == pytest.approx(one, rel=2e-5)
    results = [status_of(run_dir)["result"]["before"] for run_dir in (tmp_path / "one", two)]
    assert results[0] == results[1]


@pytest.mark.full
def test_two_hosts_train_as_two_processes_of_one(flags, two, tmp_path):
    lines = re.findall(r"--nnodes 2 --node-rank (\d) --master-addr \S+ --master-port \d+", PAGE)
    assert lines == ["0", "1"]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    words = [*flags, HALF, "--work-dir", tmp_path / "two", "--nnodes", 2, *meeting]
    hosts = [start([SCRIPT, *words, "--node-rank", rank]) for rank in lines]
    with hosts[0], hosts[1]:
        assert [host.finish().code for host in hosts] == [0, 0], hosts[0].text + hosts[1].text
    assert losses(tmp_path / "two") == pytest.approx(losses(two), rel=1e-6)
    assert status_of(tmp_path / "two")["world_size"] == 2


@pytest.mark.full
def test_the_slurm_line_trains_in_the_processes_that_srun_starts(flags, tmp_path):
    """srun starts the command once a task; here a pretended one starts it for both of two."""
    (line,) = re.findall(r"^srun .*$", PAGE, re.M)
    stubs = {
        "srun": "while [[ $1 == --* ]]; do shift 2; done\n"
        "export SLURM_NTASKS=2 SLURM_JOB_ID=4711 SLURM_JOB_NODELIST=here\n"
        'SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &\n'
        'SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!',
        "scontrol": "echo 127.0.0.1",
        "python": f'exec "{sys.executable}" "$@"',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    words = " ".join(f"'{word}'" for word in flags)
    line = line.replace("--data-root /data/inshop", f"{words} --work-dir '{tmp_path / 'run'}'")
    outcome = subprocess.run(
        ["bash", "-c", line], cwd=ROOT / "arcface", capture_output=True, text=True, check=False,
        env=environment(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}"), timeout=250,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    status = status_of(tmp_path / "run")
    assert (status["state"], status["world_size"]) == ("done", 2)


def test_sharding_figures_of_the_page_are_those_of_a_step():
    rows = re.findall(r"^\| (\d+) million \| ([\d.]+) GB \| ([\d.]+) GB \|$", PAGE, re.M)
    assert [row[0] for row in rows] == ["1", "10"]
    for millions, *told in rows:
        for rate, gigabytes in zip((1.0, 0.1), told, strict=True):
            size = head_bytes(int(millions) * 10**6, 512, 8, 64, rate)
            assert f"{size / 1e9:.2f}" == gigabytes
