"""vasevqa/model's scripts with a pretended swift that records what it is called with."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from shared.files import read_json
from tests.shell.conftest import REPOSITORY, House

MODEL = "vasevqa/model"
# Records its arguments, does what ACTION says.
COMMAND = """import json, os, pathlib, sys, time
words = sys.argv[1:]
record = pathlib.Path(os.environ["RECORD"])
command = pathlib.Path(sys.argv[0]).stem
record.write_text(json.dumps({"command": command, "words": words, "env": {**os.environ}}))
if os.environ.get("ACTION") == "sleep":
    record.with_name("ready").touch()
    time.sleep(60)
if os.environ.get("ACTION") == "the GPU is full":
    import torch
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
if "--output_dir" in words and command == "export":
    made = pathlib.Path(words[words.index("--output_dir") + 1])
    base = pathlib.Path(words[words.index("--model") + 1])
    made.mkdir()
    for path in base.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
sys.exit(int(os.environ.get("CODE", "0")))
"""


class Room(House):
    """A house with the scripts, models, rows, and a swift that records."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        own = [*(REPOSITORY / "shared").glob("*.py"), *(REPOSITORY / MODEL).rglob("*.py")]
        self.take(*(str(path.relative_to(REPOSITORY)) for path in own))
        self.take("shared/shell/common.sh", "shared/shell/log.sh", "vasevqa/__init__.py")
        scripts = ("sft.sh", "grpo.sh", "merge.sh", "hf2megatron.sh", "prompt.txt")
        self.take(*(f"{MODEL}/{name}" for name in scripts))
        self.here, self.record = self.root / MODEL, base / "record.json"
        self.target = self.here / "output" / "checkpoint-merged"
        self.base = self.here / "models" / "Qwen2.5-VL-7B-Instruct"
        for directory in (self.base, self.target):
            directory.mkdir(parents=True)
            save_file({"w": torch.ones(2)}, directory / "model.safetensors")
            (directory / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
        for name in ("video_training_dataset", "grpo_video_dataset"):
            self.write_rows(self.here / "data" / f"{name}.json")
        self.env |= {"PYTHON": sys.executable, "PYTHONPATH": str(pretended_swift(base))}
        self.env |= {"RECORD": str(self.record), "HOME": str(base)}

    def write_rows(self, path: Path) -> None:
        """Rows of a picture that is beside them."""
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path.with_name("a.jpg"))
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "amphora"}]
        path.write_text(json.dumps([{"images": ["a.jpg"], "conversations": turns}] * 8))

    def adapter(self) -> Path:
        directory = self.here / "output" / "7B" / "checkpoint-4"
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.ones(2)}, directory / "adapter_model.safetensors")
        for name, value in {
            "adapter_config.json": {"r": 2, "lora_alpha": 4},
            "args.json": {"model": str(self.base)},
            "trainer_state.json": {"global_step": 4},
        }.items():
            (directory / name).write_text(json.dumps(value))
        return directory

    def typed(self, script: str, *words: object, **options) -> subprocess.CompletedProcess[str]:
        """What a script of the room answers, both streams in one."""
        return self.run(self.here / script, *words, stderr=subprocess.STDOUT, **options)

    def called(self) -> dict:
        """How swift was called, its flags by name."""
        found = json.loads(self.record.read_text())
        flags: dict[str, list[str]] = {}
        for word in found["words"]:
            if word.startswith("--"):
                flags[word[2:]] = []
            else:
                flags[next(reversed(flags))].append(word)
        return {**found, "flags": {name: " ".join(values) for name, values in flags.items()}}


def pretended_swift(base: Path) -> Path:
    """The directory of a package `swift`: the real one's settings, commands that record."""
    fake, real = base / "fake" / "swift", Path(importlib.util.find_spec("swift").origin).parent
    (fake / "cli").mkdir(parents=True)
    (fake / "__init__.py").touch()
    for name in ("arguments", "trainers", "rlhf_trainers", "rewards"):
        (fake / name).symlink_to(real / name)
    for name in ("sft", "rlhf", "export"):
        (fake / "cli" / f"{name}.py").write_text(COMMAND)
    return fake.parent


@pytest.fixture
def room(tmp_path):
    return Room(tmp_path)


