"""lavic's README commands, typed as they stand, on the demo's data at the documented places.

Every command of the page is in one of the tables here (tests/unit/test_readme_commands.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavic.demo_data import demo
from lavic.src import knowledge_distillation, prompt_tuning
from shared.files import read_json, read_json_lines
from tests.harness import (
    ROOT,
    environment,
    finished,
    processes_of,
    run_here,
    status_of,
    wait_until,
)
from tests.lavic_nano import flags_of

pytestmark = [pytest.mark.full, pytest.mark.serial, pytest.mark.limit(900)]

ADAPTER = "--model_dir ./out_distilled/vision_lora_adapter_best"
IN_RECIPE = (
    "./run_training.sh --demo",
    "./run_prompt_tuning.sh --demo",
    "./run_training.sh",
    "./run_training.sh --max_samples all",
    "./run_training.sh --nproc 4",
    "nohup ./run_training.sh > /dev/null 2>&1 &",
    "./run_prompt_tuning.sh",
    "./run_prompt_tuning.sh --category amazon_home",
    "nohup ./run_prompt_tuning.sh > /dev/null 2>&1 &",
    "./monitor_training.sh",
    "./monitor_training.sh --once",
    "./monitor_training.sh --json",
    "./monitor_training.sh --stop",
    "tail -f logs/training_*.log",
    "tail -F logs/latest.log",
)
IN_SRC = (
    f"python prompt_tuning.py {ADAPTER}",
    f"python prompt_tuning.py {ADAPTER} --category amazon_fashion "
    "--candidate_type candidates_gpt_large",
    "python evaluate.py",
    "python evaluate.py --checkpoint out_finetuned",
    "python evaluate.py --checkpoint out_finetuned --category amazon_home",
    "python evaluate.py --checkpoint out_finetuned --limit 100",
    "python evaluate.py --demo",
)
NEEDS = {
    "./real_weights.sh --dry-run": "tests/shell/test_real_weights_sh.py",
    "./real_weights.sh": "a GPU and a download; on stubs: tests/shell/test_real_weights_sh.py",
    "cd lavic": "typed by every test",
    "pip install -r requirements.txt": "the network",
    'python describe.py picture.jpg --title "Desk Tag"': "tests/recipes/test_lavic_evaluate.py",
    **{
        f"python crawl_images.py{flag}": "tests/unit/test_lavic_crawl.py"
        for flag in ("", " --workers 64", " --train-only", " --valid-only", " --dry-run")
    },
    "python knowledge_distillation.py --estimate": "tests/unit/test_readme_memory.py",
    "python prompt_tuning.py --estimate": "tests/unit/test_readme_memory.py",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The recipe in a directory of its own, the demo's data where the page says, its model as base.

    The Hub's id in the scripts is replaced by the tiny checkpoint's directory: no test downloads.
    """
    root = tmp_path_factory.mktemp("a house")
    recipe = root / "lavic"
    made = shutil.ignore_patterns("demo", "logs", "data", "out_*", "vector_cache", "__pycache__")
    shutil.copytree(ROOT / "lavic", recipe, ignore=made)
    # a copy: the monitor looks for runs below the directory that shared/ really lies in
    shutil.copytree(ROOT / "shared", root / "shared", ignore=made)
    (root / ".venv").symlink_to(Path(sys.prefix))
    paths = demo.build(tmp_path_factory.mktemp("demo"))
    paths.data.rename(recipe / "data")
    for category in ("amazon_fashion", "amazon_home"):
        shutil.copytree(recipe / "data" / "all_beauty", recipe / "data" / category)
    script = recipe / "src" / "knowledge_distillation.py"
    text = script.read_text()
    assert "llava-hf/llava-v1.6-mistral-7b-hf" in text
    script.write_text(text.replace("llava-hf/llava-v1.6-mistral-7b-hf", str(paths.weights)))
    return recipe


@pytest.fixture(scope="module")
def trained(house) -> Path:
    """The same after stage 1, and stage 2 of the category all_beauty."""
    for command in ("./run_training.sh", "./run_prompt_tuning.sh"):
        finished(typed(command, house))
    return house


