"""LLaVA-NeXT as both stages use it: five item tokens whose embeddings are a picture's CLS vectors.

    model, processor = load_base("llava-hf/llava-v1.6-mistral-7b-hf", device, torch.bfloat16)
    item_ids = add_item_tokens(model, processor.tokenizer)
    views = picture_views(processor, read_rgb(path))            # (V, 3, S, S), V real views
    vectors = cls_vectors(model, views)                         # (V, D)
    embeds = place_vectors(embeds, filled_slots(ids, item_ids, [len(views)]), vectors)

`model` may be the base or a PeftModel around it. Adapters are made, saved and loaded by
adapters.py. V views of all pictures together, S the tower's input size, D the language model's
width, B rows of L tokens.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from shared import hub, weights
from shared.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

log = logging.getLogger(__name__)

TOWER_IS_TIGHT_BELOW = 30 * 10**9  # bytes of a GPU; the tower's activations take 7 GB
MOST_VIEWS = 5  # of one picture: the whole and up to four tiles
ITEM_TOKENS = [f"<ItemImageEmb{number}>" for number in range(1, MOST_VIEWS + 1)]
# Every Linear of the vision tower and the projector, and nothing else; for peft, a full match.
VISION_TARGETS = (
    r"model\.(vision_tower\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
    r"|multi_modal_projector\.linear_[12])"
)


_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def precision(dtype: str, amp: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(the dtype of the frozen weights, the mode for Amp) that --dtype and --amp mean on a device.

    float16 always comes with loss scaling: the adapter's small gradients would vanish without.
    Raises UserError for float16 on the CPU.
    """
    if dtype == "auto":
        on_gpu = (
            "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"
        )
        dtype = on_gpu if device.type == "cuda" else "float32"
    if dtype == "float16" and device.type != "cuda":
        raise UserError("--dtype float16 needs a GPU; allowed on the CPU: float32, bfloat16")
    return _DTYPES[dtype], "fp16" if dtype == "float16" and amp == "off" else amp


def recomputes(choice: str, below: int, sizes: list[int]) -> bool:
    """Whether --gradient_checkpointing (auto, on, off) has activations computed again.

    auto: where the smallest of `sizes`, bytes of GPUs, is less than `below`; never without a GPU.
    """
    return choice == "on" or (choice == "auto" and min(sizes, default=below) < below)


def gpu_bytes(device: torch.device) -> list[int]:
    """The memory of a GPU as a list of one; [] for another device."""
    return [torch.cuda.get_device_properties(device).total_memory] if device.type == "cuda" else []


def checkpoint_activations(part: Any) -> None:
    """Have tower or language model keep no activations inside its layers: computed again.

    Not both: a language model that does so drops its cache, silently, and stage 1 keeps the
    prompts' start in one. Not reentrant: the reentrant kind gives no gradients to a tower whose
    input has none, silently too.
    """
    part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def train_vision(model: nn.Module) -> None:
    """Dropout on in the adapter of tower and projector; the language model stays in eval."""
    core = core_of(model)
    core.vision_tower.train()
    core.multi_modal_projector.train()


def pad_id(tokenizer: Any) -> int:
    """What fills rows up; it is masked, so that any token would do."""
    found = tokenizer.pad_token_id
    return tokenizer.eos_token_id if found is None else found


def load_base(
    path_or_id: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    four_bit: bool = False,
    spread: bool = False,
) -> tuple[LlavaNextForConditionalGeneration, Any]:
    """The model, frozen, in eval and on `device`, and its processor.

    path_or_id: a directory that exists, else a model id of the Hub, or of ModelScope where
    USE_MODELSCOPE_HUB=1; what is not in the cache is fetched, and a log line says so first.
    four_bit: the language model's layers in NF4, by bitsandbytes. spread: over all GPUs, by
    accelerate, in place of `device`.
    Raises UserError for a directory that is no whole LLaVA-NeXT checkpoint, and for a model that
    cannot be had, within 15 seconds where nobody answers.
    """
    source, is_local = str(path_or_id), Path(path_or_id).is_dir()
    if not is_local and (copy := hub.asked_copy(source)):
        source, is_local = str(copy), True
    if is_local:
        _check_directory(Path(source))
    where: Any = {"local_files_only": is_local or not hub_answers(source)}
    import transformers
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        loaded: Any = LlavaNextForConditionalGeneration.from_pretrained(
            source,
            dtype=dtype,
            device_map="auto" if spread else {"": device},
            quantization_config=_nf4(dtype) if four_bit else None,
            output_loading_info=True,
            **where,
        )
        processor = AutoProcessor.from_pretrained(source, **where)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be loaded: {one_line(error)}") from None
    model, report = loaded
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise UserError(
            f"{source} lacks {len(lacking)} weights of a LLaVA-NeXT ({', '.join(lacking[:3])}): "
            "check that it is the right checkpoint, or fetch it again"
        )
    _refuse_offloaded(model)
    for part in model.modules() if four_bit else ():
        part.support_avx512bf16_for_cpu = False  # a CPU form that cannot be trained through
    model.name_or_path = str(path_or_id)  # what adapters note as their base: no cache's path
    return model.requires_grad_(False).eval(), processor


