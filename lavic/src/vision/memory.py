"""--estimate: one step of stage 1 on a product as the real data have them, without values.

What both stages' estimates share is here too: the model without weights, and the precision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavic.src.vision import model
from lavic.src.vision.adapters import adapter_parameters, add_adapter
from lavic.src.vision.caption_loss import FixedStart, caption_nll, why_not_reusable
from lavic.src.vision.captions import NO_LABEL, Batch
from shared import fit, memory
from shared.amp import Amp
from shared.errors import UserError, one_line

HUB_ID = "llava-hf/llava-v1.6-mistral-7b-hf"
ITEMS = list(range(1, 1 + model.MOST_VIEWS))  # any five ids in a row
_REAL = Path(__file__).with_name("llava_v16_mistral_7b.json")
_SMALLEST = 20 * memory.GB  # the GPU that the document names
# Tokens: what all prompts begin with, all before the picture, after it, the description.
_FIXED, _HEAD, _MARK, _SAID = 85, 120, 4, 115


def text(values: dict[str, Any], processes: int) -> str:
    """The table for one process, whether it fits on the GPUs here, what saves most.

    values: the arguments of `plan` by their names.
    """
    changes = {
        "--gradient_checkpointing on": {"gradient_checkpointing": "on"},
        "--micro-batch 1": {"batch_size": 1, "grad_accum": 2},
        "--load_in_4bit": {"load_in_4bit": True},
    }
    return report(plan, values, changes, processes)


def report(
    plan_of: Any, values: dict[str, Any], changes: dict[str, dict[str, Any]], processes: int
) -> str:
    """`plan_of(**values)` as text, with what each of `changes`, as users type it, would save."""
    others = {flag: values | change for flag, change in changes.items()}
    plans = {
        flag: plan_of(**other, processes=processes)
        for flag, other in others.items()
        if other != values
    }
    return memory.report(plan_of(**values, processes=processes), plans, "--micro-batch 1")


def fitted(cfg: Any, plan_of: Any, values_of: Any, processes: int) -> Any:
    """A stage's `cfg` with the forward passes and the checkpointing that --fit has room for.

    plan_of, values_of: the stage's `plan`, and its arguments of a configuration. Raises UserError.
    """
    ways = [
        {"gradient_checkpointing": again, "micro_batch": size}
        for again in ("off", "on")
        for size in fit.halves(cfg.samples_per_step)
    ]
    on_cpu = fit.is_without_gpu(cfg.run) and not cfg.estimate
    here = {"dtype": "float32"} if on_cpu and cfg.dtype == "auto" else {}
    tried = (
        (other, plan_of(**(values_of(other) | here), processes=processes))
        for other in fit.variants(cfg, ways)
    )
    return fit.first(cfg, tried, "--dtype bfloat16, --load_in_4bit")


def plan(
    *,
    model_name: str,
    batch_size: int,
    grad_accum: int,
    lora_r: int,
    lora_dropout: float,
    dtype: str,
    amp: str,
    load_in_4bit: bool,
    gradient_checkpointing: str,
    reuse_prompt: bool,
    processes: int = 1,
    batch: Batch | None = None,
) -> memory.Plan:
    """What one process holds at the peak of a step on `batch`, usual samples if None."""
    batch = batch or _usual_samples(batch_size, configuration(model_name))
    recomputed = recomputes(gradient_checkpointing, model.TOWER_IS_TIGHT_BELOW)
    with memory.counted() as live:
        base = base_model(model_name, dtype, four_bit=load_in_4bit)
        llava = add_adapter(base, model.VISION_TARGETS, r=lora_r, dropout=lora_dropout)
        core = model.core_of(llava)
        model.train_vision(llava)
        if recomputed:
            model.checkpoint_activations(core.vision_tower)
        trained = list(adapter_parameters(llava).values())
        optimizer = torch.optim.AdamW(trained)
        scaler, start = amp_of(dtype, amp), None
        batch = batch._replace(views=torch.empty(batch.views.shape))
        live.begin(llava, optimizer)
        if reuse_prompt and not why_not_reusable(core.language_model):
            start = FixedStart(llava, [0] * _FIXED)
        for _ in range(min(2, grad_accum)):
            with scaler.autocast():
                loss = caption_nll(llava, batch, ITEMS, start)
            scaler.backward(loss)
        scaler.step(optimizer, trained, clip_norm=1.0)
    num_views, length = len(batch.views) // len(batch.tokens), batch.tokens.shape[1]
    what = f"{num_views} views of {batch.views.shape[-1]} pixels and {length} tokens a sample"
    what += ", the tower recomputed" * recomputed
    return planned(live, f"{model_name}, stage 1, batch size {batch_size}", what, llava, processes)


@torch.no_grad()
def of_evaluation(
    model_name: str, *, stage: int, batch_size: int, dtype: str, amp: str, load_in_4bit: bool,
    spread: bool,
) -> str:  # fmt: skip
    """The table of an evaluation at its peak, on each GPU that the model is spread over.

    stage: 1, usual samples through tower and language model; 2, prompts of 2048 tokens through the
    latter alone.
    """
    num_gpus = max(1, len(memory.devices())) if spread else 1
    with memory.counted() as live:
        base = base_model(model_name, dtype, four_bit=load_in_4bit)
        batch = _usual_samples(batch_size, base.config)
        batch = batch._replace(views=torch.empty(batch.views.shape))
        live.begin(base)
        with amp_of(dtype, amp).autocast():
            if stage == 1:
                caption_nll(base, batch, ITEMS, None)
            else:
                base.model.language_model(input_ids=torch.zeros(batch_size, 2048, dtype=torch.long))
    what = f"{batch_size} sample(s), stage {stage}" + f", weights on {num_gpus} GPU(s)" * spread
    title = f"{model_name}, evaluation, batch size {batch_size}"
    found = planned(live, title, what, base, 1)
    found.rows = [
        (row, size // num_gpus if row == "weights" else size, how)
        for row, size, how in found.rows
        if size
    ]
    return memory.report(found, {})


def planned(live: Any, title: str, what: str, trained: Any, processes: int) -> memory.Plan:
    """The peak as a table; gradients travel in one piece, without DDP."""
    packed = [part for part in trained.modules() if isinstance(part, _FourBit)]
    live.num_parameters += sum(
        part.in_features * part.out_features - part.weight.numel() for part in packed
    )
    found = live.plan(title, what, wrapped=None, processes=processes)
    if processes > 1:
        found.add("exchange", 2 * memory.gradient_bytes(trained), "gradients of one and of all")
    return found


def configuration(model_name: str) -> Any:
    """The model's configuration: of a directory, else that of LLaVA-v1.6-Mistral-7B."""
    from transformers import LlavaNextConfig

    path = Path(model_name) / "config.json"
    if Path(model_name).is_dir() and not path.is_file():
        raise UserError(f"{path} is missing: the memory is estimated from it")
    try:
        content = json.loads((path if path.is_file() else _REAL).read_text(encoding="utf-8"))
        return LlavaNextConfig(**content)
    except Exception as error:  # transformers' own and Python's: a value may be wrong in many ways
        raise UserError(f"{path} is no configuration of a LLaVA-NeXT: {one_line(error)}") from None


