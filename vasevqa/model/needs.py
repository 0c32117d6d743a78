"""What a swift command needs beside its flags: packages, weights, a plugin, room on the disk.

Standard library only, and swift is not imported: its imports take 8 s, and it would find most of
these faults after loading the model, or never.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from shared.errors import MissingToolError, did_you_mean
from shared.files import open_regular, read_json, read_object, read_text
from vasevqa.model import swift_flags
from vasevqa.model.paths import BY_ENDING, OR_HUB_ID, is_local

# package → what pip calls it, and what it is for
ALWAYS = {"swift": "ms-swift>=4.6,<5", "qwen_vl_utils": "qwen_vl_utils>=0.0.14"}
FOR_GRPO = {"msgspec": "msgspec"}  # ms-swift imports it and does not require it
STOP_FILE = Path("/tmp/stop")  # swift's graceful_exit ends a run after one step where this exists
_GIGABYTE = 10**9
_LFS = b"version https://git-lfs"


# flag, the values that need the package (none: any but false), its module, what pip calls it, and
# what to type without it
BY_FLAG = (
    ("deepspeed", (), "deepspeed", "deepspeed", "leave --deepspeed out"),
    ("use_vllm", (), "vllm", "vllm", "type --use_vllm false"),
    ("attn_impl", ("flash_attn", "flash_attention_2"), "flash_attn",
     "flash-attn --no-build-isolation", "type --attn_impl sdpa"),
    ("attn_impl", ("flash_attention_3",), "flash_attn_interface", "flash-attn-3",
     "type --attn_impl sdpa"),
    ("quant_method", ("bnb",), "bitsandbytes", "bitsandbytes", "leave --quant_method out"),
    ("quant_method", ("hqq",), "hqq", "hqq", "leave --quant_method out"),
    ("quant_method", ("eetq",), "eetq", "eetq", "leave --quant_method out"),
    ("optim", ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
     "bitsandbytes", "bitsandbytes", "type --optim adamw_torch"),
    ("use_liger_kernel", (), "liger_kernel", "liger-kernel", "type --use_liger_kernel false"),
    ("report_to", ("wandb",), "wandb", "wandb", "type --report_to tensorboard"),
    ("report_to", ("swanlab",), "swanlab", "swanlab", "type --report_to tensorboard"),
)  # fmt: skip
_NO = ("false", "none", "no", "0")


def packages(flags: Mapping[str, list[str]], *, is_grpo: bool) -> None:
    """Raise MissingToolError naming the packages that are not installed."""
    wanted = ALWAYS | (FOR_GRPO if is_grpo else {})
    missing = [name for module, name in wanted.items() if _is_missing(module)]
    if missing:
        quoted = " ".join(f"'{name}'" for name in missing)
        raise MissingToolError(f"training needs packages that are missing: pip install {quoted}")
    for flag, values, module, name, instead in BY_FLAG:
        for value in flags[flag] or ["true"] if flag in flags else ():
            is_asked = value in values if values else value.lower() not in _NO
            if is_asked and _is_missing(module):
                raise MissingToolError(
                    f"--{flag} {value} needs a package that is missing: pip install {name}, or "
                    f"{instead}"
                )


def _is_missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def deepspeed(flags: Mapping[str, list[str]], environ: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with --deepspeed, as lines."""
    value = swift_flags.text(flags, "deepspeed")
    names = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    if value and value not in names and not value.endswith(".json") and not value.startswith("{"):
        near = did_you_mean(value, names)
        yield f"--deepspeed {value} is none of {', '.join(names)}, and no .json file{near}"
    has_launcher = environ.get("NPROC_PER_NODE") or environ.get("NNODES")
    if value and not has_launcher and _is_missing("mpi4py"):
        yield (
            "--deepspeed without NPROC_PER_NODE looks for MPI, and mpi4py is missing: type "
            "--nproc 1 (or NPROC_PER_NODE=1), or leave --deepspeed out"
        )


def model(flags: Mapping[str, list[str]], *, is_grpo: bool) -> Iterator[str]:
    """What is wrong with --model, as lines; nothing for a hub's id, which swift downloads."""
    value = swift_flags.text(flags, "model")
    if not value:
        yield "--model is not given: name a directory, or a hub's id such as Qwen/Qwen2.5-VL-7B"
        return
    if not is_local(value):
        return
    path = Path(value)
    if not path.is_dir():
        yield f"the model {path} is missing: {_how_to_get(path, is_grpo)}"
    elif (path / "adapter_config.json").is_file():
        yield f"--model {path} is an adapter, not a model: ./merge.sh makes a model of it"
    elif not isinstance(read_json(path / "config.json"), dict):
        yield f"{path} holds no config.json that can be read: download the model again"
    else:
        yield from weights(path)


def weights(directory: Path) -> Iterator[str]:
    """What is wrong with the weight files of a model directory, as lines."""
    path = directory / "model.safetensors.index.json"
    index = read_object(path).get("weight_map")
    if path.exists() and not (isinstance(index, dict) and all(map(_is_name, index.values()))):
        yield f"{path} has no readable weight_map: download this file again"
        return
    names = set(index.values()) if index else {"model.safetensors"}
    if not index and not (directory / "model.safetensors").exists():
        if any(directory.glob("pytorch_model*.bin")):
            return
        yield f"{directory} holds no weights (model.safetensors): download the model again"
        return
    for name in sorted(names):
        if reason := broken_safetensors(directory / name):
            yield f"{directory / name} {reason}: download this file again"