SFT = {
    **{"tuner_type": "lora", "num_train_epochs": "2", "per_device_train_batch_size": "1"},
    **{"learning_rate": "1e-4", "lora_rank": "8", "gradient_accumulation_steps": "16"},
    **{"split_dataset_ratio": "0.01", "save_total_limit": "5"},
}
GRPO = {
    **{"rlhf_type": "grpo", "reward_funcs": "external_vase_acc", "num_train_epochs": "1"},
    **{"learning_rate": "1e-6", "num_generations": "4", "temperature": "1.0", "beta": "0.001"},
}


@pytest.mark.parametrize(("script", "documented"), [("sft.sh", SFT), ("grpo.sh", GRPO)])
def test_the_documented_flags_reach_swift_with_what_this_machine_needs(
    script, documented, room, tmp_path
):
    outcome = room.typed(script, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stdout
    found, here = room.called(), room.here
    flags = found["flags"]
    assert {name: flags[name] for name in documented} == documented
    assert flags["check_model"] == "false" and flags["callbacks"] == "graceful_exit"
    assert flags["model_type"] == flags["template"] == "qwen2_5_vl"
    if script == "sft.sh":
        assert (found["command"], flags["model"]) == ("sft", str(room.base))
        assert flags["dataset"] == str(here / "data" / "video_training_dataset.json")
        assert flags["output_dir"] == str(here / "output" / "7B")
    else:
        assert (found["command"], flags["model"]) == ("rlhf", str(room.target))
        assert flags["dataset"].startswith(str(here / "output" / "GRPO" / "data"))  # with solutions
        assert flags["output_dir"] == str(here / "output" / "GRPO")
        assert flags["system"] == str(here / "prompt.txt")
        assert flags["external_plugins"].endswith("plugin/adapt.py")
    assert found["env"]["ROOT_IMAGE_DIR"] == str(here / "data")
    assert found["env"]["MAX_PIXELS"] == "1003520"
    assert found["env"]["CUDA_VISIBLE_DEVICES"] == "0"


VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "", "MAX_PIXELS": "501760", "http_proxy": "http://proxy:1",
    "https_proxy": "http://proxy:2", "HF_HOME": "./cache", "TRANSFORMERS_CACHE": "./cache",
}  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run with lines of sft.sh edited, flags typed, variables set, and a swift that fails."""
    base = tmp_path_factory.mktemp("own")
    room = Room(base)
    script = room.here / "sft.sh"
    text = script.read_text().replace("  --max_length 4096", "  # --max_length 4096")
    script.write_text(text.replace("--lora_rank 8", "--lora_rank 16 # larger"))
    room.write_rows(base / "my data" / "rows.json")
    words = ["--dataset", "my data/rows.json", "--learning-rate=5e-5", "--train_type", "full"]
    room.ended = room.typed("sft.sh", *words, "--output_dir", "out",
                            cwd=base, env=VARIABLES | {"CODE": "7"})  # fmt: skip
    room.begun_in = base
    return room


def test_typed_flags_win_and_their_paths_begin_where_they_are_typed(own):
    flags = own.called()["flags"]
    assert flags["dataset"] == str(own.begun_in / "my data" / "rows.json")
    assert flags["learning_rate"] == "5e-5" and flags["tuner_type"] == "full"
    assert flags["output_dir"] == str(own.begun_in / "out")
    assert not list(own.begun_in.rglob("pwned"))


def test_a_line_of_the_script_can_be_changed_and_commented_out(own):
    flags = own.called()["flags"]
    assert "max_length" not in flags and flags["lora_rank"] == "16"


def test_the_documented_variables_reach_swift(own):
    seen, cache = own.called()["env"], own.begun_in / "cache"
    for name in ("CUDA_VISIBLE_DEVICES", "MAX_PIXELS", "http_proxy", "https_proxy"):
        assert seen[name] == VARIABLES[name]
    assert Path(seen["HF_HOME"]) == Path(seen["HF_HUB_CACHE"]) == cache
    assert Path(seen["MODELSCOPE_CACHE"]) == cache / "modelscope"


def test_status_log_and_exit_code_tell_the_same(own):
    assert own.ended.returncode == 1
    status = read_json(own.begun_in / "out" / "status.json")
    assert (status["state"], status["exit_code"], status["recipe"]) == ("failed", 1, "vasevqa")
    assert "left with exit code 7" in status["reason"]
    log = (own.here / "logs" / "latest.log").read_text()
    assert "swift sft --model" in log and log.rstrip().endswith("(exit 1)")


@pytest.mark.slow
def test_fault_41_a_swift_that_runs_out_of_memory_ends_with_the_plan_and_what_helps(room):
    outcome = room.typed("grpo.sh", env={"ACTION": "the GPU is full"})
    text = outcome.stdout
    assert outcome.returncode == 1, text
    assert text.index("CUDA out of memory.") < text.index("in all")
    advice = [line for line in text.splitlines() if line.startswith("what helps most: ")]
    assert len(advice) == 1, text
    assert "--gradient_checkpointing true" in advice[0] and advice[0].count(";") == 2
    assert "(exit 1)" in text.rstrip().splitlines()[-1]
    assert advice[0] in (room.here / "logs" / "latest.log").read_text()


def test_mistakes_are_found_in_a_second_and_all_of_them_named(room, tmp_path):
    began = time.monotonic()
    words = ["--model", "./nowhere", "--dataset", "no.json", "--num_generations", "3"]
    outcome = room.typed("grpo.sh", *words, cwd=tmp_path)
    assert time.monotonic() - began < 20  # under a second where nothing else runs
    assert outcome.returncode == 2
    lines = [line for line in outcome.stdout.splitlines() if "error:" in line]
    assert len(lines) == 3, outcome.stdout
    assert f"{tmp_path}/nowhere is missing" in outcome.stdout
    assert "no multiple of --num_generations 3" in outcome.stdout
    assert not room.record.exists()


def test_a_dry_run_prints_the_command_and_leaves_nothing(room):
    outcome = room.typed("sft.sh", "--dry_run")
    assert outcome.returncode == 0 and "swift sft --model" in outcome.stdout
    assert not room.record.exists() and not (room.here / "logs").exists()


def test_nohup_keeps_a_run_alive_when_the_terminal_hangs_up_and_sigterm_ends_it(room, tmp_path):
    wrapper = room.write("wrapped.sh", "#!/bin/bash\ntrap '' HUP\nexec \"$@\"\n")
    with Path(os.devnull).open("w") as null:
        words = [wrapper, room.here / "sft.sh"]
        process = room.start(*words, env={"ACTION": "sleep"}, stdout=null, stderr=null)
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 143
    status = read_json(room.here / "output" / "7B" / "status.json")
    assert (status["state"], status["exit_code"]) == ("stopped", 143)


def test_merge_takes_the_newest_adapter_and_keeps_what_was_there(room, tmp_path):
    directory, target = room.adapter(), room.target
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert room.typed("merge.sh", env={"CODE": "1"}).returncode == 1
    assert (target / "model.safetensors").stat().st_mtime_ns == before  # nothing is changed
    assert [path.name for path in target.parent.glob("*checkpoint-merged*")] == [target.name]
    outcome = room.typed("merge.sh", cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stdout
    found = room.called()
    flags = found["flags"]
    assert found["command"] == "export" and flags["merge_lora"] == "true"
    assert flags["adapters"] == str(directory) and flags["model"] == str(room.base)
    assert "exist_ok" not in flags and flags["output_dir"] != str(target)
    assert read_json(target / "merged_from.json")["adapter"] == str(directory)
    left = {path.name for path in target.parent.glob("*checkpoint-merged*")}
    assert left == {"checkpoint-merged", "checkpoint-merged.1"}


def test_hf2megatron_says_what_is_missing_and_how_to_get_it(room):
    outcome = room.typed("hf2megatron.sh")
    assert outcome.returncode == 3, outcome.stdout
    assert "megatron-core" in outcome.stdout and "pip install -r" in outcome.stdout
    assert not room.record.exists()


@pytest.mark.parametrize("script", ["sft.sh", "grpo.sh", "merge.sh", "hf2megatron.sh"])
def test_help_under_sh_too(script, room):
    outcome = room.run("sh", room.here / script, "--help")  # finds bash
    assert outcome.returncode == 0 and outcome.stdout.strip()
