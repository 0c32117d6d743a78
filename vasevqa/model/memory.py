"""About how much memory of a GPU an SFT or GRPO run takes; a formula: the step is swift's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from shared import memory
from shared.errors import UserError, one_line
from shared.files import read_json
from vasevqa.model import swift_flags
from vasevqa.model.plan import Plan

DOCUMENTED = {"sft": 24, "grpo": 32}  # GB for the 7B model
_FEWER_PIXELS, _SHORTER = 501760, 2048  # what advice lowers MAX_PIXELS and --max_length to
_PIXELS_A_TOKEN = 28 * 28
_TEXT = 256  # tokens of question and answer beside the picture
# Qwen2.5-VL-7B-Instruct, whose size is said when --model is not there to be read.
SEVEN_BILLION: dict[str, Any] = {
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


def text(run: Plan, max_pixels: int) -> str:
    """The table of `./sft.sh --estimate` and `./grpo.sh --estimate`, and three settings that help.

    max_pixels: what larger pictures are scaled down to.
    """
    model, name = _model(run)
    found = _plan(run, max_pixels, model, name)
    others = {
        f"--{flag} {value}": _plan(
            replace(run, flags=run.flags | {flag: [value]}), max_pixels, model, name
        )
        for flag, value in _smaller(run).items()
    }
    if max_pixels > _FEWER_PIXELS:
        others[f"MAX_PIXELS={_FEWER_PIXELS}"] = _plan(run, _FEWER_PIXELS, model, name)
    advice = found.advice(others)
    # what the formula cannot know: longer rows, other models and machines
    rest = ["a smaller model", "several GPUs with --deepspeed zero3"]
    if swift_flags.whole(run.flags, "max_length", _SHORTER + 1) > _SHORTER:
        rest.insert(0, f"--max_length {_SHORTER}")
    rest = [other for other in rest if not any(other in saving for saving in advice)]
    return found.text(memory.devices(), [*advice, *rest][:3])


def plan(run: Plan, max_pixels: int) -> memory.Plan:
    """What one device holds at most, about."""
    return _plan(run, max_pixels, *_model(run))


def _smaller(run: Plan) -> dict[str, str]:
    """Flags that could save memory, and a value for each."""
    whole, flags = swift_flags.whole, run.flags
    changes = {"gradient_checkpointing": "true", "tuner_type": "lora", "torch_dtype": "bfloat16"}
    changes |= {"per_device_train_batch_size": "1"}
    if whole(flags, "max_length", 0) > _SHORTER:
        changes["max_length"] = str(_SHORTER)
    if run.world_size > 1:
        changes["deepspeed"] = "zero3"
    if run.is_grpo:  # half of each: the batch stays a multiple of the answers
        changes["num_generations"] = str(max(2, whole(flags, "num_generations", 8) // 2))
        changes["max_completion_length"] = str(whole(flags, "max_completion_length", 512) // 2)
    return changes


def configuration(directory: Path) -> tuple[Any, str]:
    """What --model is like, and its name; Qwen2.5-VL-7B where it is not there."""
    found = read_json(directory / "config.json")
    if not isinstance(found, dict) or found.get("model_type") != "qwen2_5_vl":
        return Qwen2_5_VLConfig(**SEVEN_BILLION), f"Qwen2.5-VL-7B ({directory} is not there)"
    try:
        return Qwen2_5_VLConfig.from_pretrained(directory), str(directory)
    except Exception as error:  # of many kinds: a value may be wrong in many ways
        raise UserError(
            f"{directory / 'config.json'} describes no Qwen2.5-VL: {one_line(error)}"
        ) from None


def _model(run: Plan) -> tuple[nn.Module, str]:
    """The model of --model without memory, and its name."""
    config, name = configuration(Path(swift_flags.text(run.flags, "model")))
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config), name


def _plan(run: Plan, max_pixels: int, model: nn.Module, name: str) -> memory.Plan:
    documented = f"the documents say at least {DOCUMENTED[run.script]} GB for 7B"
    found = memory.Plan(f"./{run.script}.sh, {name}, one picture a row; {documented}")
    _add_weights(found, run, model)
    _add_activations(found, run, model, max_pixels // _PIXELS_A_TOKEN)
    found.add("CUDA", memory.CUDA_CONTEXT, "context, kernels, workspaces")
    return found


def _add_weights(found: memory.Plan, run: Plan, model: nn.Module) -> None:
    dtype, flags = _dtype(run), run.flags
    count = sum(parameter.numel() for parameter in model.parameters())
    size, width = _share(run, 3, count * dtype.itemsize), dtype.itemsize
    found.add("weights", size, f"{count:,} in {dtype}")
    if swift_flags.text(flags, "tuner_type", "lora") == "full":
        frozen = sum(p.numel() for n, p in model.named_parameters() if "visual" in n)
        trained = count - (frozen if swift_flags.is_true(flags, "freeze_vit", True) else 0)
        what = f"{trained:,} trained parameters"
        if run.is_grpo and swift_flags.number(flags, "beta", 0.04):
            found.add("reference model", size, "the weights before training, for the KL term")
    else:
        rank, width = swift_flags.whole(flags, "lora_rank", 8), 4
        trained = _lora(model, rank)
        what = f"{trained:,} of rank {rank}, in float32"
        found.add("LoRA", trained * width, what)
    found.add("gradients", _share(run, 2, trained * width), what)
    found.add("optimizer", _share(run, 1, 2 * trained * width), "AdamW: two moments of each")


def _share(run: Plan, stage: int, size: int) -> int:
    """Bytes of `size` in one process; deepspeed's zeroN spreads what N reaches over all of them."""
    zero = re.match(r"zero([0-3])", swift_flags.text(run.flags, "deepspeed"))
    return size // run.world_size if zero and int(zero[1]) >= stage else size


def _lora(model: nn.Module, rank: int) -> int:
    """Parameters of the two small matrices at each linear layer of the language model."""
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "visual" not in name and "lm_head" not in name
    )


def _add_activations(found: memory.Plan, run: Plan, model: nn.Module, picture: int) -> None:
    flags, width = run.flags, _dtype(run).itemsize
    config: Any = cast(Any, model).config.text_config
    batch = swift_flags.whole(flags, "per_device_train_batch_size", 1)
    tokens = picture + _TEXT
    if run.is_grpo:
        tokens += swift_flags.whole(flags, "max_completion_length", 512) - _TEXT // 2
    tokens = min(tokens, swift_flags.whole(flags, "max_length", tokens))
    # of each token: what attention and the feed-forward layer keep for their gradients
    kept = 8 * config.hidden_size + 3 * config.intermediate_size
    layers = config.num_hidden_layers
    per_token, how = layers * kept, f"{tokens} tokens, all {layers} layers"
    if swift_flags.is_true(flags, "gradient_checkpointing", True):
        per_token, how = layers * config.hidden_size + kept, f"{tokens} tokens, recomputed"
    found.add("activations", batch * tokens * per_token * width, how)
    logits = batch * tokens * config.vocab_size * (width + 8)
    found.add("logits", logits, "in float32 too, and their gradient")
    if run.is_grpo:
        answers = swift_flags.whole(flags, "num_generations", 8)
        head = config.hidden_size // config.num_attention_heads
        cache = 2 * layers * config.num_key_value_heads * head * width
        found.add("KV cache", answers * tokens * cache, f"{answers} answers while they are made")


def _dtype(run: Plan) -> torch.dtype:
    name = swift_flags.text(run.flags, "torch_dtype", "bfloat16")
    return torch.float32 if name == "float32" else torch.bfloat16
