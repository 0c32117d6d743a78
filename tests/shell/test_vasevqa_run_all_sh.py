"""run_all.sh: the demo on a terminal is a few lines, and all of its output elsewhere."""

import pytest

from tests.shell.test_clipfilter1_sh import Terminal, without_terminal

FILES = ("vasevqa/run_all.sh", "shared/shell/common.sh", "shared/shell/log.sh")


@pytest.fixture
def script(house):
    """The script in a house of its own, with an interpreter that tells what it is to run."""
    house.take(*FILES)
    house.env["PYTHON"] = str(house.write("stub", '#!/bin/sh\necho "runs ${1##*/} $2 $3."\n'))
    return house.root / FILES[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--demo"], "runs run_demos.py vasevqa ."),
        (["--demo", "--force"], "runs run_all.py --demo --force."),
    ],
)
def test_the_demo_alone_on_a_terminal_is_shown_in_a_few_lines(house, script, words, said):
    terminal = Terminal(house, script, *words)
    terminal.wait_for(said)
    assert terminal.finish() == 0


def test_without_a_terminal_everything_is_shown_and_kept(house, script):
    done = without_terminal(house, script, "--demo")
    assert "runs run_all.py --demo ." in done.stdout, done.stderr
    assert "runs run_all.py" in (house.root / "vasevqa/demo/runs/logs/latest.log").read_text()
