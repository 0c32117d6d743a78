"""A flag or command that is gone says in one line what to type instead, with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TYPED = {  # what was typed: what to type instead
    "shared/tools/monitor.py --notify http://localhost/x": "monitor.py --follow; COMMAND",
    "shared/tools/monitor.py RUN_DIR --notify=http://localhost/x": "monitor.py --follow; COMMAND",
    "shared/tools/report.py compare RUN RUN": "tensorboard --logdir DIRECTORY",
}


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_gone_names_what_to_type_instead(typed: str) -> None:
    command = [sys.executable, *typed.split()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "is gone; type instead" in line
    assert TYPED[typed] in line
