"""multimodal's own faults: SIGTERM, kill -9 and a user's mistake, at nano size."""

import signal
from pathlib import Path

import pytest

from multimodal import download_datasets, run_training
from shared.files import read_json
from tests import multimodal_data
from tests.harness import ROOT, losses, paced, run_here, start, status_of, wait_for_step

SCRIPT = ROOT / "multimodal" / "run_training.py"
STEPS = 66  # 2 epochs of each stage: 18, 24 and 24 steps


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return multimodal_data.build(tmp_path_factory.mktemp("multimodal")).data_root


def flags_for(data: Path, output: Path, *more: object) -> list[object]:
    return [
        "--data-root", data, "--output-dir", output, "--model-size", "nano", "--batch-size", 4,
        "--gradient-accumulation-steps", 2, "--epochs", 6, "--workers", 0, "--clip-seconds", 1,
        "--init", "random",
        "--log-every", 1, "--eval-batch-size", 8, "--no-use-checkpoint", "--dropout", 0.1, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> dict[int, float]:
    """{step: loss} of a run that nothing happens to."""
    output = tmp_path_factory.mktemp("whole") / "outputs"
    outcome = run_here(run_training.main, flags_for(data, output))
    assert outcome.code == 0, outcome.text
    found = losses(output)
    assert len(found) == STEPS
    return found


def reports(output: Path) -> list[dict]:
    """The reports of all starts, oldest first."""
    return [read_json(path) for path in sorted((output / "reports").glob("report_*.json"))]


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize(
    ("workers", "step"),
    [
        pytest.param(0, 5, marks=pytest.mark.full),
        (2, 23),
        (0, 50),
    ],
)
def test_01_19_sigterm_saves_and_the_resumed_run_is_the_undisturbed_one(
    data, undisturbed, tmp_path, workers, step
):
    """In each of the stages, mid-epoch, with dropout and modality dropout."""
    output = tmp_path / "outputs"
    flags = flags_for(data, output, "--workers", workers)
    with start([*paced(SCRIPT, output, step), *flags]) as running:
        wait_for_step(output, step, running)
        running.signal(signal.SIGTERM)
        assert running.finish().code == 143
        assert running.leaves_nothing()
    status = status_of(output)
    assert status["state"] == "stopped" and step <= status["step"] < STEPS
    assert [r["status"] for r in reports(output)] == ["interrupted"]
    resumed = run_here(run_training.main, flags)
    assert resumed.code == 0 and "continuing from" in resumed.text, resumed.text
    assert losses(output) == undisturbed
    last = reports(output)[-1]
    assert last["status"] == "done"
    assert [row["epochs"] for row in last["stages"]] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.serial
def test_05_kill_9_loses_at_most_the_steps_since_the_last_checkpoint(data, undisturbed, tmp_path):
    output = tmp_path / "outputs"
    flags = flags_for(data, output, "--save-every", 4)
    with start([*paced(SCRIPT, output, 22), *flags]) as running:
        wait_for_step(output, 22, running)
        running.signal(signal.SIGKILL)
        running.finish()
        assert running.leaves_nothing()
    resumed = run_here(run_training.main, flags)
    assert resumed.code == 0, resumed.text
    step = int(resumed.text.partition("continuing from")[2].split(" at step ")[1].split()[0])
    assert step >= 20
    assert losses(output) == undisturbed


@pytest.mark.full
@pytest.mark.serial
def test_06_19_two_processes_stop_together_and_continue_exactly(data, tmp_path):
    more = ("--nproc", 2, "--batch-size", 2, "--epochs", 2, "--stage-epochs", "0/1/1")
    whole, output = tmp_path / "whole", tmp_path / "outputs"
    with start([SCRIPT, *flags_for(data, whole, *more)]) as running:
        assert running.finish().code == 0, running.text
    with start([SCRIPT, *flags_for(data, output, *more)]) as running:
        wait_for_step(output, 5, running)
        running.signal(signal.SIGTERM)
        assert running.finish().code == 143, running.text
        assert running.leaves_nothing()
    with start([SCRIPT, *flags_for(data, output, *more)]) as running:
        outcome = running.finish()
    assert outcome.code == 0 and "continuing from" in outcome.text, outcome.text
    assert losses(output) == losses(whole)


def test_35_a_misspelt_flag_and_a_misspelt_setting_are_named_with_the_right_ones(data, tmp_path):
    outcome = run_here(run_training.main, [*flags_for(data, tmp_path / "out"), "--model-sise", 1])
    assert outcome.code == 2
    assert "--model-sise; did you mean --model-size?" in outcome.last_line
    settings = tmp_path / "my.yaml"
    settings.write_text("training:\n  bach_size: 4\n")
    outcome = run_here(run_training.main, ["--config", settings])
    assert outcome.code == 2
    assert "unknown setting training.bach_size; did you mean batch_size?" in outcome.last_line
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.serial
@pytest.mark.limit(900)
def test_kill_campaign_any_moment_leaves_a_run_that_continues_exactly(data, undisturbed, tmp_path):
    """One run killed again and again at seeded moments, until it is done."""
    output, kills = tmp_path / "outputs", 0
    flags = flags_for(data, output, "--save-every", 3)
    for step in (3, 9, 18, 19, 25, 42, 43, 54, 65):
        with start([*paced(SCRIPT, output, step), *flags]) as running:
            wait_for_step(output, step, running)
            running.signal(signal.SIGKILL)
            running.finish()
            assert running.leaves_nothing()
        kills += 1
    outcome = run_here(run_training.main, flags)
    assert outcome.code == 0, outcome.text
    assert losses(output) == undisturbed and kills == 9


def test_fault_15_a_place_that_cannot_be_written_is_one_line(tmp_path, data):
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "data"
    for outcome in (
        run_here(run_training.main, flags_for(data, root)),
        run_here(download_datasets.main, ["--datasets", "coco", "--data-root", root]),
    ):
        assert outcome.code == 2, outcome.text
        assert "cannot be" in outcome.last_line and str(root) in outcome.last_line
        assert "Traceback" not in outcome.text
