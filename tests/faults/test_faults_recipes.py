"""Every recipe's own loop: stopped, killed, continued; a full disk; gradients that are NaN."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from shared.amp import Amp
from tests.harness import Outcome, losses, paced, run_here, start, status_of, wait_for_step
from tests.trainings import TRAININGS, Training, records, tensors

pytestmark = [pytest.mark.slow, pytest.mark.limit(300)]
SAVE_EVERY = 3


@pytest.fixture(scope="module", params=TRAININGS)
def training(request, tmp_path_factory) -> Training:
    return TRAININGS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def whole(training, tmp_path_factory) -> Path:
    """The place of a run that nothing happened to."""
    place = tmp_path_factory.mktemp("whole") / "run"
    outcome = run_here(training.main, training.words(place))
    assert outcome.code == 0, outcome.text
    return place


def weights(place: Path) -> dict[str, Any]:
    """The tensors of every file of weights below a run's place, by file and name."""
    paths = [path for kind in ("*.pth", "*.pt") for path in place.rglob(kind)]
    found = {
        f"{path.relative_to(place)}{name}": tensor
        for path in paths
        if not path.name.startswith("last.")  # holds the generators of both runs' starts
        for name, tensor in tensors(torch.load(path)).items()
    }
    adapters = place.rglob("*.safetensors")
    return found | {str(path.relative_to(place)): path.read_bytes() for path in adapters}


def is_same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@contextlib.contextmanager
def asked_to_stop(training: Training, run_dir: Path, step: int) -> Iterator[None]:
    """SIGTERM to this process in the optimizer step after the one that is recorded as `step`."""
    asked: list[None] = []

    def ask(*_: object) -> None:
        if not asked and max(losses(run_dir, training.loss)) >= step:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))

    hook = register_optimizer_step_post_hook(ask)
    try:
        yield
    finally:
        hook.remove()


def continued_at(outcome: Outcome) -> int:
    """The step that a run says it continues from."""
    assert "continuing from" in outcome.text, outcome.text
    return int(outcome.text.partition("continuing from")[2].split(" at step ")[1].split()[0])


@pytest.mark.serial
def test_fault_19_a_run_that_was_ended_becomes_the_undisturbed_one(training, whole, tmp_path):
    """By kill -9 after a third, with loader workers, by SIGTERM after two thirds."""
    place = tmp_path / "run"
    run_dir = training.run_dir(place)
    num_steps = len(losses(training.run_dir(whole), training.loss))
    at, later = round(num_steps / 3), round(num_steps * 2 / 3)
    words = training.words(place, "--save-every", SAVE_EVERY, *training.with_workers(2))
    with start([*paced(training.script, run_dir, at), *words]) as running:
        wait_for_step(run_dir, at, running, key=training.loss)
        running.signal(signal.SIGKILL)
        assert running.finish().code == -signal.SIGKILL
        assert running.leaves_nothing()
    words = training.words(place, "--save-every", SAVE_EVERY)
    with asked_to_stop(training, run_dir, later):
        stopped = run_here(training.main, words)
    assert stopped.code == 143, stopped.text
    assert continued_at(stopped) >= at - SAVE_EVERY  # a step is logged before it is saved
    status = status_of(run_dir)
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    assert num_steps > max(losses(run_dir, training.loss)) == status["step"] >= later
    resumed = run_here(training.main, words)
    assert resumed.code == 0, resumed.text
    assert continued_at(resumed) == status["step"]
    assert records(run_dir) == records(training.run_dir(whole))
    ours, theirs = weights(place), weights(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not is_same(ours[name], theirs[name])] == []
    results = [status_of(training.run_dir(at))["result"] for at in (place, whole)]
    assert results[0] == results[1]


@contextlib.contextmanager
def refused(*paths: Path) -> Iterator[None]:
    """The file system takes none of these files: their temporary names are directories."""
    places = [path.with_name(f"{path.name}.tmp.{os.getpid()}") for path in paths]
    for place in places:
        place.mkdir(parents=True)
    try:
        yield
    finally:
        for place in places:
            place.rmdir()


def test_fault_13_a_run_whose_last_save_failed_is_not_done(training, whole, tmp_path):
    """Where it is a file beside the checkpoint that cannot be written, a warning is enough."""
    place = tmp_path / "run"
    run_dir, words = training.run_dir(place), training.words(place)
    with refused(run_dir / "last.pt", run_dir / "last.pth"):
        outcome = run_here(training.main, words)
    status = status_of(run_dir)
    assert (outcome.code, status["state"], status["exit_code"]) == (1, "failed", 1), outcome.text
    assert "the checkpoint of step" in outcome.last_line and "was not written" in outcome.last_line
    assert "Traceback" not in outcome.text
    for path in run_dir.glob("epoch_*.pth"):  # from the state at hand: each is whole
        assert torch.load(path)["position"]["batch"] == 0
    best = [path.relative_to(whole) for path in whole.rglob("*best*.pt*")]
    assert best or "lavic" in training.script.parts
    again_at = tmp_path / "beside" if best else place
    with refused(*map(again_at.joinpath, best)):
        again = run_here(training.main, training.words(again_at))
    assert again.code == 0, again.text
    assert status_of(training.run_dir(again_at))["state"] == "done"
    for path in best:
        assert f"{path.name} was not written" in again.text and not (again_at / path).exists()
    assert "Traceback" not in again.text


def is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def test_fault_16_no_recipe_saves_a_step_that_is_not_finite(training, tmp_path, monkeypatch):
    """The third step on, one parameter's gradient is NaN: the run ends, its weights are whole."""
    step, taken = Amp.step, [0]

    def poisoned(amp: Amp, optimizer: Any, parameters: Any, **more: Any) -> float:
        parameters, taken[0] = list(parameters), taken[0] + 1
        if taken[0] > 2:
            next(p for p in parameters if p.grad is not None).grad.fill_(math.nan)
        return step(amp, optimizer, parameters, **more)

    monkeypatch.setattr(Amp, "step", poisoned)
    place = tmp_path / "run"
    outcome = run_here(
        training.main, training.words(place, "--max-bad-steps", 2, "--save-every", 1)
    )
    assert outcome.code == 1, outcome.text
    assert "not finite for 2 steps in a row" in outcome.last_line and taken == [4]
    assert outcome.text.count("this step is not applied") == 1
    run_dir = training.run_dir(place)
    saved = [*run_dir.glob("last.p*"), *run_dir.glob("*.pth")]
    assert saved, sorted(run_dir.iterdir())
    for path in saved:
        assert all(map(is_finite, tensors(torch.load(path)["parts"]).values())), path
