"""Which numbers the entry scripts take where no dataclass declares them, in files and in texts."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arcface_nano import build_inshop, write_config
from tests.harness import ROOT
from tests.unit.test_command_lines import NOT_NUMBERS, POSITIONAL, SCRIPTS, complaints, settings_of


def main_of(script: str):
    return importlib.import_module(script).main


def commands_of(directory: Path, contents: dict[str, str]) -> dict[str, list[object]]:
    """Command lines with a settings file of each content, by the name that it is to be refused."""
    commands = {}
    for name, text in contents.items():
        path = directory / f"{name}.yaml"
        path.write_text(text)
        commands[name] = ["--dry-run", "--config", path]
    return commands


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_a_settings_file_takes_the_same_numbers_as_the_flags(tmp_path: Path, value: str) -> None:
    """YAML has its own spellings of numbers, and its own errors for those without end."""
    written = value.replace("inf", ".inf").replace("nan", ".nan")
    names = ("workers", "lr", "master_port")
    commands = commands_of(tmp_path, {name: f"{name}: {written}\n" for name in names})
    assert complaints(main_of(SCRIPTS[0]), commands) == {}


def test_values_of_a_file_without_end_are_quoted_briefly(tmp_path: Path) -> None:
    """Python reads a hexadecimal number of 200,000 digits, and refuses to write it in decimals.

    Written out, the ten lines of lists hold 10 ** 10 texts.
    """
    names = ("workers", "lr", "at_mode", "data_root")
    contents = {name: f"{name}: 0x{'f' * 200_000}\n" for name in names}
    assert complaints(main_of(SCRIPTS[0]), commands_of(tmp_path, contents)) == {}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    bomb = {"lr": "\n".join(["lr: &lr", *[f"  {x}" for x in lines]]) + "\n"}
    assert complaints(main_of(SCRIPTS[0]), commands_of(tmp_path, bomb)) == {}


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("face_distill.train_distill", "--num-classes"),
        ("lavic.src.knowledge_distillation", "--max-samples"),
        ("multimodal.run_training", "--stage-epochs"),
    ],
)
def test_a_text_that_holds_numbers_is_read_like_a_number(script: str, flag: str) -> None:
    values = [*NOT_NUMBERS, "²", "nan/nan/nan", "1e999/1/1"]
    name = flag.strip("-").replace("-", "_")
    commands = {f"{name} {value[:10]}": [f"{flag}={value}", "--dry-run"] for value in values}
    assert complaints(main_of(script), commands) == {}


ARCFACE = (
    *("train_cfg.max_epochs", "train_cfg.val_interval", "train_dataloader.num_workers"),
    *("train_dataloader.batch_size", "model.head.num_classes", "model.head.scale"),
    *("model.head.margins", "optim_wrapper.optimizer.lr", "optim_wrapper.optimizer.weight_decay"),
    *("randomness.seed", "param_scheduler.0.end", "auto_scale_lr.base_batch_size"),
    *("default_hooks.checkpoint.interval", "default_hooks.logger.interval"),
    *("train_dataloader.dataset.pipeline.1.scale", "val_evaluator.0.topk"),
)
ALL_VALUES = ("train_cfg.max_epochs", "optim_wrapper.optimizer.lr", "model.head.margins")


def test_an_option_of_a_configuration_file_is_a_number_in_range(tmp_path: Path) -> None:
    own = ["--config", write_config(tmp_path / "nano.py"), "--data-root", build_inshop(tmp_path)]
    endless = (f"0x{'f' * 5000}", f"{{1: {'[' * 150}1{']' * 150}}}")
    commands = {
        f"{key.rpartition('.')[2].lower()} {value[:10]} of {key}": [
            *(*own, "--dry-run", "--cfg-options", f"{key}={value}")
        ]
        for key in ARCFACE
        for value in (
            "nan",
            "-2",
            *((*NOT_NUMBERS, "1e999", *endless) if key in ALL_VALUES else ()),
        )
    }
    assert complaints(main_of("arcface.run_scripts.run_arcface"), commands) == {}


SWIFT = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "save_steps", "logging_steps", "save_total_limit"),
    *("dataloader_num_workers", "dataset_num_proc", "seed", "lora_rank", "lora_dropout"),
    *("max_length", "num_generations", "temperature", "beta", "split_dataset_ratio", "nproc"),
)


def test_a_flag_of_swift_is_a_number_in_range() -> None:
    own = ["--model", "Qwen/Qwen2.5-VL-7B", "--output_dir", "out", "---", "--dry-run"]
    commands = {
        f"{name} {value[:10]}": ["grpo", *own, f"--{name}", value]
        for name in SWIFT
        for value in ("nan", "-2", *(NOT_NUMBERS if name in ("learning_rate", "max_steps") else ()))
    }
    assert complaints(main_of("vasevqa.model.train"), commands) == {}
    sft = {"seed ": ["sft", *own, "--seed", "nan"]}
    assert complaints(main_of("vasevqa.model.train"), sft) == {}
    merge = {"seed ": ["--output_dir", "out", "---", "--dry-run", "--seed", "nan"]}
    assert complaints(main_of("vasevqa.model.merge"), merge) == {}


def test_a_chain_refuses_the_numbers_that_its_training_would_refuse() -> None:
    for value in ("nan", "1e38", "9" * 9000):
        commands = {"lr ": ["--dry-run", f"--lr={value}"]}
        assert complaints(main_of("multimodal.run_all"), commands) == {}


REFUSED = """
import importlib, json, sys
from shared.errors import UserError
for script, words in json.loads(sys.argv[1]):
    try:
        code = importlib.import_module(script).main(words)
    except UserError as error:
        code = error.exit_code
    print(script, code)
"""


def test_a_number_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    commands = []
    for script in SCRIPTS:
        numbers = [name for name, leaf in settings_of(script).items() if leaf.range]
        name = next((name for name in numbers if name in ("workers", "batch_size")), "lr")
        if numbers or script == "multimodal.run_all":
            words = [f"--{name.replace('_', '-')}=1000000000000", "--dry-run"]
            commands.append((script, [*POSITIONAL.get(script, []), *words]))
    command = [sys.executable, "-c", REFUSED, json.dumps(commands)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [f"{script} 2" for script, _ in commands]
    assert len(commands) > 15
