"""vasevqa/model's scripts with a pretended swift that records what it is called with."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from shared.files import read_json
from tests.shell.conftest import REPOSITORY

MODEL = "vasevqa/model"
# Records its arguments, does what ACTION says.
COMMAND = """import json, os, pathlib, sys, time
words = sys.argv[1:]
names = ("CUDA_VISIBLE_DEVICES", "MAX_PIXELS", "ROOT_IMAGE_DIR", "HF_HOME", "HF_HUB_CACHE",
         "MODELSCOPE_CACHE", "http_proxy", "https_proxy")
record = pathlib.Path(os.environ["RECORD"])
seen = {name: os.environ[name] for name in names if name in os.environ}
text = json.dumps({"command": pathlib.Path(sys.argv[0]).stem, "words": words, "env": seen})
record.write_text(text)
if os.environ.get("ACTION") == "sleep":
    record.with_name("ready").touch()
    time.sleep(60)
if os.environ.get("ACTION") == "RAM is full":
    import torch
    torch.empty(10**15)
if os.environ.get("ACTION") == "the GPU is full":
    import torch
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
if "--output_dir" in words and pathlib.Path(sys.argv[0]).stem == "export":
    made = pathlib.Path(words[words.index("--output_dir") + 1])
    base = pathlib.Path(words[words.index("--model") + 1])
    made.mkdir()
    for path in base.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def room(house, tmp_path):
    """A house with the scripts, a model, rows, and a swift that records."""
    shared = [f"shared/{path.name}" for path in (REPOSITORY / "shared").glob("*.py")]
    room = REPOSITORY / MODEL
    own = [str(path.relative_to(REPOSITORY)) for path in room.rglob("*.py")]
    house.take(
        *shared, *own, "shared/shell/common.sh", "shared/shell/log.sh", "vasevqa/__init__.py"
    )
    house.take(*(f"{MODEL}/{name}" for name in ("sft.sh", "grpo.sh", "merge.sh", "prompt.txt")))
    house.take(f"{MODEL}/hf2megatron.sh")
    fake, real = tmp_path / "fake" / "swift", Path(importlib.util.find_spec("swift").origin).parent
    (fake / "cli").mkdir(parents=True)
    (fake / "__init__.py").touch()
    for name in ("arguments", "trainers", "rlhf_trainers", "rewards"):
        (fake / name).symlink_to(real / name)
    for name in ("sft", "rlhf", "export"):
        (fake / "cli" / f"{name}.py").write_text(COMMAND)
    here = house.root / MODEL
    _weights(here / "models" / "Qwen2.5-VL-7B-Instruct")
    _weights(here / "output" / "checkpoint-merged")
    (here / "data").mkdir()
    Image.new("RGB", (8, 8)).save(here / "data" / "a.jpg")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "amphora"}]
    rows = [{"images": ["a.jpg"], "caption": "双耳瓶", "conversations": turns}] * 8
    for name in ("video_training_dataset.json", "grpo_video_dataset.json"):
        (here / "data" / name).write_text(json.dumps(rows))
    house.env |= {"PYTHON": sys.executable, "PYTHONPATH": str(fake.parent)}
    house.env |= {"RECORD": str(tmp_path / "record.json"), "HOME": str(tmp_path)}
    return house


def _weights(directory):
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))


def called(room) -> dict:
    found = read_json(Path(room.env["RECORD"]))
    words, flags = found["words"], {}
    for word in words:
        if word.startswith("--"):
            flags[word[2:]] = []
        else:
            flags[next(reversed(flags))].append(word)
    return {**found, "flags": {name: " ".join(values) for name, values in flags.items()}}


DOCUMENTED = {
    "sft.sh": {
        "tuner_type": "lora",
        "num_train_epochs": "2",
        "per_device_train_batch_size": "1",
        "learning_rate": "1e-4",
        "lora_rank": "8",
        "gradient_accumulation_steps": "16",
        "split_dataset_ratio": "0.01",
        "save_total_limit": "5",
    },
    "grpo.sh": {
        "rlhf_type": "grpo",
        "reward_funcs": "external_vase_acc",
        "num_train_epochs": "1",
        "learning_rate": "1e-6",
        "num_generations": "4",
        "temperature": "1.0",
        "beta": "0.001",
    },
}