def typed(command: str, cwd: Path, timeout: float = 600, **env: str):
    """The command in a shell, as a user types it, with the environment active."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment(PATH=path, HF_HUB_OFFLINE="1", **env),
        capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip


def background(command: str, cwd: Path) -> str:
    """Start the command; what marks its processes."""
    env = environment(HF_HUB_OFFLINE="1")
    subprocess.run(["bash", "-c", command], cwd=cwd, env=env, check=True)
    return env["TOOLKIT_TEST_TOKEN"]


def state(house: Path) -> str:
    """What `./monitor_training.sh --json` says of the newest run."""
    return json.loads(typed("./monitor_training.sh --json", house).stdout)["state"]


def test_stage_1_as_documented(house):
    for command in IN_RECIPE[2:5]:
        finished(typed(command, house))
        out = house / "src" / "out_distilled"
        names = {path.name for path in (out / "vision_lora_adapter_best").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
        text = (out / "val_metrics_epoch_1.txt").read_text()
        assert re.fullmatch(r"Val Loss: [\d.]+\nVal PPL: [\d.]+\n", text)
        assert status_of(out)["state"] == "done"
        assert list((house / "src" / "lightning_logs").glob("version_*/events*"))
    assert status_of(out)["world_size"] == 4
    log = (house / "logs" / "latest.log").read_text()
    assert "Best LoRA adapter saved." in log and "exit 0" in log


@pytest.mark.parametrize(
    ("command", "out"),
    [
        ("nohup ./run_training.sh > /dev/null 2>&1 &", "out_distilled"),
        ("nohup ./run_prompt_tuning.sh > /dev/null 2>&1 &", "out_finetuned"),
    ],
)
def test_in_the_background_and_with_the_terminal_closed(trained, command, out):
    assert command in IN_RECIPE
    run_dir = trained / "src" / out
    before = status_of(run_dir)["started_at"]
    token = background(command, trained)
    wait_until(lambda: status_of(run_dir).get("started_at") != before, "the start", 120)
    for pid in processes_of(token):
        os.kill(pid, signal.SIGHUP)  # what a closing terminal sends
    wait_until(lambda: status_of(run_dir).get("state") == "done", "the end", 300)
    wait_until(lambda: not processes_of(token), "the end of its processes", 30)
    log = trained / "logs" / "latest.log"
    assert "exit 0" in log.read_text()
    for tail in ("tail -f logs/training_*.log", "tail -F logs/latest.log"):
        shown = typed(f"timeout 1 {tail}", trained)
        assert "exit 0" in shown.stdout and "\r" not in shown.stdout


def test_stage_2_as_documented(trained):
    src, out = trained / "src", trained / "src" / "out_finetuned"
    for command, cwd, category, kind in (
        (IN_RECIPE[7], trained, "amazon_home", "candidates_st"),
        (IN_SRC[0], src, "all_beauty", "candidates_st"),
        (IN_SRC[1], src, "amazon_fashion", "candidates_gpt_large"),
    ):
        finished(typed(command, cwd))
        assert len(list(read_json_lines(out / f"test_results_{kind}.jsonl"))) == 60
        assert read_json(out / "trained_lora_adapter" / "recommender.json")["category"] == category
    rows = (out / "results_summary.csv").read_text().splitlines()
    assert len(rows) >= 4 and rows[0].startswith("model_dir,candidate_type,lr,weight_decay")


def test_evaluation_as_documented(trained):
    src = trained / "src"
    for command in IN_SRC[2:6]:
        assert "evaluation.json" in finished(typed(command, src))
    found = read_json(src / "out_finetuned" / "evaluation" / "evaluation.json")
    assert found["counts"]["conversations"] == 60
    found = read_json(src / "out_distilled" / "evaluation" / "evaluation.json")
    assert found["metrics"]["val_loss"] < 3


def is_at_work(status) -> bool:
    return status.get("state") == "running" and status.get("step", 0) > 0


def test_the_monitor_sees_a_finished_run_and_stops_a_running_one(trained):
    """Its other answers: tests/faults/test_faults_monitor.py."""
    assert state(trained) == "done"
    for command in ("./monitor_training.sh", "./monitor_training.sh --once"):
        assert "DONE" in finished(typed(command, trained))
    token = background("nohup ./run_training.sh --num_epochs 50 > /dev/null 2>&1 &", trained)
    run_dir = trained / "src" / "out_distilled"
    wait_until(lambda: is_at_work(status_of(run_dir)), "a step", 300)
    assert state(trained) == "running"
    finished(typed("./monitor_training.sh --stop", trained))
    assert not processes_of(token)
    assert state(trained) == "stopped"


def has_learnt(first, second) -> bool:
    """Whether the results of both stages are far better than before them, and than chance."""
    gain, chance = second["after"] - second["before"], second["chance"]
    return first["after"] < 0.8 * first["before"] and gain > 0.2 and second["after"] > 3 * chance


def test_both_stages_of_the_demo_learn():
    began = time.monotonic()
    for command in IN_RECIPE[:2]:
        finished(typed(command, ROOT / "lavic"))
    runs = ROOT / "lavic" / "demo" / "runs"
    results = [status_of(runs / name)["result"] for name in ("out_distilled", "out_finetuned")]
    print(f"demo: {results[0]} | {results[1]}, {time.monotonic() - began:.0f} s")
    assert has_learnt(*results), results
    assert "recall@1" in finished(typed("python evaluate.py --demo", ROOT / "lavic" / "src"))


@pytest.mark.limit(1800)
def test_the_demo_of_another_seed_is_learnt_as_well(tmp_path):
    """0.63 to 0.38, and 0.18 to 0.68, on one machine."""
    paths, results = demo.build(tmp_path, seed=1), []
    first = [*flags_of(paths, paths.distilled), "--max_samples", "all"]
    second = [
        *("--model_dir", paths.distilled / "vision_lora_adapter_best", "--data_root", paths.data),
        *("--item_meta_path", paths.train_data, "--image_dir", paths.train_images),
        *("--finetune_output_dir", paths.finetuned, "--cache", tmp_path / "vectors"),
    ]
    for stage, run_dir, given in (
        (knowledge_distillation, paths.distilled, first),
        (prompt_tuning, paths.finetuned, second),
    ):
        words = [f"--{n}" if v is True else f"--{n}={v}" for n, v in stage.DEMO.items()]
        outcome = run_here(stage.main, [*given, *words, "--device", "cpu"])
        assert outcome.code == 0, outcome.text
        results.append(status_of(run_dir)["result"])
    assert has_learnt(*results), results
