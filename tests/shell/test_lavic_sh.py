"""lavic's scripts: the settings one a line, each of which can go; where logs and words end up.

What all logged runs share, as nohup and --help: tests/shell/test_common_sh.py.
"""

import re
from pathlib import Path

import pytest

from lavic.src.knowledge_distillation import Config
from shared.config import parse

SCRIPT = "lavic/run_training.sh"
FILES = (SCRIPT, "lavic/monitor_training.sh", "shared/shell/common.sh", "shared/shell/log.sh")
LINES = [
    line
    for line in Path(__file__).resolve().parents[2].joinpath(SCRIPT).read_text().splitlines()
    if line.startswith("  --")
]


@pytest.fixture
def recorder(house):
    """The house with the scripts, and a python that writes down what it is given."""
    house.take(*FILES)
    house.write("recorder", '#!/bin/sh\nprintf "%s\\n" "$@" > "$WORDS"\necho trained\n', house.bin)
    house.env |= {"PYTHON": str(house.bin / "recorder"), "WORDS": str(house.bin / "words")}
    return house


def words_of(house, *command, **options):
    done = house.run("bash", *command, **options)
    assert done.returncode == 0, done.stderr
    return (house.bin / "words").read_text(encoding="utf-8").splitlines()


def test_the_documented_settings_are_passed_and_the_log_has_the_documented_name(recorder):
    recipe = recorder.root / "lavic"
    assert words_of(recorder, recorder.root / SCRIPT) == [
        str(recipe / "src" / "knowledge_distillation.py"),
        *("--batch_size", "1", "--num_epochs", "1", "--lr", "5e-5", "--max_samples", "5000"),
        *("--train_data", str(recipe / "data" / "item2meta_train.json")),
        *("--val_data", str(recipe / "data" / "item2meta_valid.jsonl")),
        *("--output_dir", str(recipe / "src" / "out_distilled")),
    ]
    logs = recipe / "logs"
    (log,) = logs.glob("training_*.log")
    assert re.fullmatch(r"training_\d{8}_\d{6}\.log", log.name)
    assert (logs / "latest.log").resolve() == log.resolve()
    assert log.read_text(encoding="utf-8").endswith("trained\n")
    assert (logs / "run.pid").read_text().strip().isdigit()


@pytest.mark.parametrize("line", LINES, ids=[line.split()[0] for line in LINES])
def test_each_line_can_be_deleted_or_commented(recorder, line):
    assert len(LINES) == 7
    path = recorder.root / SCRIPT
    whole = words_of(recorder, path)
    at, text = whole.index(line.split()[0]), path.read_text(encoding="utf-8")
    assert text.count(line) == 1
    for changed in ("", f"# {line}"):
        path.write_text(text.replace(line, changed), encoding="utf-8")
        left = words_of(recorder, path)
        assert left == whole[:at] + whole[at + 2 :]
        parse(Config, left[1:])


def test_what_is_typed_comes_last_and_wins_and_the_demo_has_settings_of_its_own(recorder):
    typed = ["--max_samples", "all", "--lr", "1e-4", "--train_data", "own data.json"]
    given = words_of(recorder, recorder.root / SCRIPT, *typed, cwd=recorder.bin)
    assert given[-6:] == typed
    found = parse(Config, given[1:])
    assert (found.max_samples, found.lr, found.batch_size) == ("all", 1e-4, 1)
    assert words_of(recorder, recorder.root / SCRIPT, "--demo")[1:] == ["--demo"]


def test_the_monitor_is_the_houses_for_this_recipe(recorder):
    given = words_of(recorder, recorder.root / "lavic" / "monitor_training.sh", "--once", "--json")
    assert given == [
        str(recorder.root / "shared" / "tools" / "monitor.py"),
        *("--recipe", "lavic", "--once", "--json"),
    ]
