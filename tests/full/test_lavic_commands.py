"""lavic's README commands, typed as they stand, on the demo's data at the documented places.

Every command of the page is in one of the two tables here; a new one fails until it is.
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
from shared.files import read_json, read_json_lines
from tests.harness import ROOT, environment, processes_of, status_of, wait_until
from tests.hub_server import forget_the_users_settings
from tests.picture_server import PictureServer

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
    "python crawl_images.py",
    "python crawl_images.py --workers 64",
    "python crawl_images.py --train-only",
    "python crawl_images.py --valid-only",
    "python crawl_images.py --dry-run",
    "python knowledge_distillation.py --estimate",
    f"python prompt_tuning.py {ADAPTER}",
    f"python prompt_tuning.py {ADAPTER} --category amazon_fashion "
    "--candidate_type candidates_gpt_large",
    "python prompt_tuning.py --estimate",
    "python evaluate.py",
    "python evaluate.py --checkpoint out_finetuned",
    "python evaluate.py --checkpoint out_finetuned --category amazon_home",
    "python evaluate.py --checkpoint out_finetuned --limit 100",
    "python evaluate.py --demo",
    'python describe.py picture.jpg --title "Desk Tag"',
)
NEEDS = {
    "./real_weights.sh --dry-run": "tests/shell/test_real_weights_sh.py",
    "./real_weights.sh": "a GPU and a download; on stubs: tests/shell/test_real_weights_sh.py",
    "cd lavic": "typed by every test",
    "pip install -r requirements.txt": "the network",
}


def test_every_command_of_the_page_is_run_or_says_what_it_needs():
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "lavic" / "README.md").read_text(), re.M | re.S
    )
    lines = (re.sub(r"\s+# .*", "", line).strip() for b in blocks for line in b.splitlines())
    assert {line for line in lines if line} == {*IN_RECIPE, *IN_SRC, *NEEDS}


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


def finished(outcome: subprocess.CompletedProcess[str]) -> str:
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    return outcome.stdout


def background(command: str, cwd: Path) -> str:
    """Start the command; what marks its processes."""
    env = environment(HF_HUB_OFFLINE="1")
    subprocess.run(["bash", "-c", command], cwd=cwd, env=env, check=True)
    return env["TOOLKIT_TEST_TOKEN"]


def monitor(house: Path, *flags: str) -> tuple[int, dict[str, object]]:
    """Exit code and content of `./monitor_training.sh --json`."""
    outcome = typed(" ".join(["./monitor_training.sh", "--json", *flags]), house)
    return outcome.returncode, json.loads(outcome.stdout)


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
        (IN_SRC[6], src, "all_beauty", "candidates_st"),
        (IN_SRC[7], src, "amazon_fashion", "candidates_gpt_large"),
    ):
        finished(typed(command, cwd))
        assert len(list(read_json_lines(out / f"test_results_{kind}.jsonl"))) == 60
        assert read_json(out / "trained_lora_adapter" / "recommender.json")["category"] == category
    rows = (out / "results_summary.csv").read_text().splitlines()
    assert len(rows) >= 4 and rows[0].startswith("model_dir,candidate_type,lr,weight_decay")


def test_evaluation_as_documented(trained):
    src = trained / "src"
    for command in IN_SRC[9:13]:
        assert "evaluation.json" in finished(typed(command, src))
    found = read_json(src / "out_finetuned" / "evaluation" / "evaluation.json")
    assert found["counts"]["conversations"] == 60
    found = read_json(src / "out_distilled" / "evaluation" / "evaluation.json")
    assert found["metrics"]["val_loss"] < 3


def test_estimates_need_no_weights_and_no_gpu(house):
    for command in (IN_SRC[5], IN_SRC[8]):
        assert "in all" in finished(typed(command, house / "src"))


def test_the_crawler_as_documented(house, tmp_path, monkeypatch):
    """On a shop of the demo's pictures: from src/, into data/ beside it."""
    forget_the_users_settings(monkeypatch)
    recipe = tmp_path / "lavic"
    shutil.copytree(house, recipe, symlinks=True, ignore=shutil.ignore_patterns("out_*"))
    (tmp_path / "shared").symlink_to(ROOT / "shared")
    data = recipe / "data"
    pictures = {p.name: p.read_bytes() for p in data.glob("*_images/*.jpg")}
    with PictureServer(pictures) as shop:
        for name in ("item2meta_train.json", "item2meta_valid.jsonl"):
            text = (data / name).read_text().replace("https://images.example", f"{shop.url}/i")
            (data / name).write_text(text)
        for command in IN_SRC[:5]:
            for folder in ("train_images", "valid_images"):
                shutil.rmtree(data / folder, ignore_errors=True)
            finished(typed(command, recipe / "src", NO_PROXY="127.0.0.1"))
            have = {p.name: p.read_bytes() for p in data.glob("*_images/[!.]*")}
            counts = {"--train-only": 324, "--valid-only": 54, "--dry-run": 0}
            assert len(have) == counts.get(command.split()[-1], 378)
            assert all(pictures[name] == content for name, content in have.items())


def test_a_picture_is_described(trained):
    picture = next((trained / "data" / "valid_images").iterdir())
    shutil.copy(picture, trained / "src" / "picture.jpg")
    said = finished(typed(IN_SRC[-1], trained / "src"))
    assert "picture.jpg\n  before  " in said and "\n  after   " in said


def test_the_monitor_on_every_kind_of_end(trained):
    code, seen = monitor(trained)
    assert (code, seen["state"]) == (0, "done")
    assert "DONE" in finished(typed("./monitor_training.sh", trained))
    assert "DONE" in finished(typed("./monitor_training.sh --once", trained))

    token = background("nohup ./run_training.sh --num_epochs 50 > /dev/null 2>&1 &", trained)
    wait_until(lambda: monitor(trained)[1]["state"] == "running", "the run", 120)
    finished(typed("./monitor_training.sh --stop", trained))
    assert not processes_of(token)
    code, seen = monitor(trained)
    assert (code, seen["state"]) == (0, "stopped")

    token = background("nohup ./run_training.sh --num_epochs 50 > /dev/null 2>&1 &", trained)
    wait_until(lambda: monitor(trained)[1]["state"] == "running", "the run", 120)
    for pid in processes_of(token):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: monitor(trained)[1]["state"] == "stale", "the staleness", 60)
    assert monitor(trained)[0] == 1

    broken = "./run_training.sh --num_epochs 1 --lr 1e9 --max-bad-steps 2 --resume never"
    assert typed(broken, trained).returncode == 1
    code, seen = monitor(trained)
    assert (code, seen["state"]) == (1, "failed")


def test_both_stages_of_the_demo_learn():
    began = time.monotonic()
    for command in IN_RECIPE[:2]:
        finished(typed(command, ROOT / "lavic"))
    runs = ROOT / "lavic" / "demo" / "runs"
    first, second = (
        status_of(runs / name)["result"] for name in ("out_distilled", "out_finetuned")
    )
    print(f"demo: {first} | {second}, {time.monotonic() - began:.0f} s")
    assert first["after"] < 0.8 * first["before"]
    assert second["after"] > second["before"] + 0.2
    assert second["after"] > 3 * second["chance"]
    assert "recall@1" in finished(typed("python evaluate.py --demo", ROOT / "lavic" / "src"))
