"""multimodal/setup_environment.sh on the stubs of test_setup.py, which holds setup.sh itself."""

from __future__ import annotations

import pytest

from tests.harness import ROOT
from tests.shell.test_setup import stub

NEEDED = ("setup.sh", "multimodal/setup_environment.sh", "requirements/multimodal.txt")


@pytest.fixture
def site(house):
    house.take(*NEEDED)
    house.write("requirements/lock.txt", "alpha==1.0\nbeta==2.0\n")
    house.write("python3", stub("3.11.4 yes"), house.bin)
    house.calls = house.root.parent / "pip_calls"
    house.env["PIP_CALLS"] = str(house.calls)
    house.script = house.root / "multimodal/setup_environment.sh"
    return house


def test_it_makes_venv_beside_the_script_from_the_recipes_requirements(site):
    result = site.run("bash", site.script, cwd=site.root / "multimodal")
    assert result.returncode == 0, result.stderr
    assert "creating multimodal/venv with python3 (3.11.4)" in result.stdout
    assert result.stdout.splitlines()[-1] == "ready: source venv/bin/activate"
    (call,) = site.calls.read_text().splitlines()
    assert call.endswith(f"-r {site.root}/requirements/multimodal.txt")
    assert not [word for word in call.split() if "index" in word or "://" in word]
    assert (site.root / "multimodal/venv/bin/python").exists()
    assert not (site.root / ".venv").exists()
    assert not list(site.root.parent.rglob("pwned"))
    with (site.root / "requirements/multimodal.txt").open("a") as lines:
        lines.write("gamma\n")
    for _ in range(2):  # what has changed is installed once
        assert site.run("bash", site.script).returncode == 0
    assert len(site.calls.read_text().splitlines()) == 2


def test_a_failed_installation_names_the_command_that_goes_on(site):
    result = site.run("bash", site.script, env={"PIP_EXIT": "1"})
    assert result.returncode == 1
    assert "run multimodal/setup_environment.sh again to continue from here" in result.stderr
    assert "ready" not in result.stdout


def test_a_torchaudio_that_does_not_import_is_named(site):
    found = '  *"find_spec(\\"torchaudio\\")"*) exit 0 ;;'
    broken = '  *"import torchaudio"*) exit 1 ;;'
    text = stub("3.11.4 yes").replace("  *)", f"{found}\n{broken}\n  *)", 1)
    site.write("python3", text, site.bin)
    result = site.run("bash", site.script)
    assert result.returncode == 3
    assert "pip uninstall torchaudio" in result.stderr


def test_no_requirement_pulls_torchaudio():
    for path in (ROOT / "requirements").glob("*.txt"):
        names = [line.split("#")[0] for line in path.read_text().splitlines()]
        assert not [name for name in names if "torchaudio" in name], path
