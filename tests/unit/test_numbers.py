"""Which numbers the entry scripts take: finite, in range, and refused in one short line."""

import importlib
import sys
from pathlib import Path

import pytest

from shared.settings import Setting
from tests.arcface_nano import build_inshop, write_config
from tests.harness import ROOT, start
from tests.unit.test_command_lines import (
    NOT_NUMBERS,
    POSITIONAL,
    SCRIPTS,
    complaint,
    complaints,
    settings_of,
)


def numbers(script: str) -> dict[str, Setting]:
    """The settings of a script that are numbers."""
    return {name: leaf for name, leaf in settings_of(script).items() if leaf.range}


# numbers that are not flags of a dataclass


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_a_settings_file_takes_the_same_numbers_as_the_flags(tmp_path: Path, value: str) -> None:
    """YAML has its own spellings of numbers, and its own errors for those without end."""
    train = importlib.import_module(SCRIPTS[0]).main
    path = tmp_path / "settings.yaml"
    commands = {}
    for name in ("workers", "seed", "lr", "timeout", "master_port"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"{name}: {value.replace('inf', '.inf').replace('nan', '.nan')}\n")
        commands[name] = ["--dry-run", "--config", path]
    assert complaints(train, commands) == {}


def test_a_hexadecimal_number_without_end_is_no_setting(tmp_path: Path) -> None:
    """Python reads one of 200,000 digits, and refuses to write it out in decimals."""
    path = tmp_path / "settings.yaml"
    commands = {}
    for name in ("workers", "lr", "at_mode", "adapter_layers", "data_root"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"{name}: 0x{'f' * 200_000}\n")
        commands[name] = ["--dry-run", "--config", path]
    assert complaints(importlib.import_module(SCRIPTS[0]).main, commands) == {}


def test_a_file_that_names_a_list_of_lists_again_and_again_is_quoted_briefly(
    tmp_path: Path,
) -> None:
    """Written out, the ten lines hold 10 ** 10 texts."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(["lr: &lr", *[f"  {x}" for x in lines]]) + "\n")
    main = importlib.import_module(SCRIPTS[0]).main
    assert complaints(main, {"lr": ["--dry-run", "--config", tmp_path / "bomb.yaml"]}) == {}


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("face_distill.train_distill", "--num-classes"),
        ("lavic.src.knowledge_distillation", "--max-samples"),
        ("lavic.src.prompt_tuning", "--max-samples"),
        ("multimodal.run_training", "--stage-epochs"),
    ],
)
def test_a_text_that_holds_numbers_is_read_like_a_number(script: str, flag: str) -> None:
    values = [*NOT_NUMBERS, "²", "nan/nan/nan", "1e999/1/1"]
    name = flag.strip("-").replace("-", "_")
    commands = {f"{name} {value[:10]}": [f"{flag}={value}", "--dry-run"] for value in values}
    assert complaints(importlib.import_module(script).main, commands) == {}


ARCFACE = (
    *("train_cfg.max_epochs", "train_cfg.val_interval", "train_dataloader.num_workers"),
    *("train_dataloader.batch_size", "model.head.num_classes", "model.head.scale"),
    *("model.head.margins", "optim_wrapper.optimizer.lr", "optim_wrapper.optimizer.weight_decay"),
    *("randomness.seed", "param_scheduler.0.end", "auto_scale_lr.base_batch_size"),
    *("default_hooks.checkpoint.interval", "default_hooks.logger.interval"),
    *("train_dataloader.dataset.pipeline.1.scale", "val_evaluator.0.topk"),
)


@pytest.fixture(scope="session")
def inshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_inshop(tmp_path_factory.mktemp("nano"))


@pytest.mark.parametrize("key", ARCFACE)
def test_an_option_of_a_configuration_file_is_a_number_in_range(
    key: str, inshop: Path, tmp_path: Path
) -> None:
    own = ["--config", write_config(tmp_path / "nano.py"), "--data-root", inshop, "--dry-run"]
    main = importlib.import_module("arcface.run_scripts.run_arcface").main
    values = (*NOT_NUMBERS, "-2", "1e999", f"0x{'f' * 5000}", f"{{1: {'[' * 150}1{']' * 150}}}")
    commands = {
        f"{key.rpartition('.')[2].lower()} {value[:10]}": [*own, "--cfg-options", f"{key}={value}"]
        for value in values
    }
    assert complaints(main, commands) == {}


SWIFT = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "save_steps", "logging_steps", "save_total_limit"),
    *("dataloader_num_workers", "dataset_num_proc", "seed", "lora_rank", "lora_dropout"),
    *("max_length", "num_generations", "temperature", "beta", "split_dataset_ratio", "nproc"),
)


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_flag_of_swift_is_a_number_in_range(script: str) -> None:
    main = importlib.import_module("vasevqa.model.train").main
    own = ["--model", "Qwen/Qwen2.5-VL-7B", "--output_dir", "out", "---"]
    commands = {
        f"{name} {value[:10]}": [
            script,
            *own,
            "--dry-run",
            f"--{name}",
            value,
        ]
        for name in SWIFT
        for value in (*NOT_NUMBERS, "-2")
    }
    assert complaints(main, commands) == {}


def test_a_merge_takes_no_number_without_end_either() -> None:
    main = importlib.import_module("vasevqa.model.merge").main
    commands = {
        f"seed {value[:10]}": ["--output_dir", "out", "---", "--dry-run", "--seed", value]
        for value in NOT_NUMBERS
    }
    assert complaints(main, commands) == {}


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_a_chain_refuses_the_numbers_that_its_training_would_refuse(value: str) -> None:
    main = importlib.import_module("multimodal.run_all").main
    assert complaints(main, {"lr ": ["--dry-run", f"--lr={value[:9000]}"]}) == {}


# in a process of its own


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_number_is_refused_before_torch_is_imported(script: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    flags = [name for name in numbers(script) if name in ("workers", "num_workers", "batch_size")]
    words = [f"--{flags[0] if flags else 'lr'}=1000000000000", "--dry-run"]
    path = ROOT / (script.replace(".", "/") + ".py")
    if not numbers(script) and script != "multimodal.run_all":
        pytest.skip("the script has no number")
    with start([*words, *POSITIONAL.get(script, [])], program=[sys.executable, path],
               PYTHONPATH=str(tmp_path)) as run:  # fmt: skip
        assert complaint(run.finish()) == ""
