"""A flag or command that is gone says in one line what to type instead, with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from face_distill import train_distill
from shared.tools import monitor, report
from tests.harness import run_here

TRAIN = train_distill.main
TYPED = [  # what was typed, and what to type instead
    (monitor.main, "--notify http://localhost/x", "monitor.py --follow; COMMAND"),
    (monitor.main, "RUN_DIR --notify=http://localhost/x", "monitor.py --follow; COMMAND"),
    (report.main, "compare RUN RUN", "type tensorboard --logdir"),
    (TRAIN, "--shard-head", "--shard-head is gone: leave it out"),
    (TRAIN, "--sample_rate 0.1", "--sample-rate is gone: leave it out"),
    (TRAIN, "--at_mode cosine", "--at-mode cosine is gone: type zagoruyko"),
    (TRAIN, "--at-mode=cosine", "--at-mode cosine is gone: type zagoruyko"),
    (TRAIN, "--config {file}", "--shard-head is gone: leave it out"),
]


@pytest.mark.parametrize(("main", "typed", "instead"), TYPED)
def test_what_is_gone_names_what_to_type_instead(main, typed: str, instead: str, tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text("shard_head: true")
    ended = run_here(main, typed.format(file=file).split())
    assert ended.code == 2, ended.text
    (line,) = ended.text.splitlines()
    assert " is gone: " in line
    assert instead in line