def _nf4(dtype: torch.dtype) -> Any:
    """How the language model's layers are stored; what trains or reads pictures stays as it is."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )


def _refuse_offloaded(model: Any) -> None:
    """Raise UserError when parts of a model that was spread over GPUs are on none of them."""
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if {"cpu", "disk"} & places and places - {"cpu", "disk"}:
        raise UserError(
            "--device_map auto: the model does not fit on the visible GPUs together; add "
            "--load_in_4bit, or show it more of them (CUDA_VISIBLE_DEVICES)"
        )


def add_item_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Make the five ITEM_TOKENS known to tokenizer and embeddings; their ids, five in a row.

    Other special tokens, <image> among them, stay what they are. The embedding grows when it lacks
    rows for them and never shrinks: the real checkpoint has more rows than its tokenizer has words.
    """
    tokenizer.add_tokens(ITEM_TOKENS, special_tokens=True)
    embeddings = core_of(model).get_input_embeddings()
    if len(tokenizer) > embeddings.weight.shape[0]:
        plain(model).resize_token_embeddings(len(tokenizer))
        plain(model).requires_grad_(False)
    ids = tokenizer.convert_tokens_to_ids(ITEM_TOKENS)
    if ids != list(range(ids[0], ids[0] + MOST_VIEWS)):
        raise UserError(f"the tokenizer holds {ITEM_TOKENS[0]} … at {ids}, not five ids in a row")
    return ids


def core_of(model: nn.Module) -> Any:
    """The LlavaNextModel: vision_tower, multi_modal_projector, language_model."""
    return plain(model).model


def head_of(model: nn.Module) -> nn.Module:
    """The layer from the language model's hidden states to logits."""
    return plain(model).lm_head


def picture_views(processor: Any, picture: Tensor) -> Tensor:
    """A picture's views for the tower, (V, 3, S, S) float32: the whole, then its 2 to 4 tiles.

    picture: RGB, uint8 (3, H, W). Only views that show something: the zeros with which the image
    processor fills up a batch of pictures never come into being. Raises UserError for a processor
    whose grids give more than five views.
    """
    made = processor.image_processor(
        picture, return_tensors="pt", input_data_format="channels_first"
    )
    views = made["pixel_values"][0]
    if len(views) > MOST_VIEWS:
        raise UserError(
            f"the image processor's grids give {len(views)} views of a picture, {MOST_VIEWS} item "
            "tokens are there for them: use a checkpoint with grids of at most four tiles"
        )
    return views


def cls_vectors(model: nn.Module, views: Tensor) -> Tensor:
    """What stands at the item tokens: (V, D), the projected CLS vector of each view.

    views: (V, 3, S, S). The vector is that of the tower's last layer, without its final norm. In
    that layer only the CLS row is computed: one query over the keys and values of all tokens.
    """
    core = core_of(model)
    tower = core.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(views.to(tower.embeddings.patch_embedding.weight)))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    return core.multi_modal_projector(_cls_of_last_layer(tower.encoder.layers[-1], hidden))


def filled_slots(ids: Tensor, item_ids: list[int], views: Tensor | list[int]) -> Tensor:
    """Where a vector belongs: (B, L) bool, true at a picture's item token k when it has a view k.

    ids: (B, L), where each picture's tokens begin with the first item token. views: how many views
    each picture has, in the order in which the pictures occur, row after row. With five tokens and
    three views the last two tokens stay unfilled: they keep their own embeddings.
    """
    number = ids - item_ids[0]  # of the item token among the five; anything else lies outside
    is_item = (number >= 0) & (number < len(item_ids))
    picture = (number == 0).flatten().cumsum(0).view_as(ids) - 1
    counts = torch.as_tensor(views, device=ids.device)
    return is_item & (number < counts[picture.clamp(min=0)])


