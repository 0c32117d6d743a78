"""vasevqa's README commands, typed as they stand, on small data at the documented places.

Every command of the page is in one of the tables here (tests/unit/test_readme_commands.py). The
models are a tiny Qwen2.5-VL under the documented names, and the scripts' settings are edited as the
page says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from shared.files import read_json, read_json_lines
from tests import vase_filter_nano, vasevqa_nano
from tests.harness import ROOT, environment, finished, processes_of, status_of, wait_until

pytestmark = [pytest.mark.full, pytest.mark.serial, pytest.mark.limit(1800)]

WHOLE = ("./run_all.sh", "./run_all.sh --from grpo")
TUNING = (
    "./sft.sh --dry-run",
    "./sft.sh --estimate",
    "./sft.sh --model ./models/Qwen2.5-VL-3B-Instruct --num_train_epochs 3 --learning_rate=5e-5",
    "./sft.sh",
)
BACKGROUND = "nohup ./sft.sh > /dev/null 2>&1 &"
# the tiny run has four steps, so that the numbers of its checkpoints are smaller
RESUMED = "./sft.sh --resume_from_checkpoint ./output/7B/checkpoint-400"
ADAPTERS = "./merge.sh --adapters ./output/7B/checkpoint-600"
SMALLER = {"checkpoint-400": "checkpoint-2", "checkpoint-600": "checkpoint-4"}
MERGE, GRPO = "./merge.sh", "./grpo.sh"
REWARDS = "./grpo.sh --reward_funcs external_vase_acc my_reward"
EVALUATIONS = (
    "python evaluate.py --data-root data/questions.json",
    "python evaluate.py --checkpoint ./output/checkpoint-merged "
    "--before ./models/Qwen2.5-VL-7B-Instruct --limit 200",
)
HERE = (*WHOLE, *TUNING, BACKGROUND, RESUMED, MERGE, ADAPTERS, GRPO, REWARDS, *EVALUATIONS)
ELSEWHERE = {
    "./real_weights.sh --dry-run": "tests/shell/test_real_weights_sh.py",
    "./run_all.sh --demo": "tests/full/test_vasevqa_demo.py",
    "python model.py --demo": "a stage of ./run_all.sh --demo: tests/full/test_vasevqa_demo.py",
    "swift infer --model ./output/checkpoint-merged --model_type qwen2_5_vl --template qwen2_5_vl "
    "--val_dataset data/questions.json": "tests/recipes/test_vasevqa_model.py",
    "./hf2megatron.sh": "a GPU and Megatron; without: tests/shell/test_vasevqa_model_sh.py",
    "./clipfilter1.sh": "a terminal: tests/shell/test_clipfilter1_sh.py",
}
NEEDS = {
    "./real_weights.sh": "a GPU and a download; on stubs: tests/shell/test_real_weights_sh.py",
    "cd filter": "typed by every test",
    "cd model": "typed by every test",
    "conda create -n swift_env python=3.11": "conda",
    "conda activate swift_env": "conda",
    "pip install -r requirements.txt": "the network",
    "CUDA_VISIBLE_DEVICES=0,1,2,3 NPROC_PER_NODE=4 ./sft.sh": "four GPUs",
    "NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29501 NPROC_PER_NODE=8 ./sft.sh "
    "--deepspeed zero2": "two hosts with eight GPUs each",
}
# in place of the scripts' own lines: what a run of seconds needs
SMALL = {
    **{"torch_dtype": "float32", "max_length": 512, "dataloader_num_workers": 0},
    **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "logging_steps": 1},
    **{"dataset_num_proc": 1, "gradient_checkpointing": "false"},
}


def page() -> str:
    return (ROOT / "vasevqa" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """The recipe in a directory of its own, with small data and models, its settings edited."""
    root = tmp_path_factory.mktemp("a house")
    ours = shutil.ignore_patterns(
        *("demo", "logs", "__pycache__", "images", "images[0-9]", "filtered*", "output"),
        *("models", "data", ".*"),
    )
    for name in ("vasevqa", "shared"):  # copies: launch puts the directory above, links followed
        shutil.copytree(ROOT / name, root / name, ignore=ours)
    (root / ".venv").symlink_to(Path(sys.prefix))
    recipe = root / "vasevqa"
    vase_filter_nano.furnish(recipe / "filter")
    furnish_model(recipe / "model", tmp_path_factory.mktemp("nano"))
    return recipe


def furnish_model(place: Path, scratch: Path) -> None:
    """Models, pictures and rows at the places that the scripts name, and fewer, smaller steps."""
    nano = vasevqa_nano.build(scratch)
    for size in ("3B", "7B"):
        shutil.copytree(nano.model, place / "models" / f"Qwen2.5-VL-{size}-Instruct")
    shutil.copytree(nano.root / "vases", place / "data" / "vases")
    rows = json.loads(nano.train.read_text(encoding="utf-8"))
    for name, number in (("video_training_dataset", 9), ("grpo_video_dataset", 2)):
        (place / "data" / f"{name}.json").write_text(json.dumps(rows[:number]), encoding="utf-8")
    (place / "data" / "questions.json").write_text(json.dumps(rows[:6]), encoding="utf-8")
    set_flags(place / "sft.sh", SMALL | {"save_steps": 2})
    set_flags(place / "grpo.sh", SMALL | {"save_steps": 1, "max_completion_length": 12})


def set_flags(script: Path, settings: Mapping[str, object]) -> None:
    """Edit the settings in the script, one a line; those it lacks go to the end of the list."""
    text = script.read_text(encoding="utf-8")
    for name, value in settings.items():
        text, found = re.subn(rf"^  --{name} \S+", f"  --{name} {value}", text, flags=re.M)
        if not found:
            text = re.sub(r"^\)$", f"  --{name} {value}\n)", text, count=1, flags=re.M)
    script.write_text(text, encoding="utf-8")


def in_this_house(house: Path, **changes: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "HF_HUB_OFFLINE": "1", "MODELSCOPE_CACHE": str(house / "modelscope")}
    return environment(**own, **changes)


def typed(command: str, house: Path, place: str = "model") -> subprocess.CompletedProcess[str]:
    """The command in a shell, as a user types it in a directory, with the environment active."""
    return subprocess.run(
        ["bash", "-c", command], cwd=house / place, env=in_this_house(house),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip


def smaller(command: str) -> str:
    for documented, here in SMALLER.items():
        command = command.replace(documented, here)
    return command


def test_the_whole_flow_and_again_from_a_stage(house):
    finished(typed("python model.py", house, "filter"))
    finished(typed(WHOLE[0], house, ""))
    output = house / "model" / "output"
    flow = status_of(house / "flow")
    assert (flow["state"], flow["step"], flow["total_steps"]) == ("done", 8, 8)
    first = read_json(output / "checkpoint-merged" / "merged_from.json")["adapter"]
    assert Path(first).parent == output / "GRPO"
    views = read_json(house / "filter" / "filtered_vases" / "filtering_stats.json")
    assert views["summary"]["total_vases"] >= 4
    tuned = status_of(output / "7B")["started_at"]
    rewarded = status_of(output / "GRPO")["started_at"]
    finished(typed(WHOLE[1], house, ""))
    assert status_of(output / "7B")["started_at"] == tuned  # fine-tuning is left as it is
    assert status_of(output / "GRPO")["started_at"] != rewarded
    assert read_json(output / "evaluation" / "vqa.json")["counts"]["questions"] == 6


def test_fine_tuning_as_documented(house):
    run_dir = house / "model" / "output" / "7B"
    before = status_of(run_dir).get("started_at")
    assert "sft" in finished(typed(TUNING[0], house))
    assert "in all" in finished(typed(TUNING[1], house))
    assert status_of(run_dir).get("started_at") == before  # neither starts a run
    for command, base, steps in ((TUNING[2], "3B", 6), (TUNING[3], "7B", 4)):
        finished(typed(command, house))
        status = status_of(run_dir)
        assert (status["state"], status["step"]) == ("done", steps), status["reason"]
        adapter = read_json(run_dir / f"checkpoint-{steps}" / "adapter_config.json")
        assert f"Qwen2.5-VL-{base}-Instruct" in adapter["base_model_name_or_path"]
        assert (adapter["r"], adapter["lora_alpha"]) == (8, 32)
    said = finished(typed(smaller(RESUMED), house))
    assert status_of(run_dir)["state"] == "done", said[-3000:]
    assert max(vasevqa_nano.logged(run_dir, "loss")) == 4
    assert "exit 0" in (house / "model" / "logs" / "latest.log").read_text()


def test_in_the_background_and_with_the_terminal_closed(house):
    run_dir, env = house / "model" / "output" / "7B", in_this_house(house)
    before = status_of(run_dir).get("started_at")
    subprocess.run(["bash", "-c", BACKGROUND], cwd=house / "model", env=env, check=True)
    token = env["TOOLKIT_TEST_TOKEN"]
    wait_until(lambda: status_of(run_dir).get("started_at") not in (before, None), "the start")
    for pid in processes_of(token):
        os.kill(pid, signal.SIGHUP)  # what a closing terminal sends
    wait_until(lambda: not processes_of(token), "the end", 300)
    assert status_of(run_dir)["state"] == "done"
    shown = typed("timeout 1 tail -F logs/latest.log", house).stdout
    assert "exit 0" in shown


def test_merging_and_rewards_as_documented(house):
    """As on the page: merge, reinforce, merge again, reinforce with a reward of one's own."""
    output = house / "model" / "output"
    for command, adapter in ((smaller(ADAPTERS), "7B"), (MERGE, "7B"), (GRPO, ""), (MERGE, "GRPO")):
        finished(typed(command, house))
        note = read_json(output / "checkpoint-merged" / "merged_from.json")
        assert not adapter or Path(note["adapter"]).parent == output / adapter
    assert status_of(output / "GRPO")["state"] == "done"
    plugin = house / "model" / "plugin" / "plugin.py"
    (own,) = re.findall(r"^```python\n(def my_reward.*?)^```", page(), re.M | re.S)
    plugin.write_text(f"{plugin.read_text(encoding='utf-8')}\n\n{own}", encoding="utf-8")
    finished(typed(REWARDS, house))
    lines = list(read_json_lines(output / "GRPO" / "logging.jsonl"))
    names = {name for line in lines for name in line}
    assert {"rewards/external_vase_acc/mean", "rewards/my_reward/mean"} <= names


def test_evaluation_as_documented(house):
    """Of what the tests before have merged."""
    for command in EVALUATIONS:
        said = finished(typed(command, house))
        assert "exact" in said and "vqa.json" in said
        (found,) = {Path(path) for path in re.findall(r"(/\S.*vqa\.json)", said)}
        assert read_json(found)["counts"]["questions"] == 6
