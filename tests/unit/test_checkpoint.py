import errno
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
from shared.checkpoint import DamagedError, find, load, save
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
        (3, {"last.pt": 4, "last.1.pt": 3, "last.2.pt": 2}),
        (9, {"last.pt": 4, "last.1.pt": 3, "last.2.pt": 2, "last.3.pt": 1}),
    ],
)
def test_so_many_are_kept_the_newest_first(tmp_path, keep, expected):
    save_steps(tmp_path / LAST, 1, 2, 3, 4, keep=keep)
    assert steps_of(tmp_path) == expected


def test_the_copies_are_made_on_file_systems_without_hard_links_too(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    save_steps(tmp_path / LAST, 1, 2, 3, keep=3)
    assert steps_of(tmp_path) == {"last.pt": 3, "last.1.pt": 2, "last.2.pt": 1}


def test_the_last_checkpoint_is_there_at_every_moment(tmp_path, monkeypatch):
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


def test_saves_that_fail_say_so_and_cost_none_of_the_checkpoints_that_are_there(
    tmp_path, monkeypatch
):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save_steps(tmp_path / LAST, 1, 2, 3, keep=3)
    monkeypatch.setattr(torch, "save", refuse)
    for step in (4, 5):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / LAST, {"step": step}, keep=3)
    assert steps_of(tmp_path) == {"last.pt": 3, "last.1.pt": 2, "last.2.pt": 1}


# loading


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


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


@pytest.mark.parametrize("kind", ["zipped", "old", "bare"])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path, kind):
    path, target = tmp_path / LAST, tmp_path / "made"
    if kind == "bare":
        path.write_bytes(pickle.dumps(Evil(target)))
    else:
        torch.save({"s": Evil(target)}, path, _use_new_zipfile_serialization=kind == "zipped")
    with pytest.raises((UserError, DamagedError), match=r"last\.pt"):
        load(path)
    with pytest.raises(UserError, match=r"last\.pt"):
        find(path, explicit=True)
    assert not target.exists()
    if kind != "bare":
        torch.load(path, weights_only=False)  # the trap is a real one
        assert target.exists()


# parts


def test_shapes_that_do_not_fit_are_listed_by_key_and_nothing_is_loaded() -> None:
    state = nn.Sequential(*[nn.Linear(3, 4)] * 3).state_dict()
    smaller = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 4))
    before = smaller[1].weight.clone()
    with pytest.raises(UserError) as refused:
        checkpoint.load_parts({"net": smaller}, {"net": state}, Path("x.pt"))
    message = str(refused.value)
    assert "0.weight: (4, 3) → (2, 3)" in message
    assert "2.bias: (4,) → absent" in message
    assert "\n" not in message
    assert torch.equal(smaller[1].weight, before)


# room on the disk


@pytest.mark.parametrize(("free", "fits"), [(3_000_000_000, True), (2_999_999_999, False)])
def test_room_for_those_kept_and_the_one_being_written_is_asked_for(
    tmp_path, monkeypatch, free, fits
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free))
    if fits:
        checkpoint.check_space(tmp_path, 1_000_000_000, keep=2)
        return
    with pytest.raises(UserError, match=r"3\.00 GB free, 3\.00 GB needed for 2 checkpoints"):
        checkpoint.check_space(tmp_path, 1_000_000_000, keep=2)


def test_checkpoints_that_are_already_there_need_no_second_room(tmp_path, monkeypatch):
    """Else a run that a full disk stopped could not be continued where there is room for it."""
    save_steps(tmp_path / LAST, 1, 2)
    size = (tmp_path / LAST).stat().st_size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, int(1.5 * size)))
    checkpoint.check_space(tmp_path, size, keep=2)