def base_model(model_name: str, dtype: str, *, four_bit: bool) -> Any:
    """The frozen model, as load_base gives it."""
    from transformers import LlavaNextForConditionalGeneration

    base: Any = LlavaNextForConditionalGeneration(configuration(model_name))
    half = torch.float32 if dtype == "float32" else torch.bfloat16
    base.requires_grad_(False).eval().to(half)
    for layer in base.model.language_model.layers.modules() if four_bit else ():
        for name, linear in layer.named_children():
            if isinstance(linear, nn.Linear):
                setattr(layer, name, _FourBit(linear))
    return base


class _FourBit(nn.Linear):
    """A frozen Linear as bitsandbytes keeps it: half a byte a weight and its scales, a whole matrix
    in the compute dtype at each use. Without a bias, as Mistral's and Llama's.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        count = linear.weight.numel()
        packed = torch.empty(count // 2 + count // 64, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self._dtype = linear.weight.dtype

    def forward(self, input: Tensor) -> Tensor:
        """Of the right shape, without values."""
        return _Unpacked.apply(input.to(self._dtype), self.out_features)  # type: ignore[no-any-return]


class _Unpacked(torch.autograd.Function):
    """A product with a matrix (D_out, D) that is there only meanwhile."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, width: int) -> Tensor:
        ctx.shape = (width, rows.shape[-1])
        return rows @ torch.empty(ctx.shape, dtype=rows.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ torch.empty(ctx.shape, dtype=gradients[0].dtype), None


def amp_of(dtype: str, amp: str) -> Amp:
    """The precision of the settings, without loss scaling."""
    scaled = dtype == "float16" and amp == "off"
    return Amp("bf16" if scaled else memory.mode_of(amp), memory.CPU)


def recomputes(choice: str, below: int) -> bool:
    """What --gradient_checkpointing comes to on the smallest GPU here; without any, of 20 GB."""
    sizes = [size for _, size in memory.devices()] or [_SMALLEST]
    return model.recomputes(choice, below, sizes)


def _usual_samples(rows: int, config: Any) -> Batch:
    """Samples as the real data have them, each with all views."""
    asked = [*[0] * _HEAD, *ITEMS, *[0] * _MARK]
    tokens = torch.tensor([[*asked, *[0] * _SAID]] * rows)
    labels = torch.tensor([[*[NO_LABEL] * len(asked), *[0] * _SAID]] * rows)
    mask = torch.tensor([[1] * (len(asked) + _SAID)] * rows)
    side = config.vision_config.image_size
    views = torch.empty(rows * model.MOST_VIEWS, 3, side, side)
    num_views = torch.tensor([model.MOST_VIEWS] * rows)
    return Batch(tokens, mask, labels, views, num_views, _HEAD, True, rows * _SAID)
