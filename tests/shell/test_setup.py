"""setup.sh, with stub interpreters that note what pip was asked for."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

STUB = """#!/bin/sh
# Stands for an interpreter and its pip: VERDICT answers the probe, venv copies this file.
case "$*" in
  *ensurepip*) echo "@VERDICT@" ;;
  *"-m venv"*)
    for last; do :; done
    mkdir -p "$last/bin" "$last/lib/python3.11/site-packages"
    cp "$0" "$last/bin/python" ;;
  *"pip --version"*) echo "pip 99" ;;
  *"pip install"*)
    echo "$*" >>"$PIP_CALLS"
    echo "WARNING: Location '/somewhere' is ignored: it is neither a file nor a directory."
    [ -z "$PIP_SAYS" ] || echo "$PIP_SAYS"
    [ -z "$PIP_SECONDS" ] || exec sleep "$PIP_SECONDS"
    exit "${PIP_EXIT:-0}" ;;
  *) exec "@PYTHON@" "$@" ;;
esac
"""


def stub(verdict: str) -> str:
    return STUB.replace("@VERDICT@", verdict).replace("@PYTHON@", sys.executable)


@pytest.fixture
def site(house):
    """A house with setup.sh, a lock of two packages, and Python 3.11.4 as python3."""
    house.take("setup.sh")
    house.write("requirements/lock.txt", "alpha==1.0\nbeta==2.0\n")
    house.write("python3", stub("3.11.4 yes"), house.bin)
    house.calls = house.root.parent / "pip_calls"
    house.env["PIP_CALLS"] = str(house.calls)
    house.setup = house.root / "setup.sh"
    house.stamp = house.root / ".venv" / "setup.stamp"
    return house


def pip_calls(site) -> list[str]:
    return site.calls.read_text().splitlines() if site.calls.exists() else []


def refused(result) -> str:
    """The one line of a refusal."""
    assert result.returncode == 3
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_first_use_installs_the_lock_and_says_so(site):
    result = site.run(site.setup)
    assert result.returncode == 0, result.stderr
    assert "creating .venv with python3 (3.11.4)" in result.stdout
    assert "installing 2 packages" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("setup: ready after")
    assert "ignored" not in result.stdout + result.stderr
    assert site.stamp.exists()
    assert not list(site.root.parent.rglob("pwned"))
    (call,) = pip_calls(site)  # the user's configuration decides where packages come from
    assert call.endswith(f"-r {site.root}/requirements/lock.txt")
    assert not [word for word in call.split() if "index" in word or "://" in word]


def test_a_second_call_is_silent_until_the_lock_changes_or_python_is_gone(site):
    site.run(site.setup)
    result = site.run(site.setup)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len(pip_calls(site)) == 1
    keepsake = site.write(".venv/keepsake", "")
    site.write("requirements/lock.txt", "alpha==1.1\n")
    result = site.run(site.setup)
    assert result.returncode == 0
    assert "creating" not in result.stdout
    assert len(pip_calls(site)) == 2
    assert keepsake.exists()
    assert site.run(site.setup).stdout == ""
    (site.root / ".venv/bin/python").unlink()
    result = site.run(site.setup)
    assert result.returncode == 0
    assert "creating .venv" in result.stdout


@pytest.mark.parametrize("shell", [["sh"], ["env", "-i", "LC_ALL=C", "PATH={}", "sh"]])
def test_any_shell_and_a_bare_environment_will_do(site, shell):
    words = [word.format(site.bin) for word in shell]
    result = site.run(*words, site.setup, env={"PIP_CALLS": ""}, cwd="/")
    assert result.returncode == 0, result.stderr
    assert site.stamp.exists()


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("3.9.18 old", "python3 is 3.9.18, and torch and numpy need Python 3.11 or newer"),
        ("3.11.2 no-venv", "apt install python3-venv"),
        (None, "no Python found"),
    ],
)
def test_a_machine_without_the_right_python_is_refused_in_one_line(site, verdict, said):
    (site.bin / "python3").unlink()
    if verdict:
        site.write("python3", stub(verdict), site.bin)
    assert said in refused(site.run(site.setup))
    assert not pip_calls(site)


BROKEN = "#!/bin/sh\necho 'no such version' >&2; exit 127\n"


@pytest.mark.parametrize(
    ("others", "taken"),
    [
        (  # a newer one beside an old python3, and a version manager's empty shim
            {"python3": stub("3.9.18 old"), "python3.12": stub("3.12.1 yes"), "python3.13": BROKEN},
            "python3.12 (3.12.1)",
        ),
        ({"python3.13": stub("3.13.0 no-venv")}, "python3 (3.11.4)"),
    ],
)
def test_of_several_pythons_the_first_that_will_do_is_taken(site, others, taken):
    for name, text in others.items():
        site.write(name, text, site.bin)
    assert f"with {taken}" in site.run(site.setup).stdout


def test_the_named_python_is_taken_or_refused_by_name(site):
    mine = site.write("mine/python", stub("3.12.9 yes"))
    assert f"with {mine} (3.12.9)" in site.run(site.setup, env={"PYTHON": str(mine)}).stdout
    (site.root / ".venv/bin/python").unlink()
    old = site.write("mine/old", stub("3.10.1 old"))
    assert f"{old} is 3.10.1" in refused(site.run(site.setup, env={"PYTHON": str(old)}))


@pytest.mark.parametrize(("version", "verdict"), [((3, 10, 12), "old"), ((3, 11, 0), "yes")])
def test_the_probe_judges_real_version_numbers(site, version, verdict):
    """The stubs above answer for the probe; here its own text runs, in a Python that lies."""
    liar = f"import sys; sys.version_info = {version}; exec(sys.argv.pop(1))"
    site.write(
        "python3",
        f'#!/bin/sh\n[ "$3" = -c ] && exec "{sys.executable}" -c "{liar}" "$4"\nexit 9\n',
        site.bin,
    )
    result = site.run(site.setup)
    shown = ".".join(map(str, version))
    if verdict == "old":
        assert f"python3 is {shown}" in refused(result)
    else:
        assert f"creating .venv with python3 ({shown})" in result.stdout


def test_too_little_disk_is_refused_with_both_figures(site):
    site.write(
        "df",
        "#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted on\n"
        "echo '//server/my share 90000000 84800000 5200000 94% /mnt/my disk'\n",
        site.bin,
    )
    line = refused(site.run(site.setup))
    assert "5.2 GB are free" in line
    assert 8.9 <= float(line.split(" GB are needed")[0].split()[-1]) <= 9.0
    assert not pip_calls(site)


def test_a_failing_pip_shows_its_last_lines_and_the_next_call_goes_on(site):
    result = site.run(site.setup, env={"PIP_EXIT": "1", "PIP_SAYS": "ERROR: no such alpha"})
    assert result.returncode == 1
    assert "ERROR: no such alpha" in result.stderr
    assert "is ignored" not in result.stderr
    log = site.root / ".venv/setup.log"
    assert str(log) in result.stderr.splitlines()[-1] and "no such alpha" in log.read_text()
    assert not site.stamp.exists()
    says = "OSError: [Errno 28] No space left on device"
    result = site.run(site.setup, env={"PIP_EXIT": "1", "PIP_SAYS": says})
    assert "TMPDIR=" in result.stderr.splitlines()[-1]
    again = site.run(site.setup)
    assert again.returncode == 0
    assert "creating" not in again.stdout


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interruption_ends_pip_and_leaves_no_stamp(site, number, code):
    process = site.start(site.setup, env={"PIP_SECONDS": "30"})
    wait_for(lambda: pip_calls(site))
    time.sleep(0.1)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not site.stamp.exists()
    assert site.run(site.setup).returncode == 0


def test_after_a_kill_the_next_call_installs_again(site):
    process = site.start(site.setup, env={"PIP_SECONDS": "30"})
    wait_for(lambda: pip_calls(site))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert site.run(site.setup).returncode == 0
    assert len(pip_calls(site)) == 2


def test_a_half_installed_package_is_not_taken_for_a_whole_one(site):
    site.run(site.setup)
    packages = site.root / ".venv/lib/python3.11/site-packages"
    half, whole = packages / "alpha-1.0.dist-info", packages / "beta-2.0.dist-info"
    for package in (half, whole):
        package.mkdir()
        (package / "METADATA").touch()
    (whole / "RECORD").touch()
    site.stamp.unlink()
    site.run(site.setup)
    assert not half.exists()
    assert whole.exists()


def test_a_venv_of_an_old_python_is_left_alone(site):
    theirs = site.write(".venv/bin/python", stub("3.10.4 old"))
    assert "move it away" in refused(site.run(site.setup))
    assert theirs.exists()


def test_two_setups_at_once_install_once(site):
    first = site.start(site.setup, env={"PIP_SECONDS": "0.5"})
    wait_for(lambda: pip_calls(site))
    second = site.start(site.setup)
    outputs = [process.communicate(timeout=20)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(pip_calls(site)) == 1
    assert "waiting" in outputs[1]


@pytest.mark.slow
def test_a_real_environment_is_made_at_an_awkward_path(site):
    """A real interpreter, venv and pip, with a lock that names nothing."""
    site.write("requirements/lock.txt", "# nothing\n")
    env = {"PYTHON": sys.executable, "LC_ALL": "C"}
    result = site.run("sh", site.setup, env=env, cwd="/")
    assert result.returncode == 0, result.stderr
    python = site.root / ".venv/bin/python"
    assert site.run(python, "-m", "pip", "--version").returncode == 0
    assert Path(site.run(python, "-c", "import sys; print(sys.prefix)").stdout.strip()) == (
        site.root / ".venv"
    )
    assert site.run("sh", site.setup, env=env).stdout == ""
