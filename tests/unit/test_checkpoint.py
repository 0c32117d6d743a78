import errno
import logging
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared import checkpoint
from shared.amp import EarlyStopping
from shared.checkpoint import DamagedError, Position, find, load, save
from shared.errors import UserError

LAST = "last.pt"


def steps_of(directory: Path) -> dict[str, int]:
    """The step in every checkpoint of the directory, by file name."""
    return {path.name: load(path)["step"] for path in sorted(directory.glob("*.pt"))}


def save_steps(path: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        save(path, {"step": step, "weights": torch.full((100,), step)}, keep)


# saving


def test_a_saved_state_is_read_back(tmp_path: Path) -> None:
    state = {"x": torch.arange(3), "plain": [1, 2.5, None, "é", (True, {"a": 1})]}
    save(tmp_path / LAST, state)
    found = load(tmp_path / LAST)
    assert torch.equal(found.pop("x"), state.pop("x"))
    assert found == state
    assert [path.name for path in tmp_path.iterdir()] == [LAST]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, {"last.pt": 4}),
        (2, {"last.pt": 4, "last.1.pt": 3}),
        (3, {"last.pt": 4, "last.1.pt": 3, "last.2.pt": 2}),
        (9, {"last.pt": 4, "last.1.pt": 3, "last.2.pt": 2, "last.3.pt": 1}),
    ],
)
def test_so_many_are_kept_the_newest_first(
    tmp_path: Path, keep: int, expected: dict[str, int]
) -> None:
    save_steps(tmp_path / LAST, 1, 2, 3, 4, keep=keep)
    assert steps_of(tmp_path) == expected


def test_the_copies_are_made_on_file_systems_without_hard_links_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    save_steps(tmp_path / LAST, 1, 2, 3, keep=3)
    assert steps_of(tmp_path) == {"last.pt": 3, "last.1.pt": 2, "last.2.pt": 1}


def test_the_last_checkpoint_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / LAST, []
    save_steps(path, 1, 2)
    for name in ("replace", "unlink", "hardlink_to", "open"):
        original = getattr(Path, name)

        def watched(self: Path, *args: Any, _original: Any = original, **options: Any) -> Any:
            seen.append(path.exists())
            result = _original(self, *args, **options)
            seen.append(path.exists())
            return result

        monkeypatch.setattr(Path, name, watched)
    save_steps(path, 3)
    assert len(seen) > 6
    assert all(seen)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is refused."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_told_as_such_on_the_first_save(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / LAST, {"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_saves_that_fail_cost_none_of_the_checkpoints_that_are_there(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    save_steps(tmp_path / LAST, 1, 2, 3, keep=3)
    request.getfixturevalue("full_disk")
    for step in (4, 5):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / LAST, {"step": step}, keep=3)
    assert steps_of(tmp_path) == {"last.pt": 3, "last.1.pt": 2, "last.2.pt": 1}


