"""About how much memory of a GPU an SFT or GRPO run takes, beside what the documents say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from shared.errors import UserError, one_line
from shared.estimate import CUDA_CONTEXT, MemoryPlan, device_memory, on_meta, parameter_bytes
from shared.files import read_json
from vasevqa.model import swift_flags
from vasevqa.model.plan import Plan

DOCUMENTED = {"sft": 24, "grpo": 32}  # GB for the 7B model
_FEWER_PIXELS, _SHORTER = 501760, 2048  # what advice lowers MAX_PIXELS and --max_length to
_COMPLETION = "max_completion_length"
_PIXELS_A_TOKEN = 28 * 28
_TEXT = 256  # tokens of question and answer beside the picture
# Qwen2.5-VL-7B-Instruct, whose size is said when --model is not there to be read.
_SEVEN_BILLION: dict[str, Any] = {
    "text_config": {
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944},
        **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    },
    "vision_config": {
        **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
        **{"out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]},
    },
    "tie_word_embeddings": False,
}


def text(plan: Plan, max_pixels: int) -> str:
    """The plan of `./sft.sh --estimate` and `./grpo.sh --estimate`, for one device.

    max_pixels: what larger pictures are scaled down to.
    """
    table, advice = _reckon(plan, max_pixels)
    documented = f"the documents say: at least {DOCUMENTED[plan.script]} GB for the 7B model"
    return f"{table.text(device_memory(), advice)}\n{documented}"


def after_failure(plan: Plan, max_pixels: int) -> str:
    """The same plan once memory has run out, whatever it promised, and what helps most."""
    table, advice = _reckon(plan, max_pixels)
    return f"{table.text(device_memory())}\nout of memory; what helps most: {'; '.join(advice)}"


def _reckon(plan: Plan, max_pixels: int) -> tuple[MemoryPlan, list[str]]:
    """The plan, and three settings that help: first those that save most, with what they save."""
    config, name = _config(Path(swift_flags.text(plan.flags, "model")))
    model = on_meta(lambda: AutoModelForImageTextToText.from_config(config))

    def table(plan: Plan, max_pixels: int) -> MemoryPlan:
        title = f"./{plan.script}.sh, {name}, one device, a run with one picture a row"
        found = MemoryPlan(title)
        _add_weights(found, plan, model)
        _add_activations(found, plan, config.text_config, max_pixels // _PIXELS_A_TOKEN)
        found.add("CUDA context", CUDA_CONTEXT, "kernels and workspaces, about")
        return found

    others = {
        f"--{flag} {value}": table(replace(plan, flags=plan.flags | {flag: [value]}), max_pixels)
        for flag, value in _smaller(plan).items()
    }
    if max_pixels > _FEWER_PIXELS:
        others[f"MAX_PIXELS={_FEWER_PIXELS}"] = table(plan, _FEWER_PIXELS)
    found = table(plan, max_pixels)
    advice = found.advised(others)
    rest = [other for other in _besides(plan) if not any(other in saving for saving in advice)]
    return found, [*advice, *rest][:3]


def _smaller(plan: Plan) -> dict[str, str]:
    """Flags that could save memory, and a value for each."""
    whole, flags = swift_flags.whole, plan.flags
    changes = {"gradient_checkpointing": "true", "tuner_type": "lora", "torch_dtype": "bfloat16"}
    changes |= {"per_device_train_batch_size": "1"}
    if whole(flags, "max_length", 0) > _SHORTER:
        changes["max_length"] = str(_SHORTER)
    if plan.world_size > 1:
        changes["deepspeed"] = "zero3"
    if plan.is_grpo:  # half of each: the batch stays a multiple of the answers
        answers, tokens = whole(flags, "num_generations", 8), whole(flags, _COMPLETION, 512)
        changes |= {"num_generations": str(max(2, answers // 2)), _COMPLETION: str(tokens // 2)}
    return changes


def _besides(plan: Plan) -> list[str]:
    """What the plan cannot reckon: it knows neither longer rows nor other models and machines."""
    longest = swift_flags.whole(plan.flags, "max_length", _SHORTER + 1)
    shorter = [f"--max_length {_SHORTER}"] if longest > _SHORTER else []
    return [*shorter, "a smaller model", "several GPUs with --deepspeed zero3"]


def _config(directory: Path) -> tuple[Any, str]:
    found = read_json(directory / "config.json")
    if isinstance(found, dict) and found.get("model_type") == "qwen2_5_vl":
        try:
            return Qwen2_5_VLConfig.from_pretrained(directory), str(directory)
        except Exception as error:  # of many kinds: a value may be wrong in many ways
            raise UserError(
                f"{directory / 'config.json'} describes no Qwen2.5-VL: {one_line(error)}"
            ) from None
    return Qwen2_5_VLConfig(**_SEVEN_BILLION), f"Qwen2.5-VL-7B ({directory} is not there)"


def _add_weights(table: MemoryPlan, plan: Plan, model: nn.Module) -> None:
    dtype, count = _dtype(plan), sum(p.numel() for p in model.parameters())
    size = _share(plan, 3, parameter_bytes(model, dtype))
    table.add("weights", size, f"{count:,} in {dtype}")
    if swift_flags.text(plan.flags, "tuner_type", "lora") == "full":
        frozen = sum(p.numel() for n, p in model.named_parameters() if "visual" in n)
        trained = count - (frozen if swift_flags.is_true(plan.flags, "freeze_vit", True) else 0)
        width, what = dtype.itemsize, f"{trained:,} trained parameters"
        if plan.is_grpo and swift_flags.number(plan.flags, "beta", 0.04):
            table.add("reference model", size, "the weights before training, for the KL term")
    else:
        rank = swift_flags.whole(plan.flags, "lora_rank", 8)
        trained = sum(_lora(model, rank))
        width, what = 4, f"{trained:,} of rank {rank}, in float32"
        table.add("LoRA", trained * width, what)
    table.add("gradients", _share(plan, 2, trained * width), what)
    table.add("AdamW", _share(plan, 1, 2 * trained * width), "two moments of each")


def _share(plan: Plan, stage: int, size: int) -> int:
    """Bytes of `size` in one process; deepspeed's zeroN spreads what N reaches over all of them."""
    zero = re.match(r"zero([0-3])", swift_flags.text(plan.flags, "deepspeed"))
    return size // plan.world_size if zero and int(zero[1]) >= stage else size