def place_vectors(embeds: Tensor, filled: Tensor, vectors: Tensor) -> Tensor:
    """`embeds` (B, L, D) with `vectors` (V, D) at the V places where `filled` (B, L) is true.

    The vectors follow the order of the places, row after row. Differentiable in both; the dtype is
    that of `embeds`.
    """
    return embeds.masked_scatter(filled.unsqueeze(-1), vectors.to(embeds.device, embeds.dtype))


@torch.no_grad()
def likeliest(
    model: nn.Module, embeds: Tensor, mask: Tensor, max_tokens: int, eos_id: int
) -> list[list[int]]:
    """The likeliest tokens after each row of `embeds` (B, L, D), greedily, at most `max_tokens`.

    mask: (B, L), 0 for what fills rows up on the left. The end of the text is left out.
    """
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=eos_id, pad_token_id=eos_id
    )
    made = plain(model).generate(
        inputs_embeds=embeds, attention_mask=mask, generation_config=greedy
    )
    rows = made.tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def _cls_of_last_layer(layer: Any, hidden: Tensor) -> Tensor:
    """The first row of what `layer` makes of `hidden` (V, T, W): (V, W)."""
    attention = layer.self_attn
    hidden = hidden.to(layer.layer_norm1.weight.device)  # of a tower spread over several GPUs
    normed, cls = layer.layer_norm1(hidden), hidden[:, :1]
    query, key, value = (
        projection(rows).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for projection, rows in (
            (attention.q_proj, normed[:, :1]),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    cls = cls + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return (cls + layer.mlp(layer.layer_norm2(cls)))[:, 0]


def plain(model: nn.Module) -> Any:
    """The model inside a PeftModel, its adapters still in place; any other model as it is."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner else model


def _check_directory(directory: Path) -> None:
    """Raise UserError, naming the file, when a part of the checkpoint is missing or damaged."""
    from transformers import AutoConfig

    for name in ("config.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise UserError(
                f"{directory / name} is missing: copy the whole checkpoint, or type --model_name "
                "with the Hub's id to have it fetched"
            )
    weights.read(directory)  # mapped, not read: it knows pointers, pages and files that are cut off
    try:
        kind = AutoConfig.from_pretrained(directory).model_type
    except Exception as error:  # transformers' own and Python's: a value may be wrong in many ways
        raise UserError(f"{directory / 'config.json'}: {one_line(error)}") from None
    if kind != "llava_next":
        raise UserError(f"{directory} holds a {kind} model, expected llava_next (LLaVA-v1.6)")


def hub_answers(model_id: str) -> bool:
    """Whether the Hub gives `model_id`; False when the cache alone is to serve.

    Where nobody answers transformers would repeat each of its ten requests for a minute; this ends
    within 15 seconds. What is not in the cache will be fetched, and a log line says so.
    Raises UserError for a name that cannot be an id, and for a model that neither the Hub nor the
    cache gives.
    """
    try:
        is_cached = isinstance(try_to_load_from_cache(model_id, "config.json"), str)
    except HFValidationError:
        raise UserError(
            f"the model {model_id} is no directory here, and no id of the Hub, owner/name: give "
            "its directory or its id"
        ) from None
    if constants.HF_HUB_OFFLINE:
        problem = "HF_HUB_OFFLINE forbids to fetch it: unset it"
    else:
        problem = _problem(model_id)
    if problem and not is_cached:
        raise UserError(
            f"{model_id} is no directory here and not in the cache {constants.HF_HUB_CACHE}, and "
            f"{problem}; or give --model_name a local path"
        )
    if problem:
        log.info("%s is taken from the cache: %s", model_id, problem)
    elif not is_cached:
        log.info(
            "%s is fetched from %s into %s (LLaVA-v1.6-Mistral-7B: 15 GB)",
            *(model_id, constants.ENDPOINT, constants.HF_HUB_CACHE),
        )
    return not problem


def _problem(model_id: str) -> str:
    """Why the Hub does not give the model, or ''."""
    try:
        hub.open_hub(model_id, "main", endpoint=constants.ENDPOINT)
    except UserError as error:
        return one_line(error)
    return ""
