"""How a run begins: what --resume means for what is there, and what is put back."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shared import checkpoint, seed
from shared.checkpoint import Position
from shared.distributed import World
from shared.errors import UserError
from shared.run_directory import Decision, continue_from, decide

LAST = "last.pt"
IDENTITY = {"batch_size": 8, "world_size": 1}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "run.lock").touch()
    return directory


def leave(run_dir: Path, state: str, step: int = 5, checkpoints: tuple[str, ...] = (LAST,)) -> None:
    """Leave in `run_dir` what a run in `state` leaves."""
    status = {"state": state, "step": step}
    (run_dir / "status.json").write_text(json.dumps(status))
    (run_dir / "config.json").write_text(json.dumps({"identity": IDENTITY}))
    for name in checkpoints:
        (run_dir / name).touch()


def decided(run_dir: Path, resume: str = "auto", identity: Any = None, again: bool = False):
    return decide(run_dir, LAST, resume, IDENTITY if identity is None else identity, again)


def test_an_empty_directory_is_begun_in(run_dir: Path) -> None:
    assert decided(run_dir) == decided(run_dir, again=True) == Decision()


def test_never_begins_anew_and_keeps_what_was_there(run_dir: Path) -> None:
    leave(run_dir, "stopped")
    assert decided(run_dir, "never") == Decision(move_aside=True)


def test_a_run_without_a_checkpoint_makes_room(run_dir: Path) -> None:
    leave(run_dir, "failed", checkpoints=())
    decision = decided(run_dir)
    assert (decision.checkpoint, decision.move_aside) == (None, True)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_took_no_step_leaves_nothing_worth_moving(run_dir: Path, resume: str) -> None:
    leave(run_dir, "failed", step=0, checkpoints=())
    (run_dir / "metrics.jsonl").touch()
    (run_dir / "tensorboard").mkdir()
    (run_dir / "tensorboard" / "events.out.tfevents.1.host.2.0").touch()
    assert decided(run_dir, resume) == Decision()


@pytest.mark.parametrize("name", [LAST, "config.json"])
def test_other_peoples_files_are_never_overwritten(run_dir: Path, name: str) -> None:
    (run_dir / "thesis.txt").touch()
    assert decided(run_dir) == Decision()
    (run_dir / name).write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match=f"holds {name} and no run of this toolkit"):
        decided(run_dir)


def test_a_path_is_taken_whatever_the_run_was(run_dir: Path) -> None:
    leave(run_dir, "done")
    for target in (run_dir, run_dir / LAST):
        decision = decided(run_dir, str(target), {"batch_size": 1})
        assert decision == Decision(run_dir / LAST, is_named=target.is_file())


@pytest.mark.parametrize("resume", ["auto", "never", "last.1.pt"])
def test_processes_started_again_continue_from_the_newest_whatever_was_typed(run_dir, resume):
    leave(run_dir, "running", checkpoints=(LAST, "last.1.pt"))
    typed = str(run_dir / resume) if resume.endswith("pt") else resume
    assert decided(run_dir, typed, {"batch_size": 1}, again=True) == Decision(run_dir / LAST)


def written(path: Path) -> nn.Linear:
    """The part of a run whose checkpoint, of step 7 in epoch 2, is at `path`."""
    net = nn.Linear(2, 1)
    checkpoint.save(path, checkpoint.snapshot({"net": net}, Position(7, 2, 1), [seed.get_state()]))
    return net


def continued(decision: Decision, net: nn.Module) -> Position:
    return continue_from(decision, {"net": net}, World(), total_steps=7, allow_reshard=False)


@pytest.mark.parametrize("decision", [Decision(), Decision(Path("/nowhere/last.pt"))])
def test_without_a_checkpoint_it_begins_at_the_beginning(decision: Decision) -> None:
    assert continued(decision, nn.Linear(2, 1)) == Position()


@pytest.mark.parametrize(
    "broken", [{"generators": [{"python": [3, [1], None]}]}, {"position": {"page": 3}}]
)
def test_states_of_another_form_are_refused_in_one_line(tmp_path, broken):
    net = written(tmp_path / LAST)
    checkpoint.save(tmp_path / LAST, checkpoint.load(tmp_path / LAST) | broken)
    before = seed.get_state()
    with pytest.raises(UserError, match=r"last\.pt: its random states or position do not fit: "):
        continued(Decision(tmp_path / LAST), net)
    seed.set_state(before)