# loading


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_a_file_that_holds_no_dictionary_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "last.pt")
    with pytest.raises(checkpoint.DamagedError, match="holds a list, not a checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


def test_ten_checkpoints_are_tried_from_the_newest_on(tmp_path: Path) -> None:
    path = tmp_path / LAST
    save_steps(path, *range(1, 13), keep=12)
    for number in range(10):
        truncate(checkpoint.previous(path, number))
    found = find(path, explicit=False)
    assert found is not None
    assert (found[0].name, found[1]["step"]) == ("last.10.pt", 2)


class Evil:
    """Its pickle makes a directory when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(
    tmp_path: Path, zipped: bool
) -> None:
    path, target = tmp_path / LAST, tmp_path / "made"
    torch.save({"step": Evil(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises((UserError, DamagedError), match=r"last\.pt"):
        load(path)
    with pytest.raises(UserError, match=r"last\.pt"):
        find(path, explicit=True)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert target.exists()


def test_a_bare_pickle_is_refused_and_runs_no_code(tmp_path: Path) -> None:
    target = tmp_path / "made"
    (tmp_path / LAST).write_bytes(pickle.dumps(Evil(target)))
    with pytest.raises(DamagedError):
        load(tmp_path / LAST)
    assert not target.exists()


# parts


def test_parts_take_their_states() -> None:
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    stopping = EarlyStopping(1)
    states = {"net": other.state_dict(), "stopping": {"best": 0.5, "bad": 3}, "unused": {}}
    checkpoint.load_parts({"net": net, "stopping": stopping}, states, Path("x.pt"))
    assert torch.equal(net.weight, other.weight)
    assert (stopping.best, stopping.bad) == (0.5, 3)


def test_a_missing_part_is_named() -> None:
    with pytest.raises(UserError, match=r"x\.pt lacks optimizer, scheduler"):
        parts: dict[str, Any] = dict.fromkeys(("scheduler", "optimizer"), EarlyStopping(1))
        checkpoint.load_parts(parts, {}, Path("x.pt"))


def test_shapes_that_do_not_fit_are_listed_by_key() -> None:
    state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    smaller = nn.Sequential(nn.Linear(3, 2, bias=False))
    with pytest.raises(UserError) as refused:
        checkpoint.load_parts({"net": smaller}, {"net": state}, Path("x.pt"))
    message = str(refused.value)
    assert "0.weight: (4, 3) → (2, 3)" in message
    assert "1.bias: (2,) → absent" in message
    assert "\n" not in message


def test_a_long_list_of_shapes_is_cut() -> None:
    small, large = (nn.Sequential(*[nn.Linear(n, n) for _ in range(4)]) for n in (2, 3))
    with pytest.raises(UserError, match="and 3 more"):
        checkpoint.load_parts({"net": small}, {"net": large.state_dict()}, Path("x.pt"))


def test_nothing_is_loaded_into_a_model_that_does_not_fit() -> None:
    net = nn.Linear(3, 2)
    before = net.weight.clone()
    state = {"weight": torch.zeros(2, 3), "bias": torch.zeros(5)}
    with pytest.raises(UserError):
        checkpoint.load_parts({"net": net}, {"net": state}, Path("x.pt"))
    assert torch.equal(net.weight, before)


def test_an_optimizer_of_other_parameters_is_refused_by_name() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    state = torch.optim.SGD(one.parameters(), lr=1).state_dict()
    parts: dict[str, Any] = {"optimizer": torch.optim.SGD(two.parameters(), lr=1)}
    with pytest.raises(UserError, match=r"x\.pt: optimizer does not fit"):
        checkpoint.load_parts(parts, {"optimizer": state}, Path("x.pt"))


# room on the disk


def test_size_counts_the_bytes_of_nested_tensors() -> None:
    value = {"a": torch.zeros(10), "b": [torch.zeros(3, dtype=torch.int64), (torch.zeros(2),)]}
    assert checkpoint.size_of({**value, "c": 5, "d": "text"}) == 40 + 24 + 8


@pytest.mark.parametrize(("free", "fits"), [(3_000_000_000, True), (2_999_999_999, False)])
def test_room_for_those_kept_and_the_one_being_written_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free))
    if fits:
        checkpoint.check_space(tmp_path, 1_000_000_000, keep=2)
        return
    with pytest.raises(UserError, match=r"3\.00 GB free, 3\.00 GB needed for 2 checkpoints"):
        checkpoint.check_space(tmp_path, 1_000_000_000, keep=2)


def test_checkpoints_that_are_already_there_need_no_second_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that a full disk stopped could not be continued where there is room for it."""
    save_steps(tmp_path / LAST, 1, 2)
    size = (tmp_path / LAST).stat().st_size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, int(1.5 * size)))
    checkpoint.check_space(tmp_path, size, keep=2)


def test_positions_count_steps_batches_and_epochs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    position = Position()
    for _ in range(3):
        position.advance()
    position.next_epoch()
    position.advance()
    assert position == Position(step=4, epoch=1, batch=1)