def _is_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value and "\0" not in value


def broken_safetensors(path: Path) -> str | None:
    """Why a .safetensors file is not whole, or None; only its header is read."""
    try:
        with open_regular(path) as stream:
            start = stream.read(8)
            if start and _LFS.startswith(start):
                return "is a Git LFS pointer, not the weights (git lfs pull)"
            header = json.loads(stream.read(struct.unpack("<Q", start)[0]))
            expected = stream.tell() + max(
                (entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry),
                default=0,
            )
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, struct.error, MemoryError, OverflowError):
        return "is no safetensors file, or cut short"
    size = path.stat().st_size
    return None if size == expected else f"has {size:,} bytes where its header says {expected:,}"


def plugins(flags: Mapping[str, list[str]]) -> Iterator[str]:
    """What is wrong with --external_plugins and --reward_funcs, as lines."""
    known = set(_built_in_rewards())
    readable = True
    for name in flags.get("external_plugins", ()):
        path = Path(name)
        try:
            known |= _names_in(path)
        except OSError:
            yield f"the plugin {path} is missing: type --external_plugins FILE"
            readable = False
        except SyntaxError as error:
            yield f"{path}, line {error.lineno}: no Python: {error.msg}"
            readable = False
    for reward in flags.get("reward_funcs", ()):
        if readable and known and reward not in known:
            yield (
                f"--reward_funcs {reward} is defined nowhere: write `def {reward}(responses, "
                "references)` into plugin/plugin.py, or register a class as orms['…'] there"
            )


def system_prompt(flags: Mapping[str, list[str]]) -> Iterator[str]:
    """What is wrong with a --system that names a file, as a line."""
    value = swift_flags.text(flags, "system")
    if value.endswith(".txt") and not Path(value).is_file():
        yield f"the system prompt {value} is missing: type --system FILE.txt, or the text itself"


def other_paths(flags: Mapping[str, list[str]]) -> Iterator[str]:
    """A line for each further flag that names a file or directory which is not there."""
    checked = ("model", "dataset", "val_dataset", "system")
    for name in (*OR_HUB_ID, *BY_ENDING):
        for value in flags.get(name, ()) if name not in checked else ():
            is_path = value.endswith(BY_ENDING[name]) if name in BY_ENDING else is_local(value)
            if is_path and not Path(value).exists():
                yield f"--{name} {value} is missing: give a path that is there"


def divisible(flags: Mapping[str, list[str]], world_size: int) -> Iterator[str]:
    """A line when GRPO's batch does not hold whole groups of generations."""
    generations = swift_flags.whole(flags, "num_generations", 8)
    batch = swift_flags.whole(flags, "per_device_train_batch_size", 1)
    steps = swift_flags.whole(flags, "gradient_accumulation_steps", 1)
    steps = swift_flags.whole(flags, "steps_per_generation", steps)
    total = swift_flags.whole(flags, "generation_batch_size", batch * steps * world_size)
    if generations < 2:
        yield f"--num_generations {generations}: a group needs at least 2 answers to compare"
    elif total % generations:
        yield (
            f"{batch} a device × {steps} accumulated × {world_size} process(es) = {total} answers "
            f"are no multiple of --num_generations {generations}: change one of them"
        )


def stop_file(path: Path = STOP_FILE) -> Iterator[str]:
    """A line when a file is there that makes swift end every run after its first step."""
    if path.exists():
        yield f"{path} exists, and swift ends a run after one step where it does: remove it"


def disk(output_dir: Path, checkpoint: int, checkpoints: int) -> Iterator[str]:
    """A line when `output_dir` has no room for so many checkpoints of so many bytes, and one more.

    The one more is the new one: the oldest is removed after it.
    """
    there = next((path for path in (output_dir, *output_dir.parents) if path.exists()), Path("/"))
    needed, free = checkpoint * (checkpoints + 1), shutil.disk_usage(there).free
    if free < needed:
        yield (
            f"{there} has {free / _GIGABYTE:.1f} GB free, {checkpoints + 1} checkpoints of "
            f"{checkpoint / _GIGABYTE:.1f} GB need {needed / _GIGABYTE:.1f} GB: free some, lower "
            "--save_total_limit, or type --save_only_model true, or another --output_dir"
        )


def _how_to_get(path: Path, is_grpo: bool) -> str:
    if is_grpo and path.name == "checkpoint-merged":
        return "run ./merge.sh after ./sft.sh, or type --model DIR"
    name = path.name if path.name.startswith("Qwen") else "Qwen2.5-VL-7B-Instruct"
    return (
        f"modelscope download --model Qwen/{name} --local_dir {path} (or: hf download Qwen/{name} "
        f"--local-dir {path}), or type --model DIR"
    )


def _names_in(plugin: Path) -> set[str]:
    """Functions of a plugin, and the texts in it, among which are the names it registers."""
    tree = ast.parse(read_text(plugin, "utf-8-sig"), str(plugin))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    texts = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return functions | texts


@cache
def _built_in_rewards() -> frozenset[str]:
    """The texts in swift's own table of rewards; empty where it is not to be read."""
    spec = importlib.util.find_spec("swift")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root) / "rewards" / "orm.py"
        if path.is_file():
            return frozenset(_names_in(path))
    return frozenset()
