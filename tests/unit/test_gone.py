"""A flag or command that is gone says in one line what to type instead, with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING = "face_distill/train_distill.py"
TYPED = [  # what was typed, and what to type instead
    ("shared/tools/monitor.py --notify http://localhost/x", "monitor.py --follow; COMMAND"),
    ("shared/tools/monitor.py RUN_DIR --notify=http://localhost/x", "monitor.py --follow; COMMAND"),
    ("shared/tools/report.py compare RUN RUN", "type tensorboard --logdir"),
    (f"{TRAINING} --shard-head", "--shard-head is gone: leave it out"),
    (f"{TRAINING} --sample_rate 0.1", "--sample-rate is gone: leave it out"),
    (f"{TRAINING} --at_mode cosine", "--at-mode cosine is gone: type zagoruyko"),
    (f"{TRAINING} --at-mode=cosine", "--at-mode cosine is gone: type zagoruyko"),
]


@pytest.mark.parametrize(("typed", "instead"), TYPED)
def test_what_is_gone_names_what_to_type_instead(typed: str, instead: str) -> None:
    refused(instead, *typed.split())


def refused(instead: str, *words: object) -> None:
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert " is gone: " in line
    assert instead in line


def test_a_setting_that_is_gone_is_refused_in_a_file_too(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("shard_head: true")
    refused("--shard-head is gone: leave it out", TRAINING, "--config", settings)
