"""run_tests.sh and tests/conftest.py, on a handful of tests of their own."""

from __future__ import annotations

import re

import pytest

CLOSING = re.compile(r"=+ .*(passed|failed|error).* in [\d.]+s.*=+")


@pytest.fixture
def site(house):
    """A house with run_tests.sh, the real conftest and a few tests in unit, shell and full."""
    house.take("run_tests.sh", "tests/conftest.py", "pyproject.toml")
    house.write("setup.sh", "#!/bin/sh\nexit 0\n")
    house.python(".venv/bin/python", "root")
    house.write(
        "tests/unit/test_a.py",
        "import pytest\n"
        "def test_quick(): pass\n"
        "@pytest.mark.slow\n"
        "def test_slow(): pass\n"
        "@pytest.mark.gpu\n"
        "@pytest.mark.skip\n"
        "def test_skipped(): pass\n",
    )
    house.write("tests/shell/test_b.py", "def test_shell(): pass\n")
    house.write("tests/full/test_c.py", "def test_as_documented(): pass\n")
    for folder in ("recipes", "faults"):
        (house.root / "tests" / folder).mkdir()
    house.script = house.root / "run_tests.sh"
    return house


def closing_line(result) -> str:
    last = result.stdout.splitlines()[-1]
    assert CLOSING.fullmatch(last), result.stdout + result.stderr
    return last


@pytest.mark.parametrize(
    ("words", "passed"), [([], "3 passed"), (["--fast"], "1 passed"), (["--full"], "4 passed")]
)
def test_each_tier_runs_its_tests_and_ends_with_pytests_closing_line(site, words, passed):
    result = site.run("sh", site.script, *words, cwd="/")
    assert result.returncode == 0, result.stdout
    assert passed in closing_line(result)


def test_a_selection_keeps_the_tier_and_a_single_test_can_be_named(site):
    result = site.run(site.script, "--fast", "tests/unit/test_a.py", "-k", "quick or slow")
    assert result.returncode == 0, result.stdout
    assert "1 passed" in closing_line(result)
    result = site.run(site.script, "tests/unit/test_a.py::test_slow")
    assert "1 passed" in closing_line(result)


def test_a_failed_set_up_ends_the_tests_with_its_code(site):
    site.write("setup.sh", "#!/bin/sh\nexit 3\n")
    assert site.run(site.script).returncode == 3


def test_help_shows_the_usage_and_runs_nothing(site):
    site.write("setup.sh", "#!/bin/sh\nexit 3\n")
    result = site.run(site.script, "--help")
    assert result.returncode == 0
    assert "--fast" in result.stdout
    assert "passed" not in result.stdout


@pytest.mark.full
def test_a_hang_that_hears_no_signal_ends_its_process_and_shows_where(site):
    conftest = (site.root / "tests/conftest.py").read_text()
    site.write("tests/conftest.py", conftest.replace("GRACE = 30", "GRACE = 0.5"))
    site.write(
        "tests/unit/test_d.py",
        "import pytest, signal, time\n@pytest.mark.limit(0.3)\ndef test_deaf():\n"
        "    signal.signal(signal.SIGALRM, signal.SIG_IGN)\n    time.sleep(60)\n",
    )
    result = site.run(site.script, "tests/unit/test_d.py")
    assert result.returncode == 1
    assert "test_deaf" in result.stdout
    assert 'test_d.py", line 5' in result.stderr + result.stdout


def test_a_hang_fails_serial_tests_share_a_worker_and_no_environment_is_the_users(site):
    site.write(
        "tests/unit/test_d.py",
        "import os, pytest, time\n"
        "def test_environment():\n"
        "    assert 'HF_HOME' not in os.environ and 'WORLD_SIZE' not in os.environ\n"
        "    assert os.environ['HF_HUB_OFFLINE'] == os.environ['OMP_NUM_THREADS'] == '1'\n"
        "@pytest.mark.limit(0.3)\n"
        "def test_hangs(): time.sleep(60)\n",
    )
    site.write(
        "tests/unit/test_e.py",
        "import os, pytest\npytestmark = pytest.mark.serial\n"
        "@pytest.mark.parametrize('i', range(6))\n"
        "def test_where(i): print('worker', os.getpid())\n",
    )
    env = {"HF_HOME": "/mine", "WORLD_SIZE": "4"}
    result = site.run(site.script, "-rP", env=env)
    assert result.returncode == 1
    assert "1 failed, 10 passed" in closing_line(result)
    assert "ran for more than 0.3 s" in result.stdout
    workers = re.findall(r"worker (\d+)", result.stdout)
    assert len(workers) == 6
    assert len(set(workers)) == 1
