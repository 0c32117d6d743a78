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


def test_an_empty_directory_is_begun_in(run_dir: Path) -> None:
    assert decide(run_dir, LAST, "auto", IDENTITY, restarted=False) == Decision()


def test_never_begins_anew_and_keeps_what_was_there(run_dir: Path) -> None:
    leave(run_dir, "stopped")
    decision = decide(run_dir, LAST, "never", IDENTITY, restarted=False)
    assert decision == Decision(move_aside=True)


def test_a_run_without_a_checkpoint_makes_room(run_dir: Path) -> None:
    leave(run_dir, "failed", checkpoints=())
    decision = decide(run_dir, LAST, "auto", IDENTITY, restarted=False)
    assert (decision.checkpoint, decision.move_aside) == (None, True)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_took_no_step_leaves_nothing_worth_moving(run_dir: Path, resume: str) -> None:
    leave(run_dir, "failed", step=0, checkpoints=())
    (run_dir / "metrics.jsonl").touch()
    (run_dir / "tensorboard").mkdir()
    (run_dir / "tensorboard" / "events.out.tfevents.1.host.2.0").touch()
    assert decide(run_dir, LAST, resume, IDENTITY, restarted=False) == Decision()


@pytest.mark.parametrize("name", [LAST, "config.json", "status.json", "metrics.jsonl"])
def test_other_peoples_files_are_never_overwritten(run_dir: Path, name: str) -> None:
    (run_dir / "thesis.txt").touch()
    assert decide(run_dir, LAST, "auto", IDENTITY, restarted=False) == Decision()
    (run_dir / name).write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match=f"holds {name} and no run of this toolkit"):
        decide(run_dir, LAST, "auto", IDENTITY, restarted=False)


@pytest.mark.parametrize("state", ["done", "running"])
def test_a_path_is_taken_whatever_the_run_was(run_dir: Path, tmp_path: Path, state: str) -> None:
    leave(run_dir, state)
    for target in (run_dir, run_dir / LAST):
        decision = decide(run_dir, LAST, str(target), {"batch_size": 1}, restarted=False)
        assert decision == Decision(run_dir / LAST, is_named=target.is_file())


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_processes_started_again_continue_whatever_was_typed(run_dir: Path, resume: str) -> None:
    leave(run_dir, "running")
    decision = decide(run_dir, LAST, resume, {"batch_size": 1}, restarted=True)
    assert decision == Decision(run_dir / LAST)


def test_processes_started_again_do_not_go_back_to_the_checkpoint_named_at_first(
    run_dir: Path,
) -> None:
    leave(run_dir, "running", checkpoints=(LAST, "last.1.pt"))
    decision = decide(run_dir, LAST, str(run_dir / "last.1.pt"), IDENTITY, restarted=True)
    assert decision == Decision(run_dir / LAST)


def test_processes_started_again_before_any_checkpoint_begin_anew(run_dir: Path) -> None:
    leave(run_dir, "running", checkpoints=())
    assert decide(run_dir, LAST, "auto", IDENTITY, restarted=True) == Decision()


def written(path: Path, world_size: int = 1) -> nn.Linear:
    """The part of a run whose checkpoint, of step 7 in epoch 2, is at `path`."""
    net = nn.Linear(2, 1)
    generators = [seed.get_state() for _ in range(world_size)]
    checkpoint.save(path, checkpoint.snapshot({"net": net}, Position(7, 2, 1), generators))
    return net


def continued(decision: Decision, net: nn.Module, allow_reshard: bool = False) -> Position:
    parts = {"net": net}
    return continue_from(decision, parts, World(), total_steps=7, allow_reshard=allow_reshard)


@pytest.mark.parametrize("decision", [Decision(), Decision(Path("/nowhere/last.pt"))])
def test_without_a_checkpoint_it_begins_at_the_beginning(decision: Decision) -> None:
    assert continued(decision, nn.Linear(2, 1)) == Position()


@pytest.mark.parametrize(
    "broken", [{"generators": [{"python": [3, [1], None]}]}, {"position": {"page": 3}}]
)
def test_states_of_another_form_are_refused_in_one_line(
    tmp_path: Path, broken: dict[str, Any]
) -> None:
    net = written(tmp_path / LAST)
    checkpoint.save(tmp_path / LAST, checkpoint.load(tmp_path / LAST) | broken)
    before = seed.get_state()
    with pytest.raises(UserError, match=r"last\.pt: its random states or position do not fit: "):
        continued(Decision(tmp_path / LAST), net)
    seed.set_state(before)
