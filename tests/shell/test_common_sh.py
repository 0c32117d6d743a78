"""shared/shell/common.sh in a recipe's script: interpreter, log, and becoming the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """#!/usr/bin/env bash
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P) || exit 1
source "$recipe/../shared/shell/common.sh"
find_python demo json string
starts_run "$@" && start_log "$recipe/logs" training
run_python "$recipe/job.py" "$@"
"""
JOB = """
import json, os, sys
shown = ("NOTE", "HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE", "TOOLKIT_LOG")
print(json.dumps({"pid": os.getpid(), "cwd": os.getcwd(), "argv": sys.argv[1:],
                  "env": {name: os.environ.get(name) for name in shown}}))
"""


@pytest.fixture
def recipe(house):
    """A house with one recipe, demo/go.sh, and the root environment .venv."""
    house.take("shared/shell/common.sh", "shared/shell/log.sh")
    house.script = house.write("demo/go.sh", SCRIPT)
    house.write("demo/job.py", JOB)
    house.root_python = house.python(".venv/bin/python", "root")
    house.logs = house.root / "demo" / "logs"
    return house


def answer(result: subprocess.CompletedProcess[str]) -> dict:
    """What the job printed, last."""
    assert result.returncode == 0, result.stderr + result.stdout
    return json.loads(result.stdout.splitlines()[-1])


def the_log(house) -> Path:
    (log,) = house.logs.glob("training_*.log")
    return log


def logged(house) -> str:
    """What the log holds by now; a run that is just starting has none."""
    return "".join(path.read_text() for path in house.logs.glob("training_*.log"))


def environments(house) -> dict[str, str]:
    """An environment for every place that is looked at, as a variable or a directory."""
    for place in ("own", "active", "conda", "base"):
        house.python(f"{place}/bin/python", place)
    house.python("demo/venv/bin/python", "recipe")
    return {
        "PYTHON": str(house.root / "own/bin/python"),
        "VIRTUAL_ENV": str(house.root / "active"),
        "CONDA_PREFIX": str(house.root / "conda"),
        "CONDA_DEFAULT_ENV": "mine",
    }


def test_the_interpreter_is_taken_in_the_documented_order(recipe):
    env = environments(recipe)
    found = [answer(recipe.run(recipe.script, env=env))["env"]["NOTE"]]
    for name in ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"):
        del env[name]
        found.append(answer(recipe.run(recipe.script, env=env))["env"]["NOTE"])
    (recipe.root / "demo/venv/bin/python").unlink()
    found.append(answer(recipe.run(recipe.script, env=env))["env"]["NOTE"])
    env["CONDA_PREFIX"], env["CONDA_DEFAULT_ENV"] = str(recipe.root / "base"), "base"
    found.append(answer(recipe.run(recipe.script, env=env))["env"]["NOTE"])
    # conda's base is not an environment that somebody chose
    assert found == ["own", "active", "conda", "recipe", "root", "root"]


def test_an_active_environment_without_the_packages_is_passed_over(recipe):
    env = environments(recipe)
    del env["PYTHON"], env["CONDA_PREFIX"]
    (recipe.root / "demo/venv/bin/python").unlink()
    recipe.write("demo/go.sh", SCRIPT.replace("json string", "json only_here"))
    home = recipe.write("packages/only_here.py", "").parent
    recipe.write(
        ".venv/bin/python",
        f'#!/bin/sh\nPYTHONPATH="{home.as_posix().replace("$", chr(92) + "$")}" NOTE=root '
        f'exec "{sys.executable}" "$@"\n',
    )
    assert answer(recipe.run(recipe.script, env=env))["env"]["NOTE"] == "root"


def test_a_folder_named_like_a_package_is_not_the_package(recipe, tmp_path):
    recipe.write("demo/go.sh", SCRIPT.replace("json string", "json only_here"))
    (tmp_path / "only_here").mkdir()
    (tmp_path / "only_here" / "__init__.py").touch()
    assert recipe.run(recipe.script, cwd=tmp_path).returncode == 3


def test_without_an_interpreter_one_line_names_both_ways_out(recipe):
    (recipe.root / ".venv/bin/python").unlink()
    result = recipe.run(recipe.script, env={"VIRTUAL_ENV": "/nowhere"})
    assert result.returncode == 3
    (line,) = result.stderr.splitlines()
    assert f"{recipe.root}/setup.sh" in line
    assert "demo/requirements.txt" in line
    assert "json string" in line
    assert "/nowhere" in line
    assert not recipe.logs.exists()


def test_a_python_variable_that_names_no_program_is_refused(recipe):
    result = recipe.run(recipe.script, env={"PYTHON": "pythoon"})
    assert result.returncode == 3
    assert result.stderr.splitlines() == [
        "PYTHON=pythoon is not a program: name an interpreter, or unset PYTHON"
    ]


@pytest.mark.parametrize("shell", [[], ["sh"]])
def test_the_script_becomes_the_launcher_and_the_words_arrive_as_typed(recipe, tmp_path, shell):
    words = ["--name", "a b", "$(touch pwned)", "it's", '"', "", "-n", "*", "数据", "--", "\\"]
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    process = recipe.start(*shell, recipe.script, *words, cwd=tmp_path, env=env)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert (told["pid"], told["cwd"], told["argv"]) == (process.pid, str(tmp_path), words)
    assert not list(recipe.root.parent.rglob("pwned"))
    # whoever watches finds the process and its log
    assert (recipe.logs / "run.pid").read_text() == f"{process.pid}\n"
    assert told["env"]["TOOLKIT_LOG"] == str(the_log(recipe))


def test_output_goes_to_the_terminal_and_to_a_log_that_begins_with_the_command(recipe):
    recipe.write("demo/job.py", "import sys\nprint('训练 \\udce9')\nsys.exit('what went wrong')\n")
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    result = recipe.run(recipe.script, "--lr", "0.1", "--name", "it's a b", env=env)
    assert result.returncode == 1
    content = the_log(recipe).read_bytes()
    assert content.decode("utf-8", "surrogateescape") == result.stdout
    assert "训练".encode() in content and content.endswith(b"what went wrong\n")
    first = content.splitlines()[0].decode()
    assert "bin/python'" in first
    assert first.endswith(r"job.py' --lr 0.1 --name 'it'\''s a b'")
    assert os.readlink(recipe.logs / "latest.log") == the_log(recipe).name  # noqa: PTH115


def test_a_log_directory_of_ones_own_is_named_in_full(recipe):
    recipe.write("demo/go.sh", recipe.script.read_text().replace('"$recipe/logs"', "logs"))
    told = answer(recipe.run(recipe.script, cwd=recipe.bin.parent))
    (log,) = (recipe.bin.parent / "logs").glob("training_*.log")
    assert told["env"]["TOOLKIT_LOG"] == str(log)


@pytest.mark.parametrize("place", ["recipe", "recipe/model"])
def test_a_run_is_logged_beside_its_script_and_a_demo_in_the_demo(recipe, place):
    text = recipe.script.read_text().replace("/../shared/", "/..$UP/shared/")
    text = text.replace('starts_run "$@" && start_log "$recipe/logs"', 'log_run "$recipe"')
    text = text.replace("training\n", 'training "$@"\n')
    script, env = recipe.write(f"{place}/go.sh", text), {"UP": "/.." * place.count("/")}
    recipe.write(f"{place}/job.py", JOB)
    beside, demo = recipe.root / place / "logs", recipe.root / "recipe" / "demo" / "runs" / "logs"
    answer(recipe.run(script, "--help", "--demo", env=env))
    assert not beside.exists() and not demo.exists()
    answer(recipe.run(script, "--name", "my --demo of it", env=env))
    assert len(list(beside.glob("training_*.log"))) == 1 and not demo.exists()
    answer(recipe.run(script, "--demo", env=env))
    assert len(list(demo.glob("training_*.log"))) == len(list(beside.glob("training_*.log"))) == 1


@pytest.mark.parametrize("redirection", [">/dev/null 2>&1", ">&- 2>&-"])
def test_without_a_stdout_the_log_has_everything(recipe, redirection):
    command = f'"$0" --lr 0.1 {redirection}'
    result = recipe.run("bash", "-c", command, recipe.script)
    assert (result.returncode, result.stdout) == (0, "")
    assert '"argv": ["--lr", "0.1"]' in the_log(recipe).read_text()


def test_a_reader_that_leaves_does_not_end_the_run(recipe):
    recipe.write(
        "demo/job.py", "import time\nfor i in range(300):\n    print('line', i)\ntime.sleep(.3)\n"
    )
    process = recipe.start(recipe.script)
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    wait_for(lambda: "line 299" in the_log(recipe).read_text())


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_the_log_outlives_a_signal_to_the_whole_group(recipe, number):
    ignoring = "import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
    recipe.write(
        "demo/job.py", f"{ignoring}import time\nprint('ready')\ntime.sleep(.4)\nprint('after')\n"
    )
    process = recipe.start(recipe.script)
    wait_for(lambda: "ready" in logged(recipe))
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.endswith("after\n")
    assert the_log(recipe).read_text().endswith("after\n")


def test_runs_of_the_same_second_have_logs_of_their_own(recipe):
    recipe.write("date", "#!/bin/sh\necho 20260101_000000\n", recipe.root / "stubs")
    path = f"{recipe.root / 'stubs'}:{recipe.bin}"
    for note in ("first", "second"):
        answer(recipe.run(recipe.script, note, env={"PATH": path}))
    logs = {path.name: path.read_text() for path in recipe.logs.glob("training_*.log")}
    assert "first" in logs["training_20260101_000000.log"]
    assert "second" in logs["training_20260101_000000.2.log"]
    assert os.readlink(recipe.logs / "latest.log") == "training_20260101_000000.2.log"  # noqa: PTH115


def test_a_log_directory_that_cannot_be_made_costs_the_log_alone(recipe):
    recipe.logs.write_text("a file in the way")
    result = recipe.run(recipe.script)
    assert answer(result)["argv"] == []
    assert "no log file" in result.stderr


def test_what_only_answers_leaves_no_log(recipe):
    assert answer(recipe.run(recipe.script, "--demo", "--help"))["argv"] == ["--demo", "--help"]
    assert not recipe.logs.exists()
    asked = (
        'source "$0/shared/shell/log.sh"; for word; do starts_run a "$word" && echo "$word"; done'
    )
    words = ["-h", "--print-config", "--print_config", "--dry_run", "--estimate", "--helpful", "-x"]
    result = recipe.run("bash", "-c", asked, recipe.root, *words)
    assert result.stdout.splitlines() == ["--helpful", "-x"]


CACHES = ("HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE")


@pytest.mark.parametrize(
    ("env", "seen"),
    [
        (  # named relatively they are meant from where the command was typed
            {"HF_HOME": "my models", "TRANSFORMERS_CACHE": "/old/place"},
            ("{here}/my models", "/old/place", "{here}/my models/modelscope"),
        ),
        (
            {"HF_HUB_CACHE": "/new", "TRANSFORMERS_CACHE": "/old", "MODELSCOPE_CACHE": "/scope"},
            (None, "/new", "/scope"),
        ),
        ({}, (None, None, None)),
    ],
)
def test_caches_are_those_that_were_set(recipe, tmp_path, env, seen):
    told = answer(recipe.run(recipe.script, env=env, cwd=tmp_path))["env"]
    assert [told[name] for name in CACHES] == [
        place and place.format(here=tmp_path) for place in seen
    ]


REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_real_train_script_answers_help_quickly_from_anywhere_and_leaves_no_log(tmp_path):
    logs = REPOSITORY / "face_distill" / "logs"
    before = sorted(logs.glob("*")) if logs.exists() else []
    link = tmp_path / "my link.sh"
    link.symlink_to(REPOSITORY / "face_distill" / "train.sh")
    started = time.monotonic()
    result = subprocess.run(
        ["sh", link, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--batch-size" in result.stdout
    assert time.monotonic() - started < 10  # 0.3 s on a quiet machine
    assert (sorted(logs.glob("*")) if logs.exists() else []) == before