@pytest.mark.parametrize("script", DOCUMENTED)
def test_the_documented_flags_reach_swift_with_what_this_machine_needs(script, room, tmp_path):
    outcome = room.run(room.root / MODEL / script, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = called(room)
    assert found["command"] == {"sft.sh": "sft", "grpo.sh": "rlhf"}[script]
    flags = found["flags"]
    assert {name: flags[name] for name in DOCUMENTED[script]} == DOCUMENTED[script]
    here = room.root / MODEL
    places = {
        "sft.sh": ("models/Qwen2.5-VL-7B-Instruct", "data/video_training_dataset.json", "7B"),
        "grpo.sh": ("output/checkpoint-merged", "data/grpo_video_dataset.json", "GRPO"),
    }[script]
    assert flags["model"] == str(here / places[0])
    assert flags["output_dir"] == str(here / "output" / places[2])
    assert flags["check_model"] == "false" and flags["callbacks"] == "graceful_exit"
    assert flags["model_type"] == flags["template"] == "qwen2_5_vl"
    if script == "sft.sh":
        assert flags["dataset"] == str(here / places[1])
    else:  # with solutions
        assert flags["dataset"].startswith(str(here / "output" / "GRPO" / "data"))
        assert flags["system"] == str(here / "prompt.txt")
        assert flags["external_plugins"].endswith("plugin/adapt.py")
    assert found["env"]["ROOT_IMAGE_DIR"] == str(here / "data")
    assert found["env"]["MAX_PIXELS"] == "1003520"
    assert found["env"]["CUDA_VISIBLE_DEVICES"] == "0"


def test_status_log_and_exit_code_tell_the_same(room):
    outcome = room.run(room.root / MODEL / "sft.sh", env={"CODE": "7"})
    assert outcome.returncode == 1
    status = read_json(room.root / MODEL / "output" / "7B" / "status.json")
    assert (status["state"], status["exit_code"], status["recipe"]) == ("failed", 1, "vasevqa")
    assert "left with exit code 7" in status["reason"]
    log = (room.root / MODEL / "logs" / "latest.log").read_text()
    assert "swift sft --model" in log
    assert log.rstrip().endswith("(exit 1)"), outcome.stdout + "ERR" + outcome.stderr


OUT_OF_MEMORY = {
    "RAM is full": (
        "sft.sh",
        "1",
        "DefaultCPUAllocator: can't allocate memory",
        "MAX_PIXELS=501760",
    ),
    "the GPU is full": ("grpo.sh", "2", "CUDA out of memory.", "--gradient_checkpointing true"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "action", [pytest.param("RAM is full", marks=pytest.mark.full), "the GPU is full"]
)
def test_fault_41_a_swift_that_runs_out_of_memory_ends_with_the_plan_and_what_helps(action, room):
    script, processes, error, helps = OUT_OF_MEMORY[action]
    variables = {"ACTION": action, "NPROC_PER_NODE": processes, "CUDA_VISIBLE_DEVICES": ""}
    outcome = room.run(room.root / MODEL / script, env=variables)
    assert outcome.returncode == 1, outcome.stdout
    text = outcome.stdout
    assert error in text and text.index(error) < text.index("in all")
    advice = [line for line in text.splitlines() if line.startswith("what helps most: ")]
    assert len(advice) == 1, text  # once, of several processes too
    assert helps in advice[0] and advice[0].count(";") == 2
    assert "(exit 1)" in text.rstrip().splitlines()[-1]
    assert advice[0] in (room.root / MODEL / "logs" / "latest.log").read_text()


def test_typed_flags_win_and_their_paths_begin_where_they_are_typed(room, tmp_path):
    rows = (room.root / MODEL / "data" / "video_training_dataset.json").read_text()
    place = tmp_path / "my data"
    place.mkdir()
    (place / "rows.json").write_text(rows)
    Image.new("RGB", (8, 8)).save(place / "a.jpg")
    outcome = room.run(
        room.root / MODEL / "sft.sh",
        *("--dataset", "my data/rows.json", "--learning-rate=5e-5", "--train_type", "full"),
        *("--output_dir", "out", "--gradient_checkpointing", "true"),
        cwd=tmp_path,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    flags = called(room)["flags"]
    assert flags["dataset"] == str(place / "rows.json")
    assert flags["learning_rate"] == "5e-5" and flags["tuner_type"] == "full"
    assert flags["output_dir"] == str(tmp_path / "out")
    assert flags["gradient_checkpointing"] == "true"
    assert not list(tmp_path.rglob("pwned"))


def test_a_line_of_the_script_can_be_commented_out(room):
    script = room.root / MODEL / "sft.sh"
    text = script.read_text().replace("  --max_length 4096", "  # --max_length 4096")
    script.write_text(text.replace("--lora_rank 8", "--lora_rank 16 # larger"))
    assert room.run(script).returncode == 0
    flags = called(room)["flags"]
    assert "max_length" not in flags and flags["lora_rank"] == "16"


def test_the_documented_variables_reach_swift(room, tmp_path):
    variables = {
        "CUDA_VISIBLE_DEVICES": "",
        "MAX_PIXELS": "501760",
        "http_proxy": "http://proxy:1",
        "https_proxy": "http://proxy:2",
        "HF_HOME": "./cache",
        "TRANSFORMERS_CACHE": "./cache",
    }
    outcome = room.run(room.root / MODEL / "sft.sh", cwd=tmp_path, env=variables)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    seen = called(room)["env"]
    assert seen["MAX_PIXELS"] == "501760" and seen["CUDA_VISIBLE_DEVICES"] == ""
    assert seen["http_proxy"] == "http://proxy:1" and seen["https_proxy"] == "http://proxy:2"
    assert Path(seen["HF_HOME"]) == Path(seen["HF_HUB_CACHE"]) == tmp_path / "cache"
    assert Path(seen["MODELSCOPE_CACHE"]) == tmp_path / "cache" / "modelscope"


def test_mistakes_are_found_in_a_second_and_all_of_them_named(room, tmp_path):
    began = time.monotonic()
    outcome = room.run(
        room.root / MODEL / "grpo.sh",
        *("--model", "./nowhere", "--dataset", "no.json", "--num_generations", "3"),
        cwd=tmp_path,
    )
    assert time.monotonic() - began < 20  # under a second where nothing else runs
    assert outcome.returncode == 2
    lines = [line for line in outcome.stdout.splitlines() if "error:" in line]
    assert len(lines) == 3, outcome.stdout
    assert f"{tmp_path}/nowhere is missing" in outcome.stdout
    assert "no multiple of --num_generations 3" in outcome.stdout
    assert not Path(room.env["RECORD"]).exists()


def test_a_picture_that_cannot_be_decoded_ends_the_run_before_swift(room):
    (room.root / MODEL / "data" / "a.jpg").write_bytes(b"<html>")
    outcome = room.run(room.root / MODEL / "sft.sh")
    assert outcome.returncode == 2 and "cannot be decoded" in outcome.stdout
    assert not Path(room.env["RECORD"]).exists()


def test_a_dry_run_prints_the_command_and_leaves_nothing(room):
    outcome = room.run(room.root / MODEL / "sft.sh", "--dry_run")
    assert outcome.returncode == 0 and "swift sft --model" in outcome.stdout
    assert not Path(room.env["RECORD"]).exists()
    assert not (room.root / MODEL / "logs").exists()


def test_sigterm_reaches_swift_and_nothing_is_left(room, tmp_path):
    process = room.start(room.root / MODEL / "sft.sh", env={"ACTION": "sleep"})
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143, out
    status = read_json(room.root / MODEL / "output" / "7B" / "status.json")
    assert (status["state"], status["exit_code"]) == ("stopped", 143)


def test_nohup_keeps_a_run_alive_when_the_terminal_hangs_up(room, tmp_path):
    script = room.root / MODEL / "sft.sh"
    wrapper = room.write("wrapped.sh", "#!/bin/bash\ntrap '' HUP\nexec \"$@\"\n")
    with Path(os.devnull).open("w") as null:
        process = room.start(wrapper, script, env={"ACTION": "sleep"}, stdout=null, stderr=null)
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 143


def adapter(room, number):
    import torch
    from safetensors.torch import save_file

    directory = room.root / MODEL / "output" / "7B" / "checkpoint-4"
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.full((2,), float(number))}, directory / "adapter_model.safetensors")
    base = room.root / MODEL / "models" / "Qwen2.5-VL-7B-Instruct"
    for name, value in {
        "adapter_config.json": {"r": 2, "lora_alpha": 4},
        "args.json": {"model": str(base)},
        "trainer_state.json": {"global_step": 4},
    }.items():
        (directory / name).write_text(json.dumps(value))
    return directory, base


def test_merge_takes_the_newest_adapter_and_keeps_what_was_there(room, tmp_path):
    directory, base = adapter(room, 1)
    target = room.root / MODEL / "output" / "checkpoint-merged"
    outcome = room.run(room.root / MODEL / "merge.sh", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = called(room)
    assert found["command"] == "export" and found["flags"]["merge_lora"] == "true"
    assert found["flags"]["adapters"] == str(directory) and found["flags"]["model"] == str(base)
    assert "exist_ok" not in found["flags"] and found["flags"]["output_dir"] != str(target)
    assert read_json(target / "merged_from.json")["adapter"] == str(directory)
    assert target.with_name("checkpoint-merged.1").is_dir()
    assert not list(target.parent.glob(".checkpoint-merged*"))
    adapter(room, 2)
    assert room.run(room.root / MODEL / "merge.sh").returncode == 0
    assert target.with_name("checkpoint-merged.2").is_dir()


def test_a_merge_that_fails_leaves_the_model_that_is_there(room):
    adapter(room, 1)
    target = room.root / MODEL / "output" / "checkpoint-merged"
    before = (target / "model.safetensors").stat().st_mtime_ns
    outcome = room.run(room.root / MODEL / "merge.sh", env={"CODE": "1"})
    assert outcome.returncode == 1
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    assert not target.with_name("checkpoint-merged.1").exists()
    assert not list(target.parent.glob(".checkpoint-merged*"))


def test_hf2megatron_says_what_is_missing_and_how_to_get_it(room):
    outcome = room.run(room.root / MODEL / "hf2megatron.sh")
    assert outcome.returncode == 3, outcome.stdout + outcome.stderr
    assert "megatron-core" in outcome.stdout and "pip install -r" in outcome.stdout
    assert not Path(room.env["RECORD"]).exists()


@pytest.mark.parametrize("script", ["sft.sh", "grpo.sh", "merge.sh", "hf2megatron.sh"])
def test_help_and_syntax(script, room):
    outcome = room.run(room.root / MODEL / script, "--help")
    assert outcome.returncode == 0 and outcome.stdout.strip()
    assert room.run("sh", room.root / MODEL / script, "--help").returncode == 0  # finds bash
