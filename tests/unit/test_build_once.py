"""What is made once: whole, by one process at a time, anew when anything is amiss."""

import os
import signal
import subprocess
import sys
import textwrap
from subprocess import PIPE

import pytest

from shared.build_once import build_once
from shared.errors import UserError
from tests.harness import ROOT

# Says when it begins, writes five files with its process id, waits for a line before it ends.
SLOWLY = textwrap.dedent(
    """
    import logging, os, sys, time
    from pathlib import Path
    from shared.build_once import build_once

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    root, pause = Path(sys.argv[1]), float(sys.argv[2])

    def make():
        (root / "data").mkdir(exist_ok=True)
        print("making", flush=True)
        for number in range(5):
            time.sleep(pause)
            (root / "data" / f"{number}.txt").write_text(str(os.getpid()))
        sys.stdin.readline()

    build_once(root / "demo.json", {"version": 1, "seed": 0}, [root / "data"], make)
    """
)


def start(root, pause=0.05):
    command = [sys.executable, "-c", SLOWLY, str(root), str(pause)]
    pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def contents(root):
    return {path.name: path.read_text() for path in (root / "data").iterdir()}


class Maker:
    """Writes two files and a loose one; counts how often."""

    def __init__(self, root):
        self.root, self.calls = root, 0

    def __call__(self):
        self.calls += 1
        (self.root / "data" / "deep").mkdir(parents=True, exist_ok=True)
        (self.root / "data" / "deep" / "a.txt").write_text("a")
        (self.root / "data" / "b.txt").write_text("b")
        (self.root / "list.json").write_text("[]")

    def build(self, seed=0, version=1):
        parts = [self.root / "data", self.root / "list.json"]
        build_once(self.root / "demo.json", {"version": version, "seed": seed}, parts, self)


@pytest.fixture
def maker(tmp_path):
    return Maker(tmp_path / "demo")


def test_one_that_waits_says_so_and_takes_over_what_the_other_has_made(tmp_path):
    first = start(tmp_path)
    assert first.stdout.readline() == "making\n"
    second = start(tmp_path)
    line = f"another process is at work on {tmp_path}: waiting for it\n"
    assert second.stderr.readline() == line
    assert second.poll() is None
    first.communicate("\n", timeout=60)
    assert second.communicate(timeout=60) == ("", "")
    assert (first.returncode, second.returncode) == (0, 0)
    assert contents(tmp_path) == {f"{n}.txt": str(first.pid) for n in range(5)}


def test_of_those_that_wait_one_ends_by_a_signal_and_one_takes_over_from_a_killed_process(tmp_path):
    first = start(tmp_path, pause=60)
    assert first.stdout.readline() == "making\n"
    (tmp_path / "data" / "half.txt").write_text("half")
    second, third = start(tmp_path, pause=0), start(tmp_path)
    assert "waiting" in second.stderr.readline() and "waiting" in third.stderr.readline()
    third.send_signal(signal.SIGINT)
    third.communicate(timeout=60)
    assert third.returncode in (-signal.SIGINT, 130)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    assert second.communicate(timeout=60)[0] == "making\n"
    assert contents(tmp_path) == {f"{n}.txt": str(second.pid) for n in range(5)}


def test_what_is_whole_stays_as_it_is_also_with_files_beside(maker):
    maker.build()
    (maker.root / "data" / "cache.npy").write_text("made by a run")
    maker.build()
    assert maker.calls == 1
    assert (maker.root / "data" / "cache.npy").exists()


@pytest.mark.parametrize("victim", ["data/deep/a.txt", "list.json", "demo.json"])
def test_a_file_that_has_gone_is_made_anew(maker, victim):
    maker.build()
    (maker.root / victim).unlink()
    maker.build()
    assert maker.calls == 2
    assert (maker.root / victim).exists()


@pytest.mark.parametrize("other", [{"seed": 1}, {"version": 2}])
def test_another_seed_or_version_finds_the_parts_empty(maker, other):
    maker.build()
    (maker.root / "data" / "of the one before.txt").write_text("")
    (maker.root / "runs").mkdir()
    maker.build(**other)
    assert maker.calls == 2
    assert not (maker.root / "data" / "of the one before.txt").exists()
    assert (maker.root / "runs").exists()  # not one of the parts
    maker.build(**other)
    assert maker.calls == 2


def test_a_link_among_the_parts_is_taken_away_and_not_followed(maker, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    (maker.root / "data").mkdir(parents=True)
    (maker.root / "data" / "link").symlink_to(elsewhere)
    maker.build()
    assert not (maker.root / "data" / "link").exists()
    assert (elsewhere / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("damaged", ["", '{"version": 1, "seed": 0}', '{"files": 7}'])
def test_a_marker_that_says_nothing_of_use_is_none(maker, damaged):
    maker.build()
    (maker.root / "demo.json").write_text(damaged)
    maker.build()
    assert maker.calls == 2


def test_where_nothing_can_be_written_one_line_says_so(tmp_path):
    (tmp_path / "demo").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written"):
        Maker(tmp_path / "demo").build()
