"""tests/full/rehearsal.sh on a repository whose two commands only say what they were given."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "tests/full/rehearsal.sh"
SAYS = '#!/usr/bin/env bash\npwd\nenv | sort\nls -A "$HOME" | wc -l\n'

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(repository: Path, *words: str) -> None:
    who = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    subprocess.run(["git", *who, *words], cwd=repository, check=True, capture_output=True)


def make(repository: Path, demo: str = SAYS, run_tests: str = SAYS) -> Path:
    """A repository with the script and these two commands, and a change that is not committed."""
    (repository / SCRIPT).parent.mkdir(parents=True)
    shutil.copy(ROOT / SCRIPT, repository / SCRIPT)
    for name, text in {"demo.sh": demo, "run_tests.sh": run_tests}.items():
        (repository / name).write_text(text)
        (repository / name).chmod(0o755)
    git(repository, "init", "--quiet")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "the two commands")
    (repository / "demo.sh").write_text("#!/bin/sh\nexit 7\n")
    return repository


def rehearse(repository: Path, *flags: str, **more: str) -> tuple[int, str, Path]:
    """Exit code, output, and the one directory that the rehearsal made."""
    place = repository.parent / "place"
    place.mkdir()
    own = repository / ".venv" / "bin"
    env = {"PATH": f"{own}:{os.environ['PATH']}", "TMPDIR": str(place), "SECRET": "1", **more}
    told = subprocess.run(
        [repository / SCRIPT, *flags], env=env, capture_output=True, encoding="utf-8", check=False
    )
    (base,) = place.iterdir()
    return told.returncode, told.stdout + told.stderr, base


def test_both_commands_meet_a_fresh_machine(tmp_path):
    repository = make(tmp_path / "repository")
    code, output, base = rehearse(repository, PASS_ON="PIP_INDEX_URL", PIP_INDEX_URL="here")
    assert code == 0, output
    for name in ("demo", "run_tests"):
        assert f"{name}.sh: exit 0 after 0.0 minutes" in output
        where, *lines, in_home = (base / "logs" / f"{name}.log").read_text("utf-8").splitlines()
        assert where == str(base / "训练 场")
        settings = dict(line.split("=", 1) for line in lines)
        assert settings["HOME"] == str(base / "home")
        assert in_home.strip() == "0"
        assert (settings["LC_ALL"], settings["PIP_INDEX_URL"]) == ("C", "here")
        assert str(repository) not in settings["PATH"]
        assert settings.keys() - {"PWD", "OLDPWD", "SHLVL", "_"} == {
            *("PATH", "HOME", "LC_ALL", "PIP_INDEX_URL"),
        }
    assert [path.name for path in base.iterdir()] == ["logs"]


def test_a_command_that_fails_or_leaves_files_is_named_and_its_clone_stays(tmp_path):
    demo, run_tests = "#!/bin/sh\necho broken\nexit 3\n", "#!/bin/sh\ntouch crumb ~/.crumb\n"
    repository = make(tmp_path / "repository", demo, run_tests)
    code, output, base = rehearse(repository)
    assert code == 1
    assert "demo.sh: exit 3" in output
    assert "  | broken" in output
    assert "run_tests.sh: exit 0" in output
    assert output.endswith("failed: demo.sh the tree\n")
    assert "?? crumb" in output and "in HOME now: ./.crumb" in output
    assert (base / "训练 场" / "demo.sh").exists()


def test_keep_leaves_the_clone_and_a_dry_run_runs_neither(tmp_path):
    code, output, base = rehearse(make(tmp_path / "kept" / "repository"), "--keep")
    assert code == 0, output
    assert f"the clone stays: {base / '训练 场'}" in output
    assert (base / "训练 场" / "run_tests.sh").exists()
    code, output, base = rehearse(make(tmp_path / "repository"), "--dry-run")
    assert code == 0, output
    assert output.count("would run") == 2
    assert list((base / "logs").iterdir()) == []
    assert not (base / "训练 场").exists()


def test_an_argument_that_is_not_known_is_refused():
    told = subprocess.run([ROOT / SCRIPT, "--kep"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "--kep; allowed: --keep, --dry-run" in told.stderr
