"""shared/ddp_series/slurm/sbatch_run.sh with a pretended srun, scontrol and torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPT = "shared/ddp_series/slurm/sbatch_run.sh"
STEP = "shared/ddp_series/multinode_torchrun.py"
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
}
SRUN = """#!/usr/bin/env bash
{ printf '%s\\n' "store=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-}" "$@"; echo END; } >>"$RECORD"
if [[ $* == *' hostname '* ]]; then printf '%s' "$ADDRESS"; exit "${ADDRESS_CODE:-0}"; fi
exit "${CODE:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s\\n' "$@" >>"$RECORD.scontrol"
printf 'node07\\nnode08\\n'
"""


@pytest.fixture
def cluster(house, tmp_path):
    """A house with the script and the step, and programs that record what they are called with."""
    house.take(SCRIPT, STEP)
    house.write("srun", SRUN, house.bin)
    house.write("scontrol", SCONTROL, house.bin)
    house.env |= {**JOB, "RECORD": str(tmp_path / "record"), "ADDRESS": "10.1.2.3 fe80::1\n"}
    return house


def calls(cluster) -> list[list[str]]:
    """What srun was called with, one list a call; first whether the store is kept apart."""
    text = Path(cluster.env["RECORD"]).read_text()
    return [call.splitlines() for call in text.split("END\n") if call]


def test_every_host_gets_the_torchrun_of_the_job(cluster):
    outcome = cluster.run(
        "bash", cluster.root / SCRIPT, 50, 10, "--snapshot-path", "/a b/$(x)/s.pt", cwd=cluster.root
    )
    assert outcome.returncode == 0, outcome.stderr
    asked, started = calls(cluster)
    assert asked[1:] == ["--nodes=1", "--ntasks=1", "-w", "node07", "hostname", "--ip-address"]
    assert started == [
        "store=1",
        "--kill-on-bad-exit=1",
        "torchrun",
        "--nnodes=2",
        "--nproc-per-node=4",
        "--max-restarts=3",
        "--rdzv-id=4711",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.1.2.3:24711",
        str(cluster.root / STEP),
        *("50", "10", "--snapshot-path", "/a b/$(x)/s.pt"),
    ]
    asked_of = Path(cluster.env["RECORD"] + ".scontrol").read_text().splitlines()
    assert asked_of == ["show", "hostnames", "node[07-08]"]
    text = (cluster.root / SCRIPT).read_text(encoding="utf-8")
    # sbatch reads its lines up to the first line of code
    assert 0 < text.rindex("#SBATCH") < text.index('[ -n "${BASH_VERSION')


def test_the_series_is_found_from_where_sbatch_was_typed(cluster, tmp_path):
    """SLURM runs a copy of the script from a directory of its own."""
    spool = tmp_path / "spool"
    spool.mkdir()
    copy = spool / "slurm_script"
    copy.write_bytes((cluster.root / SCRIPT).read_bytes())
    series = cluster.root / "shared" / "ddp_series"
    for typed_in in (cluster.root, series, series / "slurm"):
        Path(cluster.env["RECORD"]).unlink(missing_ok=True)
        outcome = cluster.run(
            "bash", copy, 5, 1, cwd=spool, env={"SLURM_SUBMIT_DIR": str(typed_in)}
        )
        assert outcome.returncode == 0, outcome.stderr
        assert str(cluster.root / STEP) in calls(cluster)[1]
    outcome = cluster.run("bash", copy, 5, 1, cwd=spool, env={"SLURM_SUBMIT_DIR": str(spool)})
    assert outcome.returncode == 2
    assert "type sbatch in shared/ddp_series" in outcome.stderr


@pytest.mark.parametrize(
    "env",
    [
        {"ADDRESS": "127.0.1.1\n"},
        {"ADDRESS": "fe80::1\n"},
        {"ADDRESS": "10.1\n", "ADDRESS_CODE": "1"},
    ],
)
def test_first_host_is_named_where_its_address_is_of_no_use(cluster, env):
    outcome = cluster.run("bash", cluster.root / SCRIPT, 5, 1, cwd=cluster.root, env=env)
    assert outcome.returncode == 0, outcome.stderr
    assert "--rdzv-endpoint=node07:24711" in calls(cluster)[1]


def test_port_comes_from_the_job_and_exit_code_from_srun(cluster):
    for job, port in (("12000", 20_000), ("98765432", 25_432)):  # below the clients' ports
        Path(cluster.env["RECORD"]).unlink(missing_ok=True)
        env = {"SLURM_JOB_ID": job, "CODE": "9"}
        outcome = cluster.run("bash", cluster.root / SCRIPT, 5, 1, cwd=cluster.root, env=env)
        assert outcome.returncode == 9
        assert f"--rdzv-endpoint=10.1.2.3:{port}" in calls(cluster)[1]


def test_outside_of_a_job_it_says_how_to_start_one(cluster):
    env = {"SLURM_JOB_ID": "", "SLURM_JOB_NODELIST": ""}
    outcome = cluster.run("bash", cluster.root / SCRIPT, 5, 1, cwd=cluster.root, env=env)
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert "type sbatch" in outcome.stderr
    assert not Path(cluster.env["RECORD"]).exists()


def test_repository_environment_is_used_unless_another_is_active(cluster):
    cluster.write("srun", '#!/bin/sh\nprintf "%s\\n" "$PATH" >>"$RECORD"\n', cluster.bin)
    cluster.write(".venv/bin/torchrun", "#!/bin/sh\n")
    for env, used in (({}, True), ({"VIRTUAL_ENV": "/x"}, False), ({"CONDA_PREFIX": "/x"}, False)):
        Path(cluster.env["RECORD"]).unlink(missing_ok=True)
        cluster.run("bash", cluster.root / SCRIPT, 5, 1, cwd=cluster.root, env=env)
        path = Path(cluster.env["RECORD"]).read_text().splitlines()[-1]
        assert path.startswith(f"{cluster.root}/.venv/bin:") is used
