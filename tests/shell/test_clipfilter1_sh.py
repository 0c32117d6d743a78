"""clipfilter1.sh: the menu on a terminal, the same entries without one; what reaches the script."""

import os
import pty
import subprocess
import time
from pathlib import Path

import pytest

FILES = ("vasevqa/filter/clipfilter1.sh", "shared/shell/common.sh", "shared/shell/log.sh")
ENTRIES = {
    "1": ["--analyze_only"],
    "2": ["--confirm"],
    "4": ["--confirm", "--device", "cpu"],
    "5": ["--confirm", "--device", "cuda:1"],
    "6": ["--analyze_only", "--sample_size", "100"],
}


@pytest.fixture
def script(house):
    """The script in a house of its own, with an interpreter that tells its arguments."""
    house.take(*FILES)
    stub = '[ ! -t 0 ] || echo "may ask"\nfor word in "$@"; do printf "<%s>" "$word"; done\necho\n'
    house.env["PYTHON"] = str(house.write("stub", f"#!/bin/sh\n{stub}"))
    return house.root / FILES[0]


def arguments(text: str, script: Path) -> list[str]:
    """What the stub was called with, after the script's name."""
    line = next(line for line in text.splitlines() if line.startswith("<"))
    words = line.strip()[1:-1].split("><")
    assert words[0] == str(script.with_name("clipfilter1.py"))
    return words[1:]


def without_terminal(house, *words: object, **options) -> subprocess.CompletedProcess[str]:
    return house.run(*words, stdin=subprocess.DEVNULL, **options)


def test_each_entry_without_a_terminal(house, script):
    for entry, flags in {**ENTRIES, "3": ["--threshold", "0.15"]}.items():
        typed = flags if entry == "3" else []
        done = without_terminal(house, script, entry, *typed, "--yes", "--output_dir", "a b")
        assert done.returncode == 0, done.stderr
        assert arguments(done.stdout, script) == [*flags, "--yes", "--output_dir", "a b"]


def test_what_is_no_entry_without_a_terminal_comes_with_exit_2_and_what_to_type(house, script):
    for words in ([], ["--yes"]):
        done = without_terminal(house, script, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "usage: clipfilter1.sh [1-6]" in done.stderr
        for line in ("1. 🔍 仅分析数据集质量分布", "6. 📊 快速分析（100个样本）"):
            assert line in done.stderr
    for words, said in ((["3"], "3 --threshold 0.15"), (["7"], "no entry 7; allowed: 1 to 6")):
        done = without_terminal(house, script, *words)
        assert done.returncode == 2 and said in done.stderr
    done = without_terminal(house, script, "--help")
    assert done.returncode == 0 and "2. 🎯 自动过滤" in done.stdout


def test_the_log_is_beside_the_script_and_called_from_anywhere(house, script, tmp_path):
    link = tmp_path / "filter.sh"
    link.symlink_to(script)
    done = without_terminal(house, link, "1", cwd="/")
    assert done.returncode == 0, done.stderr
    assert "--analyze_only" in (script.parent / "logs" / "latest.log").read_text()


class Terminal:
    """The script with a terminal, and what appears on it."""

    def __init__(self, house, *command: object) -> None:
        self._master, slave = pty.openpty()
        self.process = house.start(*command, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.text = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.text:
            assert time.monotonic() < deadline, self.text
            try:
                self.text += os.read(self._master, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                assert text in self.text, self.text

    def type(self, line: str) -> None:
        os.write(self._master, f"{line}\n".encode())

    def finish(self) -> int:
        code = self.process.wait(30)
        os.close(self._master)
        return code


def test_the_menu_on_a_terminal(house, script):
    terminal = Terminal(house, script, "--batch_size", "4")
    terminal.wait_for("entry (1-6): ")
    assert "3. ⚙️ 自定义阈值过滤" in terminal.text
    terminal.type("2")
    terminal.wait_for("<4>")
    assert "may ask" in terminal.text  # the terminal reaches the script too
    assert arguments(terminal.text, script) == [*ENTRIES["2"], "--batch_size", "4"]
    assert terminal.finish() == 0


def test_the_last_words_of_a_script_that_ends_at_once_reach_the_terminal(house, script):
    """The end of a session's first process hangs the terminal up, for the log's tee as well."""
    terminals = [Terminal(house, script) for _ in range(12)]  # enough to be late at times
    for terminal in terminals:
        terminal.wait_for("entry (1-6): ")
    for terminal in terminals:
        terminal.type("1")
    for terminal in terminals:
        terminal.wait_for("<--analyze_only>")
        assert terminal.finish() == 0


def test_entry_3_asks_for_the_threshold_on_a_terminal(house, script):
    terminal = Terminal(house, script)
    terminal.wait_for("entry (1-6): ")
    terminal.type("3")
    terminal.wait_for("threshold: ")
    terminal.type("0.2; touch pwned")
    terminal.wait_for("pwned>")
    assert arguments(terminal.text, script) == ["--threshold=0.2; touch pwned"]
    assert terminal.finish() == 0
    assert not list(house.root.rglob("pwned"))
