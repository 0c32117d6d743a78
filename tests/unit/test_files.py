import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from shared import files, processes
from shared.errors import UserError


@pytest.mark.parametrize("value", [{"name": "数据", "x": [1, 2.5, None]}, {"file": "caf\udce9"}])
def test_a_written_value_is_read_back_and_nothing_else_is_left(tmp_path: Path, value):
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path):
    def fail_half_way(stream: IO[bytes]) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "state"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, fail_half_way)
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"loss": float("nan")})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_a_part(tmp_path: Path):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    seen: list[bytes] = []

    def write(stream: IO[bytes]) -> None:
        stream.write(b"n")
        stream.flush()
        seen.append(path.read_bytes())
        stream.write(b"ew")

    files.write_atomic(path, write)
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("durable", [True, False])
def test_file_and_directory_are_synced_only_when_it_shall_last(tmp_path, monkeypatch, durable):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    files.write_text(tmp_path / "a", "text", durable=durable)
    assert len(synced) == (2 if durable else 0)


@pytest.mark.parametrize("content", ["[1]", "3", "[" * 100_000, '{"a": ', "", None])
def test_what_is_no_object_is_read_as_an_empty_one(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    assert files.read_object(tmp_path / "a.json") == {}


@pytest.mark.parametrize("end", ['{"ste', '{"name": "数'.encode()[:-1], "[1]\n3\n" + "[" * 100_000])
def test_of_json_lines_what_is_torn_or_no_object_is_passed_over(tmp_path: Path, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"step": 1}\n{"step": 2}\n' + (end.encode() if isinstance(end, str) else end)
    )
    assert list(files.read_json_lines(path)) == [{"step": 1}, {"step": 2}]
    assert list(files.read_json_lines(tmp_path / "absent")) == []


def test_cut_keeps_the_rows_asked_for_whole(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1, "name": "é"}\n{"step": 2}\n{"step": 3}\n{"st')
    files.cut_json_lines(path, lambda row: row["step"] <= 2)
    assert path.read_text(encoding="utf-8") == '{"step": 1, "name": "é"}\n{"step": 2}\n'
    files.cut_json_lines(tmp_path / "absent", lambda row: True)
    assert not (tmp_path / "absent").exists()


def test_a_zombie_is_not_alive():
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet waited for
    assert not processes.is_alive(process.pid)
    process.wait()
    assert processes.is_alive(os.getpid())
    assert not processes.is_alive(process.pid)


def test_move_aside_takes_the_first_free_number_and_what_is_named(tmp_path: Path):
    run = tmp_path / "run"
    (tmp_path / "run.1").mkdir()
    (run / "sub").mkdir(parents=True)
    for name in ("run.lock", "last.pt"):
        (run / name).write_text(name)
    aside = files.move_aside(run, ["last.pt", "sub"])
    assert aside == tmp_path / "run.2"
    assert [path.name for path in run.iterdir()] == ["run.lock"]
    assert sorted(path.name for path in aside.iterdir()) == ["last.pt", "sub"]


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0", "missing"])
def test_what_no_file_can_be_called_is_no_file(tmp_path: Path, name):
    assert not files.is_file(tmp_path / name)


def test_an_output_directory_is_made_or_refused_in_one_line(tmp_path: Path, monkeypatch):
    files.make_output(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--to .*/file/c cannot be made: Not a directory$"):
        files.make_output(tmp_path / "file" / "c", "--to")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"^--out .*/a cannot be written: choose another"):
        files.make_output(tmp_path / "a")