def _lora(model: nn.Module, rank: int) -> Iterator[int]:
    """Parameters of the two small matrices at each linear layer of the language model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "visual" not in name and "lm_head" not in name:
            yield rank * (module.in_features + module.out_features)


def _add_activations(table: MemoryPlan, plan: Plan, config: Any, picture: int) -> None:
    batch = swift_flags.whole(plan.flags, "per_device_train_batch_size", 1)
    tokens = picture + _TEXT
    if plan.is_grpo:
        tokens += swift_flags.whole(plan.flags, _COMPLETION, 512) - _TEXT // 2
    tokens = min(tokens, swift_flags.whole(plan.flags, "max_length", tokens))
    width = 2 if _dtype(plan) is not torch.float32 else 4
    # of each token: what attention and the feed-forward layer keep for their gradients
    kept = 8 * config.hidden_size + 3 * config.intermediate_size
    layers = config.num_hidden_layers
    per_token = layers * kept
    how = f"{tokens} tokens, all {layers} layers"
    if swift_flags.is_true(plan.flags, "gradient_checkpointing", True):
        per_token, how = layers * config.hidden_size + kept, f"{tokens} tokens, recomputed"
    table.add("activations", batch * tokens * per_token * width, how)
    table.add(
        "logits", batch * tokens * config.vocab_size * (width + 8), "in float32 too, and gradient"
    )
    if plan.is_grpo:
        answers = swift_flags.whole(plan.flags, "num_generations", 8)
        head = config.hidden_size // config.num_attention_heads
        cache = 2 * layers * config.num_key_value_heads * head * width
        table.add("KV cache", answers * tokens * cache, f"{answers} answers while they are made")


def _dtype(plan: Plan) -> torch.dtype:
    name = swift_flags.text(plan.flags, "torch_dtype", "bfloat16")
    return torch.float32 if name == "float32" else torch.bfloat16
