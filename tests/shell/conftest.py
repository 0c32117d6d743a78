"""A house of its own for every shell test: an awkward path, stub programs, a bare PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = (
    *("bash", "sh", "env", "cat", "cp", "cut", "date", "df", "dirname", "du", "flock", "grep"),
    *("ln", "mkdir", "mv", "readlink", "rm", "sed", "sleep", "tail", "tee", "touch"),
)


class House:
    """A directory whose name has a space, a quote, Chinese and a command in it."""

    def __init__(self, base: Path) -> None:
        self.root = base / "数据 it's $(touch pwned)"
        self.root.mkdir()
        self.bin = base / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/no/{tool}")
        self.env = {"PATH": str(self.bin)}

    def take(self, *names: str) -> None:
        """Copy files of the repository to the same place in the house."""
        for name in names:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, self.root / name)

    def write(self, name: str, text: str, directory: Path | None = None) -> Path:
        """An executable file of the house."""
        path = (directory or self.root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return path

    def python(self, name: str, note: str) -> Path:
        """An interpreter in the house: this test's own, with NOTE in its environment."""
        return self.write(name, f'#!/bin/sh\nNOTE="{note}" exec "{sys.executable}" "$@"\n')

    def start(self, *command: object, **options: Any) -> subprocess.Popen[str]:
        """Start a command in a process group of its own."""
        settings: dict[str, Any] = {
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            **{"encoding": "utf-8", "errors": "surrogateescape", "start_new_session": True},
            **options,
        }
        settings["env"] = {**self.env, **settings.get("env", {})}
        words = [os.fspath(word) if isinstance(word, Path) else str(word) for word in command]
        return subprocess.Popen(words, **settings)

    def run(self, *command: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        process = self.start(*command, **options)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)
